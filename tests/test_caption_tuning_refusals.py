"""Stage 1, what is refused before anything runs, and what is not finite stops a run."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from tuning import GROUPS, SHORT, tune

from modeling_llm2clip.__main__ import main
from modeling_llm2clip.modeling_llm2clip import LLM2CLIPTextModel
from modeling_llm2clip.training import caption_contrastive as stage
from modeling_llm2clip.training.caption_contrastive import NEGATIVES
from modeling_llm2clip.training.checkpoints import find_last_checkpoint


def test_too_few_pictures_for_a_batch_are_refused_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match="20 different pictures are too few for a batch of 64"):
        tune(tmp_path / "run", replace(SHORT, batch_size=64))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (
            {"pairings": 0, "held_out": 0},
            "pairings=0, wanted at least 1; held_out=0|held_out=0.*pai",
        ),
        ({"adapter_dtype": "fp16"}, "adapter_dtype='fp16', wanted one of"),
        ({"lr": 0.0}, "lr=0.0, wanted more than 0"),
        ({"lr": math.inf, "scale": math.nan}, "lr=inf, wanted a finite number; scale=nan"),
    ],
)
def test_bad_settings_are_refused_before_anything_runs(settings, fault):
    with pytest.raises(ValueError, match=fault):
        replace(SHORT, **settings)


def test_a_gradient_that_is_not_finite_stops_before_the_step(tmp_path, monkeypatch):
    step = stage._Trainer.training_step

    def break_third_gradient(self, *args, **kwargs):
        loss = step(self, *args, **kwargs)
        if self.state.global_step == 2:
            trained = [p for p in self.encoder.parameters() if p.requires_grad]
            trained[0].grad[0, 0] = math.inf
        return loss

    monkeypatch.setattr(stage._Trainer, "training_step", break_third_gradient)
    with pytest.raises(FloatingPointError, match="gradient's norm is inf at step 2"):
        tune(tmp_path / "run")
    assert not (tmp_path / "run" / "adapter").exists()


def test_weights_that_are_not_finite_are_in_no_checkpoint(tmp_path):
    # A finite gradient, times a rate that float32 cannot hold in Adam's first step.
    with pytest.raises(FloatingPointError, match="weights are not finite after step 1"):
        tune(tmp_path / "run", replace(SHORT, lr=1e38, warmup_steps=0, steps=1))
    assert find_last_checkpoint(tmp_path / "run") is None


def test_the_command_refuses_folder_and_batch_before_it_loads_the_llm(
    tmp_path, capsys, monkeypatch
):
    data = tmp_path / "data" / "captions.jsonl"
    data.parent.mkdir()
    data.write_text("\n".join(json.dumps({"key": g.key, "captions": g.captions}) for g in GROUPS))
    monkeypatch.setattr(
        LLM2CLIPTextModel, "from_pretrained", lambda *_, **__: pytest.fail("the LLM was loaded")
    )
    command = ["tune-captions", "a-model", str(data)]
    assert main([*command, str(tmp_path / "new"), "--batch-size", "1000"]) == 2
    assert "1000" in capsys.readouterr().err
    assert main([*command, str(data.parent), "--batch-size", "4"]) == 2
    assert "is not empty and holds no run.json" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_every_choice_of_negatives_is_known():
    assert set(NEGATIVES) == {"one-way", "both-ways", "all-captions"}
    with pytest.raises(ValueError, match="all-captions"):
        replace(SHORT, negatives="none")
