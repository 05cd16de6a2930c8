"""Every loss and term equals a slow version of its formula, also in chunks and on two processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gloo_workers
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from aligning import write_data
from gloo_workers import backward_module, find_free_port, load_trained, make_batch
from tiny import tiny_model
from torch import Tensor, nn

from modeling_llm2clip.configs.align_config import AlignConfig
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.heads_llm2clip import MAX_LOG_SCALE, LogitRule
from modeling_llm2clip.publishing.export_model import save_model
from modeling_llm2clip.training.losses import loss as loss_module
from modeling_llm2clip.training.losses.choose_loss import MatryoshkaLoss, WeightedSum, build_loss
from modeling_llm2clip.training.losses.loss import (
    LossInputs,
    identify_callable,
)
from modeling_llm2clip.training.losses.pairs import ContrastiveLoss, SigmoidLoss
from modeling_llm2clip.training.losses.terms import (
    KeptTextsLoss,
    SelfDistillationLoss,
    StructureLoss,
)

NUM_ROWS = 8
TEMPERATURE = 0.07  # of STRUCTURE's neighborhoods
# Rows 1 and 2 are of one group, 0 and 5 too; 3 and 6 have equal captions.
GROUPS, TEXTS = torch.tensor([0, 1, 1, 2, 3, 0, 4, 5]), torch.tensor([0, 1, 2, 3, 4, 5, 3, 7])
# Float32 sums in another order, of numbers up to a hundred.
ROUNDING = {"atol": 2e-5, "rtol": 2e-5}


def make_inputs(part: slice = slice(None)) -> tuple[LossInputs, dict[str, Tensor]]:
    """Return rows of a batch, and its leaf tensors, which require gradients."""
    generator = torch.Generator().manual_seed(3)
    widths = {"image": 6, "text": 6, "vision": 5, "caption": 7, "teacher": 5}
    rows = {n: torch.randn(NUM_ROWS, w, generator=generator)[part] for n, w in widths.items()}
    leaves = {name: value.clone().requires_grad_() for name, value in rows.items()}
    leaves["scale"] = torch.tensor([4.0], requires_grad=True)
    # Every process has all of the texts that are kept.
    leaves["kept"] = torch.randn(5, 6, generator=generator).requires_grad_()
    targets = torch.randn(5, 6, generator=generator)
    inputs = LossInputs(
        F.normalize(leaves["image"], dim=-1),
        F.normalize(leaves["text"], dim=-1),
        LogitRule(leaves["scale"]),
        GROUPS[part],
        TEXTS[part],
        vision_embeds=leaves["vision"],
        caption_embeds=leaves["caption"],
        teacher_embeds=rows["teacher"],
        kept_embeds=leaves["kept"],
        kept_targets=targets,
    )
    return inputs, leaves


def is_negative(row: int, other: int) -> bool:
    return GROUPS[row] != GROUPS[other] and TEXTS[row] != TEXTS[other]


def contrast_slowly(inputs: LossInputs) -> Tensor:
    total = torch.zeros(())
    images, texts = inputs.image_embeds, inputs.text_embeds
    for one, other in ((images, texts), (texts, images)):
        for row in range(NUM_ROWS):
            scores = [
                inputs.logit_scale[0] * (one[row] * other[column]).sum()
                for column in range(NUM_ROWS)
                if column == row or is_negative(row, column)
            ]
            own = inputs.logit_scale[0] * (one[row] * other[row]).sum()
            total = total - own + torch.stack(scores).exp().sum().log()
    return total / (2 * NUM_ROWS)


def judge_slowly(inputs: LossInputs, bias: float = -2.0) -> Tensor:
    total = torch.zeros(())
    for row, image in enumerate(inputs.image_embeds):
        for column, text in enumerate(inputs.text_embeds):
            logit = inputs.logit_scale[0] * (image * text).sum() + bias
            if row == column:
                total = total - torch.sigmoid(logit).log()
            elif is_negative(row, column):
                total = total - (1 - torch.sigmoid(logit)).log()
    return total / NUM_ROWS


def cut_slowly(inputs: LossInputs) -> Tensor:
    losses = []
    for size in (2, 4, 6):
        image, text = (
            part[:, :size] / part[:, :size].norm(dim=1, keepdim=True)
            for part in (inputs.image_embeds, inputs.text_embeds)
        )
        cut = inputs._replace(image_embeds=image, text_embeds=text)
        losses.append(judge_slowly(cut))
    return sum(losses) / 3  # type: ignore[return-value]


def distill_slowly(inputs: LossInputs) -> Tensor:
    assert inputs.vision_embeds is not None and inputs.teacher_embeds is not None
    student, teacher = (F.normalize(p) for p in (inputs.vision_embeds, inputs.teacher_embeds))
    total = ((student - teacher) ** 2).sum()
    for row in range(NUM_ROWS):
        for other in range(row):
            distances = [(side[row] - side[other]).norm() for side in (student, teacher)]
            gap = (distances[0] - distances[1]).abs()
            total = total + (gap**2 / 2 if gap < 1 else gap - 0.5)
    return total / NUM_ROWS


def keep_neighbors_slowly(inputs: LossInputs) -> Tensor:
    assert inputs.vision_embeds is not None and inputs.caption_embeds is not None
    total = torch.zeros(())
    for pair in (
        (inputs.vision_embeds, inputs.image_embeds), (inputs.caption_embeds, inputs.text_embeds),
    ):  # fmt: skip
        found = []
        for side in pair:
            unit = side / side.norm(dim=1, keepdim=True)
            centered = unit - unit.mean(dim=0)
            found.append(((centered @ centered.T) / TEMPERATURE).softmax(dim=1))
        middle = (found[0] + found[1]) / 2
        for one in found:
            total = total + (one * (one / middle).log()).sum() / 2
    return total / (2 * NUM_ROWS)


def keep_slowly(inputs: LossInputs) -> Tensor:
    assert inputs.kept_embeds is not None and inputs.kept_targets is not None
    total = torch.zeros((), dtype=torch.float64)
    for text, target in zip(inputs.kept_embeds.double(), inputs.kept_targets.double(), strict=True):
        # At unit length the squared distance is 2 minus twice the cosine.
        total = total + 2 - 2 * (text @ target) / (text.norm() * target.norm())
    return (total / 5).float()


LOSSES: dict[str, tuple[Callable[[int | None], nn.Module], Callable[[LossInputs], Tensor]]] = {
    "contrastive": (ContrastiveLoss, contrast_slowly),
    "sigmoid": (lambda size: SigmoidLoss(size, logit_bias=-2.0), judge_slowly),
    "matryoshka": (
        lambda size: MatryoshkaLoss(SigmoidLoss(size, logit_bias=-2.0), (2, 4)), cut_slowly,
    ),
    "self-distillation": (lambda _: SelfDistillationLoss(), distill_slowly),
    "structure": (lambda _: StructureLoss(), keep_neighbors_slowly),
    "kept texts": (lambda _: KeptTextsLoss(), keep_slowly),
}  # fmt: skip


def differentiate(
    loss: Callable[[LossInputs], Tensor], part: slice = slice(None)
) -> dict[str, Tensor]:
    """Return the value of a loss and all its gradients."""
    inputs, leaves = make_inputs(part)
    value = loss(inputs)
    value.backward()
    found = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    own = loss.named_parameters() if isinstance(loss, nn.Module) else ()
    found |= {f"own {name}": parameter.grad for name, parameter in own}
    return {"value": value.detach(), **found}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("chunk_size", [None, 1, 3, 100])
def test_a_loss_has_the_gradients_of_its_formula(name: str, chunk_size: int | None) -> None:
    make, formula = LOSSES[name]
    wanted, found = differentiate(formula), differentiate(make(chunk_size))
    assert len(wanted) > 1 and set(wanted) <= set(found)
    for part, value in wanted.items():
        assert value.abs().sum() > 0
        torch.testing.assert_close(found[part], value, **ROUNDING)


def work(rank: int, port: int, folder: Path) -> None:
    """Compute half of the batch in its own process."""
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    half = NUM_ROWS // 2
    part = slice(rank * half, (rank + 1) * half)
    found = {name: differentiate(make(2), part) for name, (make, _) in LOSSES.items()}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results_of_two(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Results of two processes, each for its half of the batch."""
    folder = tmp_path_factory.mktemp("results_of_two")
    torch.multiprocessing.spawn(work, args=(find_free_port(), folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
def test_two_processes_give_the_loss_and_gradients_of_one(results_of_two: list[Any]) -> None:
    for name, (make, _) in LOSSES.items():
        for part, wanted in differentiate(make(None)).items():
            found = [each[name][part] for each in results_of_two]
            # Distributed training takes the mean of all.
            is_row = wanted.ndim == 2 and part != "kept"
            whole = torch.cat(found) / 2 if is_row else torch.stack(found).mean(dim=0)
            torch.testing.assert_close(whole, wanted, **ROUNDING, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "kept texts"])
def test_a_loss_without_gradients_has_the_value_of_its_formula_in_any_parts(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "_ROWS_WITHOUT_GRADIENT", 3)
    inputs, _ = make_inputs()
    with torch.no_grad():
        value = LOSSES[name][0](None)(inputs)
    torch.testing.assert_close(value, LOSSES[name][1](inputs), **ROUNDING)


def test_the_run_record_describes_a_loss_and_its_parts() -> None:
    def own_loss(inputs: LossInputs, weight: float = 1.0) -> Tensor:
        return weight * inputs.image_embeds.sum()

    name = own_loss.__qualname__
    assert identify_callable(own_loss) == name
    assert (
        identify_callable(partial(own_loss, weight=2.0))
        == f"partial({name}, (), [('weight', 2.0)])"
    )
    assert identify_callable(build_loss(AlignConfig(matryoshka_dims=(2,)), own_loss)) == (
        f"MatryoshkaLoss(dims=(2,), loss={name})"
    )
    assert identify_callable(build_loss(AlignConfig(structure_weight=2.0))) == (
        "WeightedSum(structure=2.0, loss=ContrastiveLoss(chunk_size=None))"
    )


def test_equal_images_have_a_gradient() -> None:
    inputs, _ = make_inputs()
    vision = inputs.vision_embeds.detach()[[0] * NUM_ROWS].requires_grad_()  # type: ignore[union-attr]
    SelfDistillationLoss()(inputs._replace(vision_embeds=vision)).backward()
    assert vision.grad is not None and vision.grad.isfinite().all() and vision.grad.abs().sum() > 0


def test_a_loss_is_built_from_the_options() -> None:
    config = AlignConfig(
        loss="sigmoid", loss_chunk_size=3, matryoshka_dims=(2, 4), structure_weight=0.5,
        distillation_weight=2.0, vision_training="full",
    )  # fmt: skip
    inputs, _ = make_inputs()
    found = build_loss(config)
    assert isinstance(found, WeightedSum) and found.extra_repr() == (
        "self_distillation=2.0, structure=0.5"
    )
    terms = {name: make(None)(inputs) for name, (make, _) in LOSSES.items()}
    with torch.no_grad():
        next(found.parameters()).fill_(-2.0)
        wanted = terms["matryoshka"] + 2 * terms["self-distillation"] + terms["structure"] / 2
        torch.testing.assert_close(found(inputs), wanted, **ROUNDING)
    assert isinstance(build_loss(AlignConfig()), ContrastiveLoss)
    given = build_loss(AlignConfig(structure_weight=2.0), lambda _: torch.tensor(5.0))
    torch.testing.assert_close(given(inputs), 5 + 2 * terms["structure"])


def test_missing_inputs_of_a_loss_are_named() -> None:
    inputs, _ = make_inputs()
    with pytest.raises(ValueError, match="needs embeddings of the frozen vision tower"):
        SelfDistillationLoss()(inputs._replace(teacher_embeds=None))


WHOLE = slice(0, NUM_ROWS)
# Sums of a few float32 numbers in another order.
CLOSE = {"atol": 2e-6, "rtol": 1e-5}


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


def test_different_numbers_of_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 4\).*\(3, 4\).*must have the same number of rows"):
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
    torch.multiprocessing.spawn(gloo_workers.work, args=(find_free_port(), folder, batch), nprocs=2)
    return folder, batch, [torch.load(folder / f"{r}.pt", weights_only=True) for r in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("cached", ["", "_cached"])
@pytest.mark.parametrize("wrapped_by", ["module", "sharded"], ids=["DDP", "FSDP2"])
def test_two_processes_give_the_gradients_of_one(
    two_processes: Any, wrapped_by: str, cached: str
) -> None:
    """Also if their towers encode two rows at a time."""
    folder, batch, parts = two_processes
    model = load_trained(folder / "exported")
    loss = backward_module(model, batch, WHOLE)
    mean = (parts[0][f"{wrapped_by}_loss"] + parts[1][f"{wrapped_by}_loss"]) / 2
    torch.testing.assert_close(mean, loss, **CLOSE)
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert {"logit_scale.log_scale", "visual_projection.weight"} < set(wanted)
    assert any(name.startswith("vision_model.") for name in wanted)
    for part in parts:
        assert set(part[wrapped_by + cached]) == set(wanted)
        for name, gradient in wanted.items():
            # Two layers of float32 sums in another order, gradients of about 1.
            torch.testing.assert_close(
                part[wrapped_by + cached][name],
                gradient,
                atol=2e-5,
                rtol=1e-4,
                msg=lambda m, n=name: n + m,
            )


@pytest.mark.slow
def test_a_sharded_temperature_is_clamped_too(two_processes: Any) -> None:
    for part in two_processes[2]:
        assert part["clamped"].item() == pytest.approx(MAX_LOG_SCALE)  # float32


@pytest.mark.slow
def test_only_trained_weights_are_gathered_from_shards(two_processes: Any) -> None:
    """The main process gets them; the other one only participates."""
    main, other = two_processes[2]
    assert main["collected"].keys() == main["trained"].keys() and not other["collected"]
    assert not any(name.startswith("vision_model.") for name in main["trained"])
    for name, weight in main["trained"].items():
        assert torch.equal(main["collected"][name], weight), name
    assert main["num_gathered"] == len(main["trained"])
