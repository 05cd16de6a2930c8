"""Every option of stage 1 does what it says: laws that an unused option would break."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from aligning import read_losses
from safetensors.torch import load_file
from tuning import RECORDS, SHORT, hold_out_short, tune, write_pairs

from modeling_llm2clip.configs.align_config import AlignConfig
from modeling_llm2clip.configs.finetune_config import FinetuneConfig
from modeling_llm2clip.data.captions.caption_groups import group_captions
from modeling_llm2clip.data.captions.text_pairs import TextPair
from modeling_llm2clip.training.finetuning import finetune_llm as stage
from modeling_llm2clip.training.finetuning.finetune_data import prepare_data
from modeling_llm2clip.training.finetuning.pair_sampling import PairCollator
from modeling_llm2clip.training.trainer_mixins import count_warmup_steps

# Of 20 images trained on, each with three pairs, in batches of 8.
STEPS_PER_EPOCH = 7
TEXT_PAIRS = [TextPair(f"q{n}", f"q{n}", f"p{n}", (f"n{n}",)) for n in range(9)]


def read_metrics(output: Path, name: str) -> dict[int, float]:
    """A number by step, where a line of the metrics has it."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """All texts of each batch that a run trains on."""
    batches: list[list[str]] = []
    collate = PairCollator.__call__

    def note(self: Any, features: list[dict[str, Any]]) -> Any:
        batches.append([t for row in features for t in row.values() if isinstance(t, str)])
        return collate(self, features)

    monkeypatch.setattr(PairCollator, "__call__", note)
    return batches


@pytest.mark.parametrize(("weight", "num_batches"), [(0.3, 2), (1.0, 7)])
@pytest.mark.slow
def test_text_pairs_have_the_share_of_an_epoch_that_they_weigh(
    tmp_path: Path, seen: list[list[str]], weight: float, num_batches: int
) -> None:
    file = write_pairs(tmp_path / "pairs.jsonl", TEXT_PAIRS)
    tune(tmp_path / "run", replace(SHORT, max_steps=None, text_pairs=[(file, weight)]))
    is_other = [texts[0].startswith("q") for texts in seen]
    assert (sum(is_other), len(is_other)) == (num_batches, STEPS_PER_EPOCH + num_batches)


@pytest.mark.slow
def test_hard_batches_of_captions_leave_those_of_text_pairs_as_they_are(
    tmp_path: Path, seen: list[list[str]]
) -> None:
    file = write_pairs(tmp_path / "pairs.jsonl", TEXT_PAIRS)
    config = replace(SHORT, max_steps=None, text_pairs=[(file, 1.0)])
    tune(tmp_path / "at random", config)
    at_random = seen.copy()
    seen.clear()
    tune(tmp_path / "hard", replace(config, num_hard_negatives=3))
    first, second = (
        [texts for texts in batches if texts[0].startswith("q")] for batches in (at_random, seen)
    )
    assert len(first) == 7 and first == second
    assert at_random != seen  # batches of captions are others


@pytest.mark.slow
def test_no_text_pair_shows_a_caption_that_is_held_out(
    tmp_path: Path, seen: list[list[str]]
) -> None:
    held_out = hold_out_short()
    with_held_out = [TextPair("x", "x", "y", (held_out[0].captions[1],)), *TEXT_PAIRS]
    file = write_pairs(tmp_path / "pairs.jsonl", with_held_out)
    tuned = tune(tmp_path / "run", replace(SHORT, max_steps=None, text_pairs=[(file, 1.0)]))
    assert tuned.results["num_text_pairs_lost"] == 1
    shown = {text for texts in seen for text in texts}
    assert shown and not shown & {caption for group in held_out for caption in group.captions}


def test_every_pairing_pairs_all_captions_anew(tmp_path: Path) -> None:
    def sample(num_pairings: int) -> list[dict[str, Any]]:
        config = replace(SHORT, num_pairings=num_pairings)
        folder = tmp_path / str(num_pairings)
        folder.mkdir()
        return list(prepare_data(group_captions(RECORDS), [], config, folder).tables["captions"])

    once, three_times = sample(1), sample(3)
    assert len(three_times) == 3 * len(once)
    assert three_times[: len(once)] == once != three_times[len(once) : 2 * len(once)]


def test_at_a_scale_near_zero_the_loss_is_that_of_chance(tmp_path: Path) -> None:
    tune(tmp_path / "run", replace(SHORT, max_steps=1, scale=1e-6, negatives="query-to-doc"))
    # Cosines are at most 1, so logits are at most 1e-6.
    assert read_losses(tmp_path / "run")[1] == pytest.approx(math.log(8), abs=1e-5)


@pytest.mark.slow
def test_a_lora_is_written_in_the_dtype_asked_for(tmp_path: Path) -> None:
    written = {}
    for dtype in ("float32", "bfloat16"):
        tuned = tune(tmp_path / dtype, replace(SHORT, max_steps=2, lora_dtype=dtype))
        written[dtype] = load_file(tuned.weights)
    assert {value.dtype for value in written["bfloat16"].values()} == {torch.bfloat16}
    rounded = {name: value.bfloat16() for name, value in written["float32"].items()}
    assert all(torch.equal(value, written["bfloat16"][name]) for name, value in rounded.items())


@pytest.mark.slow
def test_gradient_checkpointing_saves_memory_and_moves_no_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    towers = []
    recompute = stage.recompute_activations

    def note(tower: torch.nn.Module) -> None:
        recompute(tower)
        towers.append(saves_memory(tower))

    monkeypatch.setattr(stage, "recompute_activations", note)
    tune(tmp_path / "plain", replace(SHORT, max_steps=2))
    tune(tmp_path / "saving", replace(SHORT, max_steps=2, gradient_checkpointing=True))
    assert towers == [True]
    # Then captions are padded and not packed, so that sums have another order.
    wanted = pytest.approx(read_losses(tmp_path / "plain"), abs=1e-4)
    assert read_losses(tmp_path / "saving") == wanted


def saves_memory(tower: torch.nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in tower.modules())


@pytest.mark.slow
def test_the_accuracy_is_measured_as_often_as_asked(tmp_path: Path) -> None:
    tuned = tune(tmp_path / "run", replace(SHORT, eval_steps=2))
    measured = read_metrics(tmp_path / "run", "eval_cra")
    assert list(measured) == [2, 4, 6] and measured[6] == tuned.results["cra_after"]
    tune(tmp_path / "never", replace(SHORT, max_steps=2))
    assert not read_metrics(tmp_path / "never", "eval_cra")


@pytest.mark.slow
def test_the_learning_rate_rises_for_the_steps_of_the_warm_up(tmp_path: Path) -> None:
    peaks = {}
    for warmup_steps in (1, 4):
        output = tmp_path / str(warmup_steps)
        tune(output, replace(SHORT, warmup_steps=warmup_steps))
        rates = read_metrics(output, "learning_rate")
        peaks[warmup_steps] = max(rates, key=rates.__getitem__)
        assert rates[peaks[warmup_steps]] == SHORT.learning_rate
    # Versions of transformers log a step's own rate, or that of the next.
    assert peaks[4] - peaks[1] == 3


@pytest.mark.slow
def test_a_run_of_any_length_warms_up_for_a_tenth_of_it_at_most_and_reaches_its_peak(
    tmp_path: Path,
) -> None:
    """By default; recorded schedules, all given as numbers of steps, stay what they were."""
    usual = FinetuneConfig().warmup_steps
    assert usual == AlignConfig().warmup_steps
    for num_steps in (1, 9, 10, 20, 300, 3000):
        assert count_warmup_steps(usual, num_steps) <= num_steps / 10
    assert count_warmup_steps(20, 300) == 20
    tune(tmp_path / "run", replace(SHORT, warmup_steps=usual, max_steps=20))
    assert max(read_metrics(tmp_path / "run", "learning_rate").values()) == SHORT.learning_rate
    record = json.loads((tmp_path / "run" / "run.json").read_text())["inputs"]
    assert record["schedule"] == {"steps": 20, "warmup_steps": 2}
