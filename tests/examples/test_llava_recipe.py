"""The two steps of the LLaVA scripts on tiny parts: what is trained, resuming."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pretrain_projector
import pytest
import torch
import tune_instructions
from aligning import read_losses
from launches import run_python
from llava_conversations import Conversation, conversations_of_captions, read_conversations
from llava_model import build_llava, load_llava, train_projector_and_llm, train_projector_only
from llava_parts import RECIPE, build, make_entry
from llava_trainer import LlavaConfig, LlavaTrainer, make_training_arguments, train_llava
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from modeling_llm2clip.data.records.record_loading import load_records

pytestmark = pytest.mark.slow

SHORT = LlavaConfig(
    max_steps=4,
    global_batch_size=4,
    learning_rate=1e-2,
    logging_steps=1,
    save_steps=2,
    device="cpu",
    max_length=128,
)


def run_step(
    parts: Path, output: Path, *, wording: str = "plain", resume: bool = False,
    config: LlavaConfig = SHORT, thaw: Callable[[Any], Any] = train_projector_only,
) -> Path:  # fmt: skip
    """Run a step in this process; returns the folder of its model."""

    def load_model() -> tuple[Any, Any]:
        model, processor = build(parts)
        return thaw(model) or model, processor

    if wording == "plain":
        conversations = conversations_of_captions(load_records(parts / "data"))
    else:
        conversations, _ = read_conversations(parts / "instructions.json", parts / "data")
    folder = train_llava(
        load_model, conversations, output, config, wording=wording, record={}, resume=resume
    )
    assert folder == output / "model"
    return output / "model"


@pytest.fixture(scope="module")
def whole(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the projector that nothing disturbed."""
    return run_step(parts, tmp_path_factory.mktemp("whole")).parent


@pytest.fixture(scope="module")
def whole_lora(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of a LoRA that nothing disturbed."""
    return run_step(parts, tmp_path_factory.mktemp("lora"), wording="chat", thaw=lora).parent


def lora(model: Any) -> Any:
    return train_projector_and_llm(model, rank=2, alpha=4)


def changed_parts(parts: Path, folder: Path) -> set[str]:
    """Names of the parts of a written model that are not what they were at the start."""
    torch.manual_seed(SHORT.seed)
    before = build(parts)[0].state_dict()
    after = load_llava(folder)[0].state_dict()
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    return {name.split(".")[1] if name.startswith("model.") else name for name in changed}


# The model


def test_the_tower_and_the_llm_are_joined_unchanged(parts: Path) -> None:
    model, _ = build(parts)
    llm = AutoModelForCausalLM.from_pretrained(parts / "llm")
    old = llm.get_input_embeddings().num_embeddings
    for name, weight in llm.model.state_dict().items():
        assert torch.equal(model.model.language_model.state_dict()[name][:old], weight), name
    table = model.get_input_embeddings().weight
    assert len(table) == old + 1 and torch.equal(table[old], table[:old].mean(dim=0))
    assert torch.equal(model.lm_head.weight[:old], llm.lm_head.weight)


def test_an_llm_that_is_bidirectional_is_refused(parts: Path, tmp_path: Path) -> None:
    llm = AutoModelForCausalLM.from_pretrained(parts / "llm")
    llm.config.is_causal = False
    llm.save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(parts / "llm").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="bidirectional"):
        build_llava(parts / "tower", tmp_path)


def test_a_frozen_tower_evaluates_while_the_rest_trains(parts: Path) -> None:
    model, _ = build(parts)
    train_projector_only(model)
    model.train()
    with torch.no_grad():
        model.get_image_features(pixel_values=torch.zeros(1, 3, 32, 32))
    assert model.model.multi_modal_projector.training
    assert not any(module.training for module in model.model.vision_tower.modules())


# The training


def test_step_one_changes_the_projector_alone_and_learns(parts: Path, tmp_path: Path) -> None:
    folder = run_step(parts, tmp_path, config=replace(SHORT, max_steps=12))
    assert changed_parts(parts, folder) == {"multi_modal_projector"}
    losses = list(read_losses(tmp_path).values())
    assert sum(losses[-3:]) < sum(losses[:3])
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    inputs = AutoProcessor.from_pretrained(folder)(
        images=[str(parts / "data" / "00.jpg")], text=["<image>"], return_tensors="pt"
    )
    assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]


def test_the_rate_rises_for_three_percent_of_the_steps_but_not_for_all(tmp_path: Path) -> None:
    words = [Conversation(str(n), None, (("Hi", "yes"),)) for n in range(4)]
    for steps, warm_up in ((1, 0), (2, 1), (33, 1), (34, 2), (100, 3)):
        settings = make_training_arguments(tmp_path, replace(SHORT, max_steps=steps), words)
        assert (settings.max_steps, settings.warmup_steps) == (steps, warm_up)


def test_step_two_changes_projector_and_llm_but_not_the_tower(parts: Path, tmp_path: Path) -> None:
    folder = run_step(parts, tmp_path, wording="chat", thaw=train_projector_and_llm)
    assert changed_parts(parts, folder) == {
        "multi_modal_projector", "language_model", "lm_head.weight",
    }  # fmt: skip


def test_a_lora_is_merged_into_a_plain_model(parts: Path, whole_lora: Path) -> None:
    # The head and the embeddings are not adapted.
    changed = changed_parts(parts, whole_lora / "model")
    assert changed == {"multi_modal_projector", "language_model"}
    run = json.loads((whole_lora / "run.json").read_text(encoding="utf-8"))
    trainable = run["parameters"]["all"]["trainable"]
    assert 0 < trainable < run["parameters"]["all"]["total"] / 4


@pytest.mark.parametrize("way", ["projector", "lora"])
def test_killed_and_resumed_equals_never_killed(
    way: str, parts: Path, whole: Path, whole_lora: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Killed between two checkpoints, and again while the model is written."""
    undisturbed, options = whole, dict[str, Any]()
    if way == "lora":
        undisturbed, options = whole_lora, {"wording": "chat", "thaw": lora}
    step = LlavaTrainer.training_step

    def die_in_step(self: LlavaTrainer, *arguments: Any, **settings: Any) -> Tensor:
        if self.state.global_step == 3:  # a step after the checkpoint
            raise RuntimeError("killed")
        return step(self, *arguments, **settings)

    def die(*_: Any, **__: Any) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="killed"):
        patched.setattr(LlavaTrainer, "training_step", die_in_step)
        run_step(parts, tmp_path, **options)
    with pytest.raises(ValueError, match="--resume"):
        run_step(parts, tmp_path, **options)
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="killed"):
        patched.setattr(LlavaProcessor, "save_pretrained", die)  # after the weights
        run_step(parts, tmp_path, resume=True, **options)
    assert not (tmp_path / "model").exists()
    left = tmp_path / ".model-12345678"  # as a kill leaves it, when nothing is caught
    left.mkdir()
    (left / ".llm2clip-is-writing").write_text("model", encoding="utf-8")
    resumed = run_step(parts, tmp_path, resume=True, **options)
    assert not left.exists()
    assert read_losses(tmp_path) == read_losses(undisturbed)
    assert len(read_losses(tmp_path)) == SHORT.max_steps
    ours, theirs = (load_llava(f)[0].state_dict() for f in (resumed, undisturbed / "model"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_epoch_has_as_many_steps_however_many_a_device_takes_at_a_time(
    parts: Path, tmp_path: Path
) -> None:
    # 35 captions: a batch of 16 twice, and 3 that fill none.
    twice = replace(SHORT, max_steps=None, num_train_epochs=2, global_batch_size=16)
    run_step(parts, tmp_path / "whole", config=twice)
    run_step(parts, tmp_path / "parts", config=replace(twice, per_device_train_batch_size=4))
    ours, theirs = (read_losses(tmp_path / name) for name in ("whole", "parts"))
    assert len(ours) == 4
    # Answers of unequal length weigh by their tokens; float32 sums in another order.
    assert list(theirs.values()) == pytest.approx(list(ours.values()), rel=1e-4)


def test_conversations_without_images_train_too_and_a_question_too_long_is_left_out_and_recorded(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [Conversation(str(n), None, (("Hi", "yes"),)) for n in range(11)]
    words.append(Conversation("long", None, (("Hi " * 200, "yes"),)))

    def run(output: Path, *, resume: bool = False, **changed: Any) -> Path:
        def load_model() -> tuple[Any, Any]:
            model, processor = build(parts)
            return train_projector_and_llm(model), processor

        return train_llava(
            load_model, words, output, replace(SHORT, max_steps=None, **changed), wording="chat",
            record={}, skip_invalid=True, resume=resume,
        )  # fmt: skip

    assert run(tmp_path / "run").is_dir()
    skipped = {"no answer within 128 tokens": 1}
    assert f"what its tokens showed: {skipped}." in capsys.readouterr().out
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert record["results"]["skipped_by_tokens"] == skipped
    assert len(read_losses(tmp_path / "run")) == 2  # batches of 4 in the 11 that are left
    (tmp_path / "run" / "model").rename(tmp_path / "first")
    assert run(tmp_path / "run", resume=True).is_dir()
    kept, words[0] = words[0], Conversation("0", None, (("Hi", "no"),))
    with pytest.raises(ValueError, match="contains another run: conversations: "):
        run(tmp_path / "run", resume=True)
    words[0] = kept
    with pytest.raises(ValueError, match="11 conversations are too few for a batch of 12"):
        run(tmp_path / "few", global_batch_size=12)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="cannot be trained on under FSDP"):
        run(tmp_path / "sharded")


def test_bad_options_are_reported_together_and_before_a_model_is_loaded(parts: Path) -> None:
    with pytest.raises(ValueError, match=r"global_batch_size=0.*learning_rate=0"):
        LlavaConfig(learning_rate=0, global_batch_size=0)

    def load_model() -> tuple[Any, Any]:
        raise AssertionError("loaded")

    words = [Conversation("c", None, (("Hi", "yes"),))]
    config = replace(SHORT, global_batch_size=3, per_device_train_batch_size=2)
    with pytest.raises(ValueError, match="cannot be shared by 1 processes"):
        train_llava(load_model, words, parts / "none", config, wording="chat", record={})
    assert not (parts / "none").exists()


def test_a_lora_without_rank_or_scale_is_refused_before_anything_is_read(
    parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = build(parts)
    for rank, alpha, named in (
        (0, 16, "rank=0"), (4, 0, "alpha=0"), (4, -3, "alpha=-3"), (-1, 0, "rank=-1 and alpha=0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"A LoRA of {named}, wanted at least 1"):
            train_projector_and_llm(model, rank=rank, alpha=alpha)
    absent = [str(parts / name) for name in ("no-model", "no-data", "no-images", "run")]
    monkeypatch.setattr(sys, "argv", ["tune_instructions.py", *absent, "--lora-rank", "0"])
    with pytest.raises(ValueError, match="A LoRA of rank=0, wanted at least 1"):
        tune_instructions.main()


FLAGS = ("--device", "cpu", "--logging-steps", "1", "--learning-rate", "1e-2")


def test_both_scripts_run_as_they_stand_and_two_processes_equal_one(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--global-batch-size", "4", *FLAGS)
    pretrain = (parts / "tower", parts / "llm", parts / "data", tmp_path / "projector")
    template = ("--chat-template", RECIPE / "vicuna.jinja")
    words = ["pretrain_projector.py", *pretrain, *template, "--max-steps", "1", *flags]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    assert pretrain_projector.main() == 0
    assert capsys.readouterr().out.count("Wrote ") == 1
    long = make_entry(0)
    long["conversations"][0]["value"] += "word " * 3000
    entries = [make_entry(number) for number in range(12)]
    file = tmp_path / "long.json"
    file.write_text(json.dumps([*entries, long]), encoding="utf-8")

    def tune(output: str) -> list[str]:
        folders = (tmp_path / "projector" / "model", file, parts / "data", tmp_path / output)
        skipping = ("--skip-text-only", "--skip-invalid", "--max-steps", "3")
        return ["tune_instructions.py", *map(str, folders), *skipping, *flags]

    monkeypatch.setattr(sys, "argv", tune("one"))
    assert tune_instructions.main() == 0
    script, *arguments = tune("two")
    for printed in (capsys.readouterr().out, run_python(RECIPE / script, *arguments, processes=2)):
        assert printed.count("Wrote ") == 1
        assert printed.count("showed: {'no answer within 2048 tokens': 1}.") == 1
    ours, theirs = (list(read_losses(tmp_path / name).values()) for name in ("one", "two"))
    assert len(ours) == 3
    # The same answers, shared in another way: float32 sums in another order.
    assert theirs == pytest.approx(ours, rel=1e-4)
    assert (tmp_path / "two" / "model" / "config.json").is_file()
