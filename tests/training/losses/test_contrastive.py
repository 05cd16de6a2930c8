"""The contrastive loss: groups, memory, and a model on several processes that equal one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
import torch.nn.functional as F
from aligning import write_data
from gloo_workers import (
    NUM_ROWS,
    backward_module,
    find_free_port,
    load_trained,
    make_batch,
    work,
)
from tiny import tiny_model

from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.heads_llm2clip import MAX_LOG_SCALE, LogitRule, contrastive_loss
from modeling_llm2clip.publishing.export_model import save_model
from modeling_llm2clip.training.losses.loss import LossInputs
from modeling_llm2clip.training.losses.pairs import ContrastiveLoss

WHOLE = slice(0, NUM_ROWS)
# Sums of a few float32 numbers in another order.
ROUNDING = {"atol": 2e-6, "rtol": 1e-5}


def test_the_grouped_loss_is_the_plain_one_when_all_groups_differ() -> None:
    image, text = (F.normalize(torch.randn(6, 8), dim=-1) for _ in range(2))
    scale = torch.tensor([10.0])
    grouped = ContrastiveLoss()(LossInputs(image, text, LogitRule(scale), torch.arange(6)))
    torch.testing.assert_close(grouped, contrastive_loss(scale * image @ text.T), **ROUNDING)


def test_rows_of_the_same_group_do_not_repel_each_other() -> None:
    image = F.normalize(torch.randn(2, 8), dim=-1)
    # Both rows show the same thing, so neither has a negative, and nothing is left to lose.
    inputs = LossInputs(image, image.flip(0), LogitRule(torch.tensor([10.0])), torch.zeros(2))
    loss = ContrastiveLoss()(inputs)
    assert loss.item() == 0.0


def test_equal_captions_of_different_groups_are_no_negatives() -> None:
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(4, 8, generator=generator), dim=-1) for _ in range(2))
    text[2] = text[0]
    scale, groups = torch.tensor([10.0]), torch.arange(4)
    rule = LogitRule(scale)
    found = ContrastiveLoss()(LossInputs(image, text, rule, groups, torch.tensor([7, 8, 7, 9])))
    together = torch.tensor([0, 1, 0, 3])
    assert torch.equal(found, ContrastiveLoss()(LossInputs(image, text, rule, together)))
    assert found < ContrastiveLoss()(LossInputs(image, text, rule, groups))
    # Group and caption each keep rows apart: rows 0 and 1 by the one, 0 and 2 by the other.
    both = LossInputs(image, text, rule, torch.tensor([0, 0, 2, 3]), torch.tensor([7, 8, 7, 9]))
    logits = scale * image @ text.T
    logits[[0, 0, 1, 2], [1, 2, 0, 0]] = -torch.inf
    torch.testing.assert_close(ContrastiveLoss()(both), contrastive_loss(logits), **ROUNDING)
    chunked = ContrastiveLoss(chunk_size=1)(both)
    torch.testing.assert_close(chunked, ContrastiveLoss()(both), **ROUNDING)


def test_rounded_embeddings_are_compared_in_float32() -> None:
    rounded = [F.normalize(torch.randn(6, 8), dim=-1).bfloat16() for _ in range(2)]
    others = LogitRule(torch.ones(1)), torch.arange(6)
    found = ContrastiveLoss()(LossInputs(*rounded, *others))
    assert found.dtype == torch.float32
    wanted = ContrastiveLoss()(LossInputs(*(part.float() for part in rounded), *others))
    assert torch.equal(found, wanted)


def test_the_chunked_loss_never_holds_the_whole_matrix() -> None:
    image, text = (F.normalize(torch.randn(256, 4), dim=-1) for _ in range(2))
    image.requires_grad_(True)
    kept: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    for chunk_size in (None, 16):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            inputs = LossInputs(image, text, LogitRule(torch.tensor([10.0])), torch.arange(256))
            ContrastiveLoss(chunk_size=chunk_size)(inputs)
        # What is kept for the backward pass: the matrix of logits, or rows of four numbers.
        assert (max(kept) >= 256 * 256) == (chunk_size is None)


def test_rows_that_do_not_pair_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 4\).*\(3, 4\).*must pair row by row"):
        ContrastiveLoss()(
            LossInputs(torch.ones(2, 4), torch.ones(3, 4), LogitRule(torch.ones(1)), torch.zeros(2))
        )


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, list[Any]]:
    """Run a batch shared by two processes over gloo, once for all tests."""
    folder = tmp_path_factory.mktemp("gloo")
    model, processor = tiny_model()
    save_model(model, processor, folder / "exported")
    batch = make_batch(folder / "exported", load_records(write_data(folder / "data")))
    torch.multiprocessing.spawn(work, args=(find_free_port(), folder, batch), nprocs=2)
    return folder, batch, [torch.load(folder / f"{r}.pt", weights_only=True) for r in range(2)]


@pytest.mark.slow
def test_gathering_gives_the_gradients_of_torch(two_processes: Any) -> None:
    for part in two_processes[2]:
        # A sum of two numbers is the same in either order.
        assert torch.equal(part["gathered"]["rows"], part["gathered by torch"]["rows"])


@pytest.mark.slow
@pytest.mark.parametrize("wrapped_by", ["module", "sharded"], ids=["DDP", "FSDP2"])
def test_two_processes_give_every_gradient_of_the_model_that_one_gives(
    two_processes: Any, wrapped_by: str
) -> None:
    folder, batch, parts = two_processes
    model = load_trained(folder / "exported")
    loss = backward_module(model, batch, WHOLE)
    mean = (parts[0][f"{wrapped_by}_loss"] + parts[1][f"{wrapped_by}_loss"]) / 2
    torch.testing.assert_close(mean, loss, **ROUNDING)
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert {"logit_scale.log_scale", "visual_projection.weight"} < set(wanted)
    assert any(name.startswith("vision_model.") for name in wanted)
    for part in parts:
        assert set(part[wrapped_by]) == set(wanted)
        for name, gradient in wanted.items():
            # Two layers of float32 sums in another order, gradients of about 1.
            torch.testing.assert_close(
                part[wrapped_by][name], gradient, atol=2e-5, rtol=1e-4, msg=lambda m, n=name: n + m
            )


@pytest.mark.slow
def test_a_sharded_temperature_is_clamped_too(two_processes: Any) -> None:
    for part in two_processes[2]:
        assert part["clamped"].item() == pytest.approx(MAX_LOG_SCALE)  # float32
