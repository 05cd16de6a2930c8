"""Terms added to a run's loss: distance to a teacher (ProCLIP) and preserved neighbors (STRUCTURE).

ProCLIP (arXiv:2510.18795 v3) penalizes the distance between a student's and a teacher's embeddings,
and the difference between the pairwise distances of both. In ProCLIP's stage 1, the text side
learns CLIP's text embeddings of the same captions. In ProCLIP's stage 2, a trained vision tower
stays close to the frozen tower's embeddings of the same images.

STRUCTURE (arXiv:2506.16895) makes projected embeddings keep the neighbors that they have before the
projection.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .loss import LossInputs, gather_rows, iterate_chunks

_TEMPERATURE = 0.07  # of STRUCTURE's neighborhoods


class SelfDistillationLoss(nn.Module):
    """Squared error to the frozen tower's embeddings, plus smooth L1 of the pairwise distances.

    Embeddings are the tower's outputs before projection, at unit length. The squared error is
    summed over dimensions. Distances are taken between all pairs of images in the global batch, so
    the share of this term grows with the batch size.

    Both terms are divided by the number of images. The authors' code (VisionXLab/ProCLIP at
    2a41f39, `training/train.py`) sums both terms instead, so its weight is the weight here divided
    by the number of images, and it compares the projected images of one process. The paper's
    teacher is a moving average; the teacher in the authors' code is frozen, as here.
    """

    def forward(self, inputs: LossInputs) -> Tensor:
        """Compute the mean over this process's images, () float32."""
        if inputs.vision_embeds is None or inputs.teacher_embeds is None:
            raise ValueError(
                "The self-distillation loss needs embeddings of the frozen vision tower. Use align "
                "with distillation_weight, which computes them."
            )
        return distill(inputs.vision_embeds, inputs.teacher_embeds, inputs)


def distill(student: Tensor, teacher: Tensor, inputs: LossInputs | None = None) -> Tensor:
    """Compute the mean distance between a student's and a teacher's rows, (B, D) each, () float32.

    `inputs` is the batch, whose other rows are on other processes; None if `student` and `teacher`
    have all rows.
    """
    student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    students, teachers = student, teacher
    if inputs is not None:
        (students, teachers), _ = gather_rows(inputs, student, teacher)
    total = (student - teacher).square().sum()
    for rows in iterate_chunks(len(student)):
        differences = F.smooth_l1_loss(
            _measure_distances(student[rows], students),
            _measure_distances(teacher[rows], teachers),
            reduction="sum",
        )
        total = total + differences / 2  # each pair occurs twice
    return total / len(student)


def _measure_distances(rows: Tensor, others: Tensor) -> Tensor:
    """Compute all pairwise distances by a matrix product, which is accurate enough here."""
    return torch.cdist(rows, others, compute_mode="use_mm_for_euclid_dist")


class KeptTextsLoss(nn.Module):
    """Squared error between a student's and a teacher's unit-length embeddings of kept texts.

    The error is the first term of `distill`. Every process has the same texts, so the mean over
    processes equals the loss of a single process. Batches without kept texts, such as held-out
    images, have a loss of 0.
    """

    def forward(self, inputs: LossInputs) -> Tensor:
        """Compute the mean over the texts, () float32."""
        if inputs.kept_embeds is None or inputs.kept_targets is None:
            return inputs.image_embeds.new_zeros(())
        texts, targets = (F.normalize(p, dim=-1) for p in (inputs.kept_embeds, inputs.kept_targets))
        return (texts - targets).square().sum() / len(texts)


class StructureLoss(nn.Module):
    """Jensen-Shannon divergence of the neighborhoods before and after the projections.

    A row's neighborhood is the softmax of its similarities to the global batch, computed from
    unit-length embeddings after subtracting their mean. The loss averages both modalities. Only the
    first level of the paper's sum is computed, as in the authors' settings (temperature 0.07). The
    authors' code swaps the arguments of the divergence; the divergence here follows the paper and
    is between 0 and ln 2.
    """

    def forward(self, inputs: LossInputs) -> Tensor:
        """Compute the mean over this process's rows, () float32."""
        assert inputs.vision_embeds is not None and inputs.caption_embeds is not None
        sides = (
            inputs.vision_embeds, inputs.image_embeds, inputs.caption_embeds, inputs.text_embeds,
        )  # fmt: skip
        gathered, first = gather_rows(inputs, *(F.normalize(side, dim=-1) for side in sides))
        centered = [embeds - embeds.mean(dim=0) for embeds in gathered]
        num_rows = len(inputs.image_embeds)
        total = torch.zeros((), device=inputs.image_embeds.device)
        for chunk in iterate_chunks(num_rows):
            rows = slice(first + chunk.start, first + chunk.stop)
            image, projected_image, text, projected_text = (
                F.log_softmax(side[rows] @ side.T / _TEMPERATURE, dim=-1) for side in centered
            )
            total = total + _sum_divergences(image, projected_image)
            total = total + _sum_divergences(text, projected_text)
        return total / (2 * num_rows)


def _sum_divergences(before: Tensor, after: Tensor) -> Tensor:
    """Return the sum, (), of the divergences between rows of log-probabilities, (b, A) each."""
    middle = torch.logaddexp(before, after) - math.log(2)
    return (before.exp() * (before - middle) + after.exp() * (after - middle)).sum() / 2
