"""Stage 1 refuses invalid data, options, folders and initial LoRAs before loading the LLM."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from aligning import KillAtBegin
from packaging.version import Version
from safetensors import safe_open
from tiny import tiny_model, tiny_tokenizer, tiny_vision
from transformers import AutoConfig, AutoModel
from transformers import __version__ as transformers_version
from tuning import FLAGS, RECORDS, SHORT, Tuned, hold_out_short, tune, write_captions, write_pairs

from modeling_llm2clip.__main__ import main
from modeling_llm2clip.building.build_model import join_towers
from modeling_llm2clip.configs.build_config import BuildConfig
from modeling_llm2clip.configs.export_config import ExportConfig
from modeling_llm2clip.data.captions.text_pairs import TextPair
from modeling_llm2clip.model_folders.fingerprint import fingerprint_text
from modeling_llm2clip.model_folders.model_writing import save_model
from modeling_llm2clip.modeling_llm2clip import LLM2CLIPTextModel
from modeling_llm2clip.publishing.export_model import export_model
from modeling_llm2clip.training.finetuning import finetune_llm as stage
from modeling_llm2clip.training.finetuning.finetune_llm import finetune_llm
from modeling_llm2clip.training.finetuning.finetune_trainer import (
    FinetuneTrainer,
    make_lora_config,
    require_same_meaning,
)
from modeling_llm2clip.training.run_folder import find_last_checkpoint


def test_options_that_do_not_fit_the_data_are_refused(tmp_path):
    pairs = [TextPair("q", "q", group.captions[0]) for group in hold_out_short()]
    file = write_pairs(tmp_path / "pairs.jsonl", pairs)
    for options, error in (
        ({"per_device_train_batch_size": 64}, r"Too few different images \(20\) for a batch of 64"),
        ({"warmup_steps": 6}, r"warmup_steps=6 is too many for a run of 6.*max_steps"),
        ({"text_pairs": [(file, 1.0)]}, r"pairs .*\.jsonl: all 4 pairs contain a held-out caption"),
    ):
        config = replace(SHORT, **options)
        with pytest.raises(ValueError, match=error):
            tune(tmp_path / "run", config)
        with pytest.raises(ValueError, match=error):
            stage.check_finetuning(RECORDS, config)
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_non_finite_gradient_stops_before_the_step(tmp_path, monkeypatch):
    step = FinetuneTrainer.training_step

    def break_third_gradient(self, *args, **kwargs):
        loss = step(self, *args, **kwargs)
        if self.state.global_step == 2:
            trained = [p for p in self.encoder.parameters() if p.requires_grad]
            trained[0].grad[0, 0] = math.inf
        return loss

    monkeypatch.setattr(FinetuneTrainer, "training_step", break_third_gradient)
    with pytest.raises(FloatingPointError, match="gradient norm is inf at step 2"):
        tune(tmp_path / "run")
    assert not (tmp_path / "run" / "lora").exists()


@pytest.mark.slow
def test_non_finite_weights_are_in_no_checkpoint(tmp_path):
    # The gradient is finite, but the learning rate overflows in Adam's first step.
    with pytest.raises(FloatingPointError, match="weights are not finite after step 1"):
        tune(tmp_path / "run", replace(SHORT, learning_rate=1e38, warmup_steps=0, max_steps=1))
    assert find_last_checkpoint(tmp_path / "run") is None


def test_the_command_refuses_before_it_loads_the_llm(tmp_path, capsys, monkeypatch):
    data = write_captions(tmp_path / "data" / "captions.jsonl")
    monkeypatch.setattr(
        LLM2CLIPTextModel, "from_pretrained", lambda *_, **__: pytest.fail("the LLM was loaded")
    )
    model = tmp_path / "model"
    model.mkdir()
    tiny_model()[0].config.save_pretrained(model)
    command = ["finetune-llm", "--no-merge", str(model), str(data)]
    assert main([*command, str(tmp_path / "new"), "--per-device-train-batch-size", "1000"]) == 2
    assert "1000" in capsys.readouterr().err
    assert main([*command, str(data.parent), "--per-device-train-batch-size", "4"]) == 2
    assert "is not empty and has no run.json" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_fsdp_is_refused_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="Training a LoRA under FSDP"):
        tune(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_text_pairs_without_a_valid_weight_are_refused(tmp_path: Path, capsys: Any) -> None:
    for weight, message in (
        ("0", "Input should be greater than 0"), ("nan", "Input should be greater than 0"),
        ("inf", "finite"), ("much", 'unable to convert "much" into float'),
    ):  # fmt: skip
        flags = ["--text-pairs", "pairs.jsonl", weight]
        assert main(["finetune-llm", "a-model", "no-data", str(tmp_path / "run"), *flags]) == 2
        shown = capsys.readouterr().err
        assert re.search("--text-pairs|text_pairs", shown) and message in shown


@pytest.mark.slow
def test_a_text_only_model_is_refused_before_it_is_trained_to_be_merged(tmp_path, monkeypatch):
    whole = save_model(*tiny_model(), tmp_path / "whole")
    text_only = export_model(whole, tmp_path / "text", ExportConfig(components="text"))
    with monkeypatch.context() as patch:
        patch.setattr(stage, "_prepare", lambda *_, **__: pytest.fail("the run was planned"))
        with pytest.raises(ValueError, match=r"LLM2CLIPTextModel.*merging needs a whole"):
            finetune_llm(text_only, RECORDS, tmp_path / "run", replace(SHORT, merge=True))
    # Without merging, training starts, and the test stops it.
    with pytest.raises(KeyboardInterrupt):
        finetune_llm(text_only, RECORDS, tmp_path / "run", SHORT, callbacks=[KillAtBegin()])


@pytest.mark.slow
def test_a_lora_that_the_llm_bypasses_is_refused_by_name(tmp_path):
    """Jamba multiplies by the weight of its `dt_proj` without running the layer."""
    if Version(transformers_version) < Version("5.24"):
        pytest.skip("transformers 5.6 runs the layer; versions between were not tried")
    tokenizer = tiny_tokenizer()
    config = AutoConfig.for_model(
        "jamba", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=len(tokenizer), num_experts=1, num_experts_per_tok=1,
        attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    llm = AutoModel.from_config(config).float().eval()
    options = BuildConfig(bidirectional=False, prompt="llama-3", max_text_length=32)
    pair = join_towers(tiny_vision(), (llm, tokenizer), options)
    with pytest.raises(
        ValueError, match=r"=all-linear: 1 layer .*layers\.0\.mamba\.dt_proj\. List"
    ):
        finetune_llm(pair, RECORDS, tmp_path / "run", SHORT)
    assert not (tmp_path / "run" / "run.json").exists()
    others = replace(SHORT, lora_target_modules=("in_proj", "x_proj", "q_proj"))
    with pytest.raises(KeyboardInterrupt):
        finetune_llm(pair, RECORDS, tmp_path / "others", others, callbacks=[KillAtBegin()])


def edit_config(lora: Path, copy: Path, **changed: Any) -> Path:
    shutil.copytree(lora, copy)
    file = copy / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    return copy


def test_a_lora_with_another_meaning_is_refused(tuned: Tuned, tmp_path: Path) -> None:
    other = replace(SHORT, lora_rank=8, init_lora=tuned.lora)
    with pytest.raises(ValueError, match=r"r=16 instead of 8; lora_alpha=32 instead of 16"):
        tune(tmp_path / "run", other)
    with pytest.raises(ValueError, match=r"nothing has no adapter_config\.json\. Choose a LoRA"):
        tune(tmp_path / "run", replace(SHORT, init_lora=tmp_path / "nothing"))
    assert not (tmp_path / "run").exists()
    for name, value in {
        "use_rslora": True, "use_dora": True, "rank_pattern": {"q_proj": 4},
        "alpha_pattern": {"q_proj": 64}, "bias": "all", "modules_to_save": ["norm"],
        "init_lora_weights": "pissa",
    }.items():  # fmt: skip
        lora = edit_config(tuned.lora, tmp_path / name / "lora", **{name: value})
        with pytest.raises(ValueError, match=rf"does not match this run: {name}="):
            require_same_meaning(lora, make_lora_config(SHORT))


@pytest.mark.slow
def test_a_lora_of_another_base_is_refused(tuned: Tuned, tmp_path: Path) -> None:
    other = edit_config(tuned.lora, tmp_path / "lora", base_model_name_or_path="someone/Other-LLM")
    config = replace(SHORT, init_lora=other)
    model, processor = tiny_model()
    model.text_model.config._name_or_path = "owner/tiny-llm"
    with pytest.raises(ValueError, match=r"base 'someone/Other-LLM', but the LLM is 'owner/tiny"):
        finetune_llm((model, processor), RECORDS, tmp_path / "run", config)
    model.text_model.config._name_or_path = "a-mirror/other-llm"  # as for merging
    with pytest.raises(KeyboardInterrupt):
        finetune_llm(
            (model, processor), RECORDS, tmp_path / "other", config, callbacks=[KillAtBegin()]
        )


@pytest.mark.slow
def test_a_model_with_a_merged_lora_cannot_start_from_that_lora_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_model(*tiny_model(), tmp_path / "base")
    data = write_captions(tmp_path / "captions.jsonl")
    first = tmp_path / "first"
    assert main(["finetune-llm", str(folder), str(data), str(first), *FLAGS]) == 0
    with safe_open(first / "lora" / "adapter_model.safetensors", framework="pt") as opened:
        assert opened.metadata()["base_weights"] == fingerprint_text(folder)["weights"]
    flags = [*FLAGS, "--init-lora", str(first / "lora"), "--no-merge"]
    command = ["finetune-llm", str(first / "model"), str(data), str(tmp_path / "twice"), *flags]
    assert main(command) == 2
    assert "trained on an LLM with other weights" in capsys.readouterr().err
    assert not (tmp_path / "twice").exists()
    assert main(["finetune-llm", str(folder), str(data), str(tmp_path / "second"), *flags]) == 0
