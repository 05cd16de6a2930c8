"""Every option of stage 1 has its effect."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from aligning import read_losses, read_metrics
from safetensors.torch import load_file
from tuning import RECORDS, SHORT, Tuned, hold_out_short, tune, write_pairs

from modeling_llm2clip.configs.align_config import AlignConfig
from modeling_llm2clip.configs.finetune_config import FinetuneConfig
from modeling_llm2clip.data.captions.caption_groups import group_captions
from modeling_llm2clip.data.captions.text_pairs import TextPair
from modeling_llm2clip.training.finetuning import finetune_llm as stage
from modeling_llm2clip.training.finetuning.finetune_data import prepare_data
from modeling_llm2clip.training.finetuning.pair_sampling import PairCollator
from modeling_llm2clip.training.trainer_mixins import count_warmup_steps

# 20 training images with three pairs each, in batches of 8.
STEPS_PER_EPOCH = 7
TEXT_PAIRS = [TextPair(f"q{n}", f"q{n}", f"p{n}", (f"n{n}",)) for n in range(9)]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Texts of each batch in a training run."""
    batches: list[list[str]] = []
    collate = PairCollator.__call__

    def note(self: Any, features: list[dict[str, Any]]) -> Any:
        batches.append([t for row in features for t in row.values() if isinstance(t, str)])
        return collate(self, features)

    monkeypatch.setattr(PairCollator, "__call__", note)
    return batches


def is_of_pairs(texts: list[str]) -> bool:
    return texts[0].startswith(("q", "x"))


@pytest.mark.slow
def test_text_pairs_get_their_share_of_an_epoch_and_contain_no_held_out_caption(
    tmp_path: Path, seen: list[list[str]]
) -> None:
    held_out = hold_out_short()
    with_held_out = [TextPair("x", "x", "y", (held_out[0].captions[1],)), *TEXT_PAIRS]
    file = write_pairs(tmp_path / "pairs.jsonl", with_held_out)
    batches = {}
    for name, weight, num_hard, num_batches in (
        ("few", 0.3, 0, 2), ("at random", 1.0, 0, 7), ("hard", 1.0, 3, 7),
    ):  # fmt: skip
        config = replace(
            SHORT, max_steps=None, text_pairs=[(file, weight)], num_hard_negatives=num_hard
        )
        tuned = tune(tmp_path / name, config)
        assert tuned.results["num_text_pairs_lost"] == 1
        shown = {text for texts in seen for text in texts}
        assert shown and not shown & {caption for group in held_out for caption in group.captions}
        assert sum(map(is_of_pairs, seen)) == num_batches
        assert len(seen) == STEPS_PER_EPOCH + num_batches
        batches[name] = seen.copy()
        seen.clear()
    # Hard negatives for captions do not change the batches of text pairs.
    first, second = (list(filter(is_of_pairs, batches[name])) for name in ("at random", "hard"))
    assert first == second and batches["at random"] != batches["hard"]


def test_every_pairing_is_different_and_has_all_captions(tmp_path: Path) -> None:
    def sample(num_pairings: int) -> list[dict[str, Any]]:
        config = replace(SHORT, num_pairings=num_pairings)
        folder = tmp_path / str(num_pairings)
        folder.mkdir()
        return list(prepare_data(group_captions(RECORDS), config, folder).tables["captions"])

    once, three_times = sample(1), sample(3)
    assert len(three_times) == 3 * len(once)
    assert three_times[: len(once)] == once != three_times[len(once) : 2 * len(once)]


def test_at_a_scale_near_zero_the_loss_is_at_chance_level(tmp_path: Path) -> None:
    tune(tmp_path / "run", replace(SHORT, max_steps=1, scale=1e-6, negatives="query-to-doc"))
    # Cosines are at most 1, so logits are at most 1e-6.
    assert read_losses(tmp_path / "run")[1] == pytest.approx(math.log(8), abs=1e-5)


@pytest.mark.slow
def test_a_lora_is_written_in_the_requested_dtype(tuned: Tuned, tmp_path: Path) -> None:
    half = load_file(tune(tmp_path / "run", replace(SHORT, lora_dtype="bfloat16")).weights)
    assert {value.dtype for value in half.values()} == {torch.bfloat16}
    rounded = {name: value.bfloat16() for name, value in load_file(tuned.weights).items()}
    assert all(torch.equal(value, half[name]) for name, value in rounded.items())


@pytest.mark.slow
def test_gradient_checkpointing_does_not_change_the_loss(
    tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    towers = []
    recompute = stage.recompute_activations

    def note(tower: torch.nn.Module) -> None:
        recompute(tower)
        modules = tower.modules()
        towers.append(any(getattr(m, "gradient_checkpointing", False) for m in modules))

    monkeypatch.setattr(stage, "recompute_activations", note)
    tune(tmp_path / "run", replace(SHORT, gradient_checkpointing=True))
    assert towers == [True]
    losses = [read_losses(output) for output in (tmp_path / "run", tuned.output)]
    for step in (1, 2):
        # Captions are then padded instead of packed, which changes the order of sums.
        assert losses[0][step] == pytest.approx(losses[1][step], abs=1e-4)


@pytest.mark.slow
def test_the_accuracy_is_measured_every_eval_steps(tuned: Tuned, tmp_path: Path) -> None:
    run = tune(tmp_path / "run", replace(SHORT, eval_steps=2))
    measured = read_metrics(run.output, "eval_cra")
    assert list(measured) == [2, 4, 6] and measured[6] == run.results["cra_after"]
    assert not read_metrics(tuned.output, "eval_cra")


@pytest.mark.slow
def test_the_default_warmup_is_at_most_a_tenth_of_any_run(tuned: Tuned, tmp_path: Path) -> None:
    """A number of steps is used unchanged, as recorded runs need."""
    usual = FinetuneConfig().warmup_steps
    assert usual == AlignConfig().warmup_steps
    for num_steps in (1, 9, 10, 20, 300, 3000):
        assert count_warmup_steps(usual, num_steps) <= num_steps / 10
    assert count_warmup_steps(20, 300) == 20
    config = replace(SHORT, warmup_steps=usual, max_steps=20)
    peaks = []
    for run, num_steps, warmup_steps in (
        (tuned, 6, 2), (tune(tmp_path / "run", config), 20, 2),
        (tune(tmp_path / "long", replace(SHORT, warmup_steps=4)), 6, 4),
    ):  # fmt: skip
        record = json.loads((run.output / "run.json").read_text())["inputs"]
        assert record["schedule"] == {"steps": num_steps, "warmup_steps": warmup_steps}
        rates = read_metrics(run.output, "learning_rate")
        peaks.append(max(rates, key=rates.__getitem__))
        assert rates[peaks[-1]] == SHORT.learning_rate
    # Some versions of transformers log the rate of the step, others that of the next step.
    assert peaks[0] == peaks[1] == peaks[2] - 2
