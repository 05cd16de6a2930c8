"""Every setting of both trainings does what it says: laws that a setting left out would break."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from aligning import SHORT_RUN, Prepared, read_losses, weights_of
from modeling_llm2clip.training.alignment.align_arguments import AlignArguments
from modeling_llm2clip.training.alignment.optimization import count_warmup_steps
from safetensors.torch import load_file
from tiny import tiny_model
from torch import Tensor
from tuning import GROUPS, SHORT, tune

from modeling_llm2clip.data.caption_groups import TextPair
from modeling_llm2clip.data.splits import hold_out_groups
from modeling_llm2clip.training.alignment.align import align
from modeling_llm2clip.training.alignment.alignment_model import AlignmentModel
from modeling_llm2clip.training.alignment.trained_parts import choose_trained_parts
from modeling_llm2clip.training.finetuning import finetune_llm as stage
from modeling_llm2clip.training.finetuning.finetune_llm import (
    TuneArguments,
    finetune_llm,
    plan_tuning,
)

# Of 20 images trained on, each with three pairs, in batches of 8.
STEPS_AN_EPOCH = 7
TEXT_PAIRS = [TextPair(f"q{n}", f"q{n}", f"p{n}", (f"n{n}",)) for n in range(9)]


def read_metrics(output: Path, name: str) -> dict[int, float]:
    """A figure by step, where a line of the metrics has it."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """All texts of each batch that a tuning runs on."""
    batches: list[list[str]] = []
    collate = stage.PairCollator.__call__

    def note(self: Any, features: list[dict[str, Any]]) -> Any:
        batches.append([row[name] for row in features for name in row if name != "group_id"])
        return collate(self, features)

    monkeypatch.setattr(stage.PairCollator, "__call__", note)
    return batches


@pytest.mark.parametrize(("weight", "num_batches"), [(0.3, 2), (1.0, 7)])
def test_other_pairs_have_the_share_of_an_epoch_that_they_weigh(
    tmp_path: Path, seen: list[list[str]], weight: float, num_batches: int
) -> None:
    tune(tmp_path / "run", replace(SHORT, steps=None), other_pairs=[(TEXT_PAIRS, weight)])
    is_other = [texts[0].startswith("q") for texts in seen]
    assert (sum(is_other), len(is_other)) == (num_batches, STEPS_AN_EPOCH + num_batches)


def test_no_other_pair_shows_a_caption_that_is_held_out(
    tmp_path: Path, seen: list[list[str]]
) -> None:
    _, held_out, _ = hold_out_groups(GROUPS, 4, seed=SHORT.seed)
    spoilt = [TextPair("x", "x", "y", (held_out[0].captions[1],)), *TEXT_PAIRS]
    result = tune(tmp_path / "run", replace(SHORT, steps=None), other_pairs=[(spoilt, 1.0)])
    assert result.counts["num_other_pairs_lost"] == 1
    shown = {text for texts in seen for text in texts}
    assert shown and not shown & {caption for group in held_out for caption in group.captions}


def test_every_pairing_pairs_all_captions_anew(tmp_path: Path) -> None:
    def draw(pairings: int) -> list[dict[str, str]]:
        arguments = replace(SHORT, pairings=pairings)
        return list(plan_tuning("", GROUPS, tmp_path, arguments).data.tables["captions"])

    once, three_times = draw(1), draw(3)
    assert len(three_times) == 3 * len(once)
    assert three_times[: len(once)] == once != three_times[len(once) : 2 * len(once)]


def test_at_a_scale_of_nothing_no_pair_stands_out(tmp_path: Path) -> None:
    tune(tmp_path / "run", replace(SHORT, steps=1, scale=1e-6, negatives="one-way"))
    # Cosines are at most 1, so logits are at most 1e-6.
    assert read_losses(tmp_path / "run")[1] == pytest.approx(math.log(8), abs=1e-5)


def test_an_adapter_is_written_in_the_dtype_asked_for(tmp_path: Path) -> None:
    written = {}
    for dtype in ("float32", "bfloat16"):
        tune(tmp_path / dtype, replace(SHORT, steps=2, adapter_dtype=dtype))
        written[dtype] = load_file(tmp_path / dtype / "adapter" / "adapter_model.safetensors")
    assert {value.dtype for value in written["bfloat16"].values()} == {torch.bfloat16}
    rounded = {name: value.bfloat16() for name, value in written["float32"].items()}
    assert all(torch.equal(value, written["bfloat16"][name]) for name, value in rounded.items())


def test_gradient_checkpointing_saves_memory_and_moves_no_loss_of_the_tuning(
    tmp_path: Path,
) -> None:
    tune(tmp_path / "plain", replace(SHORT, steps=2))
    model, processor = tiny_model()
    arguments = replace(SHORT, steps=2, gradient_checkpointing=True)
    finetune_llm(model, processor, GROUPS, tmp_path / "saving", arguments)
    assert saves_memory(model.text_model)
    # Then captions are padded and not packed, so that sums have another order.
    wanted = pytest.approx(read_losses(tmp_path / "plain"), abs=1e-4)
    assert read_losses(tmp_path / "saving") == wanted


def saves_memory(tower: torch.nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in tower.modules())


def test_the_accuracy_is_measured_as_often_as_asked(tmp_path: Path) -> None:
    result = tune(tmp_path / "run", replace(SHORT, eval_every=2))
    measured = read_metrics(tmp_path / "run", "eval_cra")
    assert list(measured) == [2, 4, 6] and measured[6] == result.cra_after
    tune(tmp_path / "never", replace(SHORT, steps=2))
    assert not read_metrics(tmp_path / "never", "eval_cra")


def test_the_learning_rate_rises_for_the_steps_of_the_warm_up(tmp_path: Path) -> None:
    peaks = {}
    for warmup_steps in (1, 4):
        output = tmp_path / str(warmup_steps)
        tune(output, replace(SHORT, warmup_steps=warmup_steps))
        rates = read_metrics(output, "learning_rate")
        peaks[warmup_steps] = max(rates, key=rates.__getitem__)
        assert rates[peaks[warmup_steps]] == SHORT.lr
    # Versions of transformers log a step's own rate, or that of the next.
    assert peaks[4] - peaks[1] == 3


def test_a_run_of_any_length_warms_up_for_a_tenth_of_it_at_most_and_reaches_its_peak(
    tmp_path: Path,
) -> None:
    """By default; recorded schedules, all given as numbers of steps, stay what they were."""
    usual = TuneArguments().warmup_steps
    for num_steps in (1, 9, 10, 20, 300, 3000):
        assert count_warmup_steps(usual, num_steps) <= num_steps / 10
    assert count_warmup_steps(20, 300) == 20
    tune(tmp_path / "run", replace(SHORT, warmup_steps=usual, steps=20))
    assert max(read_metrics(tmp_path / "run", "learning_rate").values()) == SHORT.lr
    record = json.loads((tmp_path / "run" / "run.json").read_text())["arguments"]
    assert record["schedule"] == {"steps": 20, "warmup_steps": 2}


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_of_all_or_nothing_is_as_if_there_were_the_one_kind(
    prepared: Prepared, tmp_path: Path, share: float
) -> None:
    def drop_other_kind(record: Any) -> Any:
        if share:
            return replace(record, captions=() if record.long_captions else record.captions)
        return replace(record, long_captions=())

    of_one_kind = [drop_other_kind(record) for record in prepared.records]
    settings = {**SHORT_RUN, "steps": 3, "text_training": "frozen-online"}
    for name, records, long_share in (
        ("both", prepared.records, share),
        ("one", of_one_kind, 0.5),
    ):
        arguments = AlignArguments(**{**settings, "long_share": long_share})
        align(prepared.model, records, tmp_path / name, arguments)
    assert read_losses(tmp_path / "both") == read_losses(tmp_path / "one")


def change_by_one_step(prepared: Prepared, output: Path, **changed: Any) -> dict[str, Tensor]:
    """How far one step moves the weights, without weight decay unless asked for."""
    result = prepared.align(output, **{"steps": 1, "weight_decay": 0.0, **changed})
    assert result.trained is not None
    before = weights_of(prepared.model)
    return {name: value - before[name] for name, value in result.trained.items()}


def test_a_gradient_is_clipped_to_the_length_asked_for(prepared: Prepared, tmp_path: Path) -> None:
    name, rate = "text_projection.weight", SHORT_RUN["lr"]
    plain = change_by_one_step(prepared, tmp_path / "plain")[name].abs()
    clipped = change_by_one_step(prepared, tmp_path / "clipped", clip_norm=1e-12)[name].abs()
    # Adam's first step is the rate, unless the gradient is small beside its epsilon of 1e-8.
    assert plain.median() == pytest.approx(rate, rel=1e-2)
    assert clipped.max() < rate * 1e-3


def test_weight_decay_takes_its_share_of_matrices(prepared: Prepared, tmp_path: Path) -> None:
    without = change_by_one_step(prepared, tmp_path / "without")
    with_decay = change_by_one_step(prepared, tmp_path / "with", weight_decay=0.5)
    before = weights_of(prepared.model)
    for name, share in (("text_projection.weight", 0.5), ("visual_projection.bias", 0.0)):
        wanted = without[name] - SHORT_RUN["lr"] * share * before[name]
        # Differences of float32 numbers of about one.
        torch.testing.assert_close(with_decay[name], wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_a_lora_has_the_rank_and_weighs_the_alpha_asked_for(
    prepared: Prepared, tmp_path: Path, tower: str
) -> None:
    pytest.importorskip("peft")
    changes, sizes = {}, {}
    for rank, alpha in ((4, 8), (4, 16), (8, 8)):
        changed = {f"{tower}_training": "lora", f"{tower}_rank": rank, f"{tower}_alpha": alpha}
        output = tmp_path / f"{rank}-{alpha}"
        changes[rank, alpha] = change_by_one_step(prepared, output, **changed)
        record = json.loads((output / "run.json").read_text())
        sizes[rank, alpha] = record["parameters"][f"{tower}_model"]["trainable"]
    assert sizes[8, 8] == 2 * sizes[4, 8] > 0
    end = "layers.0.self_attn.q_proj.weight"
    (name,) = [n for n in changes[4, 8] if n.startswith(tower) and n.endswith(end)]
    # Adam's first step of B, which starts at zero, is the rate whatever alpha, which then weighs.
    ratio = changes[4, 16][name] / changes[4, 8][name]
    assert ratio.median() == pytest.approx(2, rel=1e-2)


@pytest.mark.parametrize("trained", ["neither", "vision", "text"])
def test_a_tower_that_is_not_trained_keeps_evaluating(prepared: Prepared, trained: str) -> None:
    model = AlignmentModel.from_pretrained(prepared.model, with_llm=True)
    wishes = {} if trained == "neither" else {f"{trained}_training": "lora"}
    choose_trained_parts(model, AlignArguments(**wishes))
    model.train()
    assert model.text_adapter.training
    for name, tower in (("vision", model.vision_model), ("text", model.text_model)):
        assert any(module.training for module in tower.modules()) == (name == trained)
    model.eval()
    assert not any(module.training for module in model.modules())


def test_gradient_checkpointing_saves_memory_and_moves_no_loss_of_the_alignment(
    prepared: Prepared, tmp_path: Path
) -> None:
    wishes: dict[str, Any] = {"vision_training": "full", "gradient_checkpointing": True}
    model = AlignmentModel.from_pretrained(prepared.model)
    choose_trained_parts(model, AlignArguments(**wishes))
    assert saves_memory(model.vision_model)
    prepared.align(tmp_path / "saving", steps=2, **wishes)
    prepared.align(tmp_path / "plain", steps=2, vision_training="full")
    assert read_losses(tmp_path / "saving") == read_losses(tmp_path / "plain")
