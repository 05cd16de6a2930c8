"""Stage 3: every option does what it says, and losses are the same from stores and towers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from aligning import (
    SHORT_RUN,
    EndAfter,
    Prepared,
    Run,
    command_of,
    names_that_differ,
    prepare,
    read_losses,
    read_metrics,
    read_tensorboard_losses,
    weights_of,
)
from gloo_workers import find_free_port
from torchvision.transforms import Compose, RandomResizedCrop
from transformers import TrainerCallback

from modeling_llm2clip import LLM2CLIPModel
from modeling_llm2clip.__main__ import main
from modeling_llm2clip.configs.align_config import AlignConfig
from modeling_llm2clip.doctor.check_model import check_model
from modeling_llm2clip.model_folders.model_writing import save_model
from modeling_llm2clip.training.alignment.align import align, plan_align
from modeling_llm2clip.training.alignment.alignment_data import make_random_crop
from modeling_llm2clip.training.alignment.alignment_model import (
    AlignmentModel,
    choose_trained_parts,
)
from modeling_llm2clip.training.alignment.sampling import draw_samples
from modeling_llm2clip.training.losses.loss import LossInputs


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_a_ratio_of_0_or_1_shows_one_kind_of_captions(prepared: Prepared, ratio: float) -> None:
    def drop_others(record: Any) -> Any:
        if ratio:
            return replace(record, captions=() if record.long_captions else record.captions)
        return replace(record, long_captions=())

    alone = [drop_others(record) for record in prepared.records]
    samples = draw_samples(np.tile(np.arange(len(alone)), 3), 0, seed=0)
    both = prepared.dataset(long_caption_ratio=ratio)
    others = prepared.dataset(alone, long_caption_ratio=0.5)
    assert torch.equal(*(part.__getitems__(samples)["input_ids"] for part in (both, others)))


def test_training_images_are_cropped_as_their_batch_determines(prepared: Prepared) -> None:
    whole = prepared.dataset()
    cropped = replace(
        whole, data=prepared.records, image_transform=make_random_crop(prepared.processor, 0.5)
    )
    first, second = (draw_samples(np.arange(6), step, seed=0) for step in (0, 1))
    state = torch.get_rng_state()
    pixels, again, later = (
        cropped.__getitems__(samples)["pixel_values"] for samples in (first, first, second)
    )
    assert torch.equal(torch.get_rng_state(), state)  # others draw from it, such as dropout
    assert torch.equal(pixels, again) and not torch.equal(pixels, later)
    assert not torch.equal(pixels, whole.__getitems__(first)["pixel_values"])
    # Held-out images are read without a seed.
    pairs = [part.read_pairs(np.arange(6), np.zeros(6, np.int64)) for part in (cropped, whole)]
    assert torch.equal(*(part["pixel_values"] for part in pairs))


def test_an_image_transform_is_refused_with_an_image_store(
    prepared: Prepared, tmp_path: Path
) -> None:
    for options, passed in ((0.9, None), (None, lambda image: image)):
        with pytest.raises(ValueError, match="cannot be combined with an image_store"):
            align(
                prepared.model, prepared.records, tmp_path / "run",
                AlignConfig(min_crop_area=options), caption_store=prepared.captions,
                image_store=prepared.images, image_transform=passed,
            )  # fmt: skip


def crop(smallest: float) -> Any:
    return RandomResizedCrop(32, (smallest, 1.0))


def convert_and_crop(smallest: float) -> Any:
    def convert(image: Any) -> Any:  # at another address in every call
        return image.convert("RGB")

    return Compose([convert, crop(smallest)])


@pytest.mark.parametrize("make", [crop, convert_and_crop])
def test_a_resume_with_another_image_transform_is_refused(
    make: Callable[[float], Any], prepared: Prepared, tmp_path: Path
) -> None:
    def run(smallest: float, **options: Any) -> None:
        align(
            prepared.model, prepared.records, tmp_path / "run", AlignConfig(**SHORT_RUN),
            caption_store=prepared.captions,
            image_transform=make(smallest), **options,
        )  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        run(0.9, callbacks=[EndAfter(2)])
    with pytest.raises(ValueError, match="another run"):
        run(0.1, resume=True)
    run(0.9, resume=True)


class Cropping:
    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, image: Any) -> Any:
        return image


@pytest.mark.parametrize(
    "passed",
    [Cropping(0.5), Cropping(0.5).__call__, partial(Cropping(0.5)), Compose([Cropping(0.5)])],
    ids=["object", "method", "partial", "composed"],
)
@pytest.mark.parametrize("name", ["image_transform", "optimizer"])
def test_what_hides_its_settings_is_refused_before_a_run(
    name: str, passed: Any, prepared: Prepared, tmp_path: Path
) -> None:
    """A resume could not tell whether they changed."""
    plan: Any = partial(plan_align, caption_store=prepared.captions)
    with pytest.raises(ValueError, match=rf"(?s){name}: .*Cropping.* __repr__ that names its set"):
        plan(tmp_path, **{name: passed})
    for settled in (lambda image: image, partial(torch.optim.SGD, momentum=0.9), torch.optim.SGD):
        plan(tmp_path, **{name: settled})


def test_an_option_of_adamw_is_refused_with_another_optimizer(
    prepared: Prepared, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"beta2=0\.9 is an option of AdamW, which optimizer repl"):
        plan_align(
            tmp_path, AlignConfig(beta2=0.9), caption_store=prepared.captions,
            optimizer=torch.optim.SGD,
        )  # fmt: skip


@pytest.mark.slow
def test_a_run_with_crops_and_an_optimizer_of_its_own_resumes_identically(
    prepared: Prepared, tmp_path: Path
) -> None:
    config = AlignConfig(**SHORT_RUN, vision_training="full", min_crop_area=0.5)

    def run(output: Path, **options: Any) -> None:
        align(
            prepared.model, prepared.records, output, config, caption_store=prepared.captions,
            optimizer=partial(torch.optim.SGD, momentum=0.9), **options,
        )  # fmt: skip

    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", callbacks=[EndAfter(3)])
    run(tmp_path / "run", resume=True)
    assert read_losses(tmp_path / "run") == read_losses(tmp_path / "whole")
    assert not names_that_differ(tmp_path / "run" / "model", tmp_path / "whole" / "model")
    adam = prepared.align(tmp_path / "adam", vision_training="full", min_crop_area=0.5)
    uncropped = prepared.align(tmp_path / "uncropped", vision_training="full")
    others = [read_losses(other.output) for other in (adam, uncropped)]
    assert others[0][1] == read_losses(tmp_path / "whole")[1] != others[1][1]
    assert others[0][6] != read_losses(tmp_path / "whole")[6]


def test_the_second_beta_of_adam_is_the_option(prepared: Prepared, tmp_path: Path) -> None:
    betas: list[Any] = []

    class Read(TrainerCallback):
        def on_step_end(self, *_: Any, optimizer: Any, **__: Any) -> None:
            betas.extend(group["betas"] for group in optimizer.param_groups)

    options = {**SHORT_RUN, "max_steps": 1, "beta2": 0.999}
    prepared.align_stored(tmp_path / "run", callbacks=[Read()], **options)
    assert set(betas) == {(0.9, 0.999)}


@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_tf32_is_used_forward_and_backward_if_asked_and_never_in_evaluation(
    prepared: Prepared, tmp_path: Path, precision: str
) -> None:
    seen: dict[str, set[bool]] = {"forward": set(), "backward": set(), "held out": set()}

    def is_tf32() -> bool:
        matmul: Any = torch.backends.cuda.matmul
        is_new = hasattr(matmul, "fp32_precision")
        return bool(matmul.fp32_precision == "tf32" if is_new else matmul.allow_tf32)

    def note(place: str) -> None:
        seen[place].add(is_tf32())

    def loss(inputs: LossInputs) -> torch.Tensor:
        note("forward" if inputs.image_embeds.requires_grad else "held out")
        if inputs.image_embeds.requires_grad:
            inputs.image_embeds.register_hook(lambda _: note("backward"))
        return -inputs.logits(inputs.image_embeds, inputs.text_embeds).trace()

    options = {"max_steps": 2, "held_out_ratio": 0.3, "loss_precision": precision}
    prepared.align(tmp_path / "out", loss_function=loss, **options)
    step = {precision == "tf32"}
    assert seen == {"forward": step, "backward": step, "held out": {False}}
    assert not is_tf32()


@pytest.mark.slow
def test_gradients_are_clipped(prepared: Prepared, tmp_path: Path) -> None:
    name, rate = "text_projection.weight", SHORT_RUN["learning_rate"]
    before, moved = weights_of(prepared.model)[name], []
    for norm in (1.0, 1e-12):
        options = {"max_steps": 1, "weight_decay": 0.0, "max_grad_norm": norm}
        run = prepared.align(tmp_path / f"{norm}", **options)
        moved.append((weights_of(run.model)[name] - before).abs())
    # Adam's first step is the rate, unless the gradient is small beside its epsilon of 1e-8.
    assert moved[0].median() == pytest.approx(rate, rel=1e-2)
    assert moved[1].max() < rate * 1e-3


def test_a_lora_has_the_rank_asked_for_and_the_alpha_of_its_tower(prepared: Prepared) -> None:
    """Twice the rank in the LLM, and the rank in the vision tower."""
    pytest.importorskip("peft")
    for rank, ranks in ((4, (4, 4)), (None, (32, 16))):
        model = AlignmentModel.from_pretrained(prepared.model, with_llm=True)
        config = AlignConfig(vision_training="lora", text_training="lora", lora_rank=rank)
        adapted = choose_trained_parts(model, config)
        settings = [adapted[name].peft_config["default"] for name in ("vision_model", "text_model")]
        assert tuple(setting.r for setting in settings) == ranks
        assert tuple(s.lora_alpha for s in settings) == (ranks[0], 2 * ranks[1])


@pytest.mark.parametrize("trained", ["neither", "vision", "text"])
def test_an_untrained_tower_stays_in_evaluation_mode(prepared: Prepared, trained: str) -> None:
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
def test_saving_memory_moves_no_loss(prepared: Prepared, tmp_path: Path) -> None:
    options: dict[str, Any] = {"vision_training": "full", "gradient_checkpointing": True}
    model = AlignmentModel.from_pretrained(prepared.model)
    choose_trained_parts(model, AlignConfig(**options))
    assert any(getattr(m, "gradient_checkpointing", False) for m in model.vision_model.modules())
    prepared.align(tmp_path / "saving", max_steps=2, **options)
    prepared.align(tmp_path / "plain", max_steps=2, vision_training="full")
    assert read_losses(tmp_path / "saving") == read_losses(tmp_path / "plain")
    prepared.align(tmp_path / "cached", max_steps=2, mini_batch_size=3, **options)
    plain = read_losses(tmp_path / "plain")
    assert read_losses(tmp_path / "cached") == pytest.approx(plain, rel=1e-4)  # float32's rounding


@pytest.mark.slow
def test_the_learning_rate_warms_up(prepared: Prepared, finished: Run, tmp_path: Path) -> None:
    peaks = []
    for run in (finished, prepared.align(tmp_path / "run", warmup_steps=4)):
        rates = read_metrics(run.output, "learning_rate")
        peaks.append(max(rates, key=rates.__getitem__))
        assert max(rates.values()) == SHORT_RUN["learning_rate"]
    assert peaks[1] - peaks[0] == 3  # without a warm-up the first step has the whole rate


@pytest.mark.slow
@pytest.mark.parametrize(
    "training",
    [{"text_training": "frozen-online"}, {"text_training": "lora", "vision_training": "lora"}],
)
def test_float32_computes_a_folder_in_half_precision_in_float32(
    prepared: Prepared, tmp_path: Path, training: dict[str, str]
) -> None:
    model = LLM2CLIPModel.from_pretrained(prepared.model, dtype=torch.bfloat16)
    processor = prepared.processor
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


ROOT = Path(__file__).parents[3]


def test_tensorboard_shows_the_losses_of_the_metrics(finished: Run) -> None:
    pytest.importorskip("tensorboard")
    # An event holds a float32, of 24 bits.
    expected = pytest.approx(read_losses(finished.output), rel=1e-7)
    assert read_tensorboard_losses(finished.output) == expected


@pytest.mark.slow
def test_the_last_step_is_logged_whatever_logging_steps(prepared: Prepared, tmp_path: Path) -> None:
    prepared.align(tmp_path / "each", max_steps=3)
    losses = read_losses(tmp_path / "each")
    run = prepared.align(tmp_path / "run", max_steps=3, logging_steps=10)
    # Losses are added up in float32.
    wanted = {1: losses[1], 3: pytest.approx((losses[2] + losses[3]) / 2, rel=1e-6)}
    assert read_losses(tmp_path / "run") == wanted
    assert run.results["final_loss"] == read_losses(tmp_path / "run")[3]


@pytest.mark.slow
def test_a_loss_computes_in_float32_of_any_towers(prepared: Prepared, tmp_path: Path) -> None:
    seen: set[torch.dtype] = set()

    def compare(inputs: LossInputs) -> torch.Tensor:
        cosines = inputs.image_embeds @ inputs.text_embeds.T
        assert inputs.vision_embeds is not None and inputs.caption_embeds is not None
        embeds = (inputs.vision_embeds, inputs.caption_embeds)
        seen.update(part.dtype for part in (cosines, inputs.logit_scale, *embeds))
        logits = inputs.logit_scale * cosines
        return torch.nn.functional.cross_entropy(logits, torch.arange(len(logits)))

    prepared.align(
        tmp_path / "run", precision="bfloat16", max_steps=1, text_training="frozen-online",
        loss_function=compare,
    )  # fmt: skip
    assert seen == {torch.float32}


@pytest.mark.slow
def test_towers_and_stores_train_alike(prepared: Prepared, finished: Run, tmp_path: Path) -> None:
    online = prepared.align(tmp_path / "online", text_training="frozen-online")
    changed = [names_that_differ(prepared.model, run.model) for run in (finished, online)]
    assert changed[0] == changed[1]
    stored = prepared.align_stored(tmp_path / "stored", **SHORT_RUN)
    for run in (online, stored):
        # The towers see other batches, and six steps carry the rounding on.
        assert read_losses(run.output) == pytest.approx(read_losses(finished.output), abs=1e-3)


def read_first_scale(output: Path) -> float:
    first = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0]
    return float(json.loads(first)["inverse_temperature"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("vision", "text_training", "precision"),
    [("siglip", "frozen-online", "float32"), ("clip", "stored", "bfloat16")],
)
def test_sharded_processes_train_as_one_does_with_the_whole_batch(
    vision: str, text_training: str, precision: str, tmp_path: Path
) -> None:
    prepared = prepare(tmp_path / "prepared", vision=vision)
    changed = {
        "max_steps": 4, "save_steps": 4, "text_training": text_training, "precision": precision,
        "caption_noise": 0.0,
    }  # fmt: skip
    assert main(command_of(prepared, tmp_path / "one", **changed)) == 0
    launch = ["accelerate.commands.launch", "--config_file", "examples/accelerate/fsdp.yaml",
              "--main_process_port", str(find_free_port()),
              "tests/helpers/fsdp_on_cpu.py"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", *launch, *command_of(prepared, tmp_path / "two", **changed)],
        cwd=ROOT, capture_output=True, text=True, timeout=400,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Wrote") == 1
    # Four steps carry the rounding of sums in another order on, or that of bfloat16's 8 bits.
    one, two = read_losses(tmp_path / "one"), read_losses(tmp_path / "two")
    assert two == pytest.approx(one, abs=1e-3 if precision == "float32" else 3e-2)
    # The temperature is float32 in both: bfloat16 would move it by 0.2 %.
    scales = [read_first_scale(tmp_path / name) for name in ("one", "two")]
    assert scales[1] == pytest.approx(scales[0], rel=1e-6)
    assert check_model(tmp_path / "two" / "model").healthy
