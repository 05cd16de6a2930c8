"""Every option of stage 3 does what it says: laws that an unused option would break."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from aligning import SHORT_RUN, Prepared, Run, read_losses, weights_of
from torch import Tensor

from modeling_llm2clip import LLM2CLIPModel
from modeling_llm2clip.configs.align_config import AlignConfig
from modeling_llm2clip.model_folders.model_writing import save_model
from modeling_llm2clip.processing_llm2clip import LLM2CLIPProcessor
from modeling_llm2clip.training.alignment.alignment_data import AlignmentDataset
from modeling_llm2clip.training.alignment.alignment_model import (
    AlignmentModel,
    choose_trained_parts,
)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_a_ratio_of_zero_or_one_is_as_if_there_were_only_short_or_long_captions(
    prepared: Prepared, ratio: float
) -> None:
    def drop_others(record: Any) -> Any:
        if ratio:
            return replace(record, captions=() if record.long_captions else record.captions)
        return replace(record, long_captions=())

    alone = [drop_others(record) for record in prepared.records]
    processor = LLM2CLIPProcessor.from_pretrained(prepared.model)
    samples = np.array([(epoch, item) for epoch in range(3) for item in range(len(alone))])
    both, others = (
        AlignmentDataset(records, processor, AlignConfig(long_caption_ratio=chosen))
        for records, chosen in ((prepared.records, ratio), (alone, 0.5))
    )
    assert torch.equal(*(part.__getitems__(samples)["input_ids"] for part in (both, others)))


@pytest.fixture(scope="module")
def plain(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """How far one step moves the weights, with every other option as it is."""
    return change_by_one_step(prepared, tmp_path_factory.mktemp("plain") / "run")


def change_by_one_step(prepared: Prepared, output: Path, **changed: Any) -> dict[str, Tensor]:
    """How far one step moves the weights, without weight decay unless asked for."""
    run = prepared.align(output, **{"max_steps": 1, "weight_decay": 0.0, **changed})
    before = weights_of(prepared.model)
    return {name: value - before[name] for name, value in weights_of(run.model).items()}


@pytest.mark.slow
def test_a_gradient_is_clipped_to_the_length_asked_for(
    prepared: Prepared, plain: dict[str, Tensor], tmp_path: Path
) -> None:
    name, rate = "text_projection.weight", SHORT_RUN["learning_rate"]
    clipped = change_by_one_step(prepared, tmp_path / "run", max_grad_norm=1e-12)[name].abs()
    # Adam's first step is the rate, unless the gradient is small beside its epsilon of 1e-8.
    assert plain[name].abs().median() == pytest.approx(rate, rel=1e-2)
    assert clipped.max() < rate * 1e-3


@pytest.mark.slow
def test_weight_decay_takes_its_share_of_matrices(
    prepared: Prepared, plain: dict[str, Tensor], tmp_path: Path
) -> None:
    with_decay = change_by_one_step(prepared, tmp_path / "run", weight_decay=0.5)
    before = weights_of(prepared.model)
    for name, share in (("text_projection.weight", 0.5), ("visual_projection.bias", 0.0)):
        expected = plain[name] - SHORT_RUN["learning_rate"] * share * before[name]
        # Differences of float32 numbers of about one.
        torch.testing.assert_close(with_decay[name], expected, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_a_lora_has_the_rank_and_weighs_the_alpha_asked_for(
    prepared: Prepared, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    changes, parameters = {}, {}
    for rank, alpha in ((4, 8), (4, 16), (8, 8)):
        output = tmp_path / f"{rank}-{alpha}"
        changes[rank, alpha] = change_by_one_step(
            prepared, output, vision_training="lora", vision_lora_rank=rank,
            vision_lora_alpha=alpha, text_training="lora", lora_rank=rank, lora_alpha=alpha,
        )  # fmt: skip
        parameters[rank, alpha] = json.loads((output / "run.json").read_text())["parameters"]
    for tower in ("vision", "text"):
        sizes = {key: table[f"{tower}_model"]["trainable"] for key, table in parameters.items()}
        assert sizes[8, 8] == 2 * sizes[4, 8] > 0
        end = "layers.0.self_attn.q_proj.weight"
        (name,) = [n for n in changes[4, 8] if n.startswith(tower) and n.endswith(end)]
        # Adam's first step of B, which starts at zero, is the rate whatever alpha, which weighs it.
        ratio = changes[4, 16][name] / changes[4, 8][name]
        assert ratio.median() == pytest.approx(2, rel=1e-2)


@pytest.mark.parametrize("trained", ["neither", "vision", "text"])
def test_a_tower_that_is_not_trained_stays_in_evaluation_mode(
    prepared: Prepared, trained: str
) -> None:
    model = AlignmentModel.from_pretrained(prepared.model, with_llm=True)
    options = {} if trained == "neither" else {f"{trained}_training": "lora"}
    choose_trained_parts(model, AlignConfig(**options))
    model.train()
    assert model.text_adapter.training
    for name, tower in (("vision", model.vision_model), ("text", model.text_model)):
        assert any(module.training for module in tower.modules()) == (name == trained)
    model.eval()
    assert not any(module.training for module in model.modules())


@pytest.mark.slow
def test_gradient_checkpointing_saves_memory_and_moves_no_loss(
    prepared: Prepared, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"vision_training": "full", "gradient_checkpointing": True}
    model = AlignmentModel.from_pretrained(prepared.model)
    choose_trained_parts(model, AlignConfig(**options))
    assert any(getattr(m, "gradient_checkpointing", False) for m in model.vision_model.modules())
    prepared.align(tmp_path / "saving", max_steps=2, **options)
    prepared.align(tmp_path / "plain", max_steps=2, vision_training="full")
    assert read_losses(tmp_path / "saving") == read_losses(tmp_path / "plain")


@pytest.mark.slow
def test_the_learning_rate_rises_for_the_steps_of_the_warm_up(
    prepared: Prepared, finished: Run, tmp_path: Path
) -> None:
    peaks = []
    for run in (finished, prepared.align(tmp_path / "run", warmup_steps=4)):
        lines = (run.output / "metrics.jsonl").read_text().splitlines()
        rates = [line["learning_rate"] for line in map(json.loads, lines) if "loss" in line]
        peaks.append(rates.index(max(rates)))
        assert max(rates) == SHORT_RUN["learning_rate"]
    assert peaks[1] - peaks[0] == 3  # without a warm-up the first step has the whole rate


@pytest.mark.slow
@pytest.mark.parametrize(
    "training",
    [
        {"text_training": "frozen-online"},
        {"text_training": "lora", "vision_training": "lora"},
    ],
)
def test_float32_computes_a_folder_in_half_precision_in_float32(
    prepared: Prepared, tmp_path: Path, training: dict[str, str]
) -> None:
    model = LLM2CLIPModel.from_pretrained(prepared.model, dtype=torch.bfloat16)
    processor = LLM2CLIPProcessor.from_pretrained(prepared.model)
    half = save_model(model, processor, tmp_path / "half")
    exact = LLM2CLIPModel.from_pretrained(half).float()
    losses = []
    for folder in (half, save_model(exact, processor, tmp_path / "exact")):
        run = replace(prepared, model=folder).align(
            tmp_path / f"{folder.name}-run", precision="float32", max_steps=2, **training
        )
        losses.append(read_losses(run.output))
        dtypes = [LLM2CLIPModel.from_pretrained(path).dtype for path in (folder, run.model)]
        assert dtypes[0] == dtypes[1]
    assert losses[0] == losses[1]
