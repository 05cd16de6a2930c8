"""The distance of embeddings from a teacher's (ProCLIP, arXiv:2510.18795 v3).

In stage 1 the text side learns what CLIP's text encoder gives for the same captions; in stage 2 a
vision tower that is trained stays near what its frozen self gives for the same images: in each
embedding, and in the distances between them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .loss import LossInputs, gather_rows, iterate_chunks


class SelfDistillationLoss(nn.Module):
    """Squared error to the frozen tower's embeddings, and smooth L1 of their distances.

    Embeddings are the tower's output before projection, at unit length. The squared error is summed
    over dimensions. The distances are those of all pairs of images in the batch of all processes,
    so that their share grows with the batch.

    Both are divided by the number of images. The authors' code (VisionXLab/ProCLIP at 2a41f39,
    `training/train.py`) adds them up instead, so that its weight is this one divided by that
    number, and compares projected images of one process. The teacher of their paper is a moving
    average; that of their code is frozen, as this one is.
    """

    def forward(self, inputs: LossInputs) -> Tensor:
        """Compute the mean over this process's images, () float32."""
        if inputs.vision_embeds is None or inputs.teacher_embeds is None:
            raise ValueError(
                "The self-distillation needs the embeddings of the frozen vision tower. Let align "
                "make them (distillation_weight)."
            )
        return distill(inputs.vision_embeds, inputs.teacher_embeds, inputs)


def distill(student: Tensor, teacher: Tensor, inputs: LossInputs | None = None) -> Tensor:
    """Compute the mean distance of rows, (B, D) each, from a teacher's, () float32.

    `inputs` are the batch that they are of, of which other processes have more; None where these
    are all rows.
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
        total = total + differences / 2  # each pair is met twice
    return total / len(student)


def _measure_distances(rows: Tensor, others: Tensor) -> Tensor:
    """Measure the distances of all pairs; a product is exact enough where they are squared."""
    return torch.cdist(rows, others, compute_mode="use_mm_for_euclid_dist")
