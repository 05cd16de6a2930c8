"""A tiny dataset, its model and its stores, for the tests of the alignment."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packaging.version import Version
from PIL import Image
from tiny import tiny_model
from torch import Tensor
from transformers import TrainerCallback
from transformers import __version__ as transformers_version

from modeling_llm2clip import LLM2CLIPModel
from modeling_llm2clip.configs.align_config import AlignConfig
from modeling_llm2clip.configs.encoding_config import ExtractConfig
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.data.store.embedding_store import EmbeddingStore
from modeling_llm2clip.embedding.extract import extract
from modeling_llm2clip.processing_llm2clip import LLM2CLIPProcessor
from modeling_llm2clip.publishing.export_model import save_model
from modeling_llm2clip.training.alignment.align import align
from modeling_llm2clip.training.alignment.alignment_data import AlignmentDataset
from modeling_llm2clip.training.alignment.held_out import HeldOutScores
from modeling_llm2clip.training.losses.loss import Loss
from modeling_llm2clip.training.run_folder import read_results

NUM_RECORDS = 24
SHORT_RUN: dict[str, Any] = {
    "max_steps": 6, "global_batch_size": 8, "learning_rate": 1e-3, "logging_steps": 1,
    "save_steps": 2, "device": "cpu", "held_out_ratio": 0.0, "projection_init": "model",
    "image_noise": 0.0, "caption_noise": 0.0, "warmup_steps": 0,
}  # fmt: skip
# Long enough to be killed in the middle.
LONG_RUN: dict[str, Any] = {
    "max_steps": 120, "global_batch_size": 8, "logging_steps": 1, "save_steps": 7,
    "device": "cpu", "vision_training": "full", "layer_decay": 0.9, "learning_rate": 1e-4,
}  # fmt: skip
COLORS = {
    "red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "black": (0, 0, 0),
    "white": (255, 255, 255), "yellow": (255, 255, 0),
}  # fmt: skip
TOWERS = ("text_model.", "vision_model.")


@dataclass(frozen=True)
class Prepared:
    """Folders of a dataset, its model and its stores."""

    data: Path
    model: Path
    captions: Path
    images: Path

    @property
    def records(self) -> list[CaptionedImage]:
        return load_records(self.data)

    @property
    def caption_store(self) -> EmbeddingStore:
        return EmbeddingStore.open(self.captions)

    @property
    def image_store(self) -> EmbeddingStore:
        return EmbeddingStore.open(self.images)

    @property
    def processor(self) -> LLM2CLIPProcessor:
        return LLM2CLIPProcessor.from_pretrained(self.model)

    def dataset(
        self, records: Sequence[CaptionedImage] | None = None, *stores: str, **options: Any
    ) -> AlignmentDataset:
        """Samples of these or all records, from no store or those named `caption` or `image`."""
        opened = {f"{name}_store": getattr(self, f"{name}_store") for name in stores}
        records = self.records if records is None else records
        return AlignmentDataset(records, self.processor, AlignConfig(**options), **opened)

    def align(
        self,
        output: Path,
        *,
        resume: bool = False,
        records: Sequence[CaptionedImage] | None = None,
        loss_function: Loss | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        are_images_stored: bool = False,
        **changed: Any,
    ) -> Run:
        """Run a few steps; captions come from their store where it is read."""
        config = AlignConfig(**{**SHORT_RUN, **changed})
        stored = config.text_training == "stored"
        align(
            self.model, self.records if records is None else records, output, config,
            caption_store=self.caption_store if stored else None,
            image_store=self.image_store if are_images_stored else None,
            loss=loss_function, resume=resume, callbacks=callbacks,
        )  # fmt: skip
        return Run(output)

    def begin(self, output: Path, **options: Any) -> None:
        """Begin a run that ends before its first step, as if it were killed."""
        with pytest.raises(KeyboardInterrupt):
            self.align(output, callbacks=[KillAtBegin()], **options)

    def align_stored(
        self,
        output: Path,
        *,
        resume: bool = False,
        records: Sequence[CaptionedImage] | None = None,
        loss_function: Loss | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        **options: Any,
    ) -> Run:
        """Align from both stores, with the defaults of the other options."""
        align(
            self.model, self.records if records is None else records, output,
            AlignConfig(**{"device": "cpu", **options}), caption_store=self.captions,
            image_store=self.images, loss=loss_function, resume=resume, callbacks=callbacks,
        )  # fmt: skip
        return Run(output)


@dataclass(frozen=True)
class Run:
    """A finished alignment, as its folder describes it."""

    output: Path

    @property
    def model(self) -> Path:
        return self.output / "model"

    @property
    def results(self) -> dict[str, Any]:
        return read_results(self.output)

    @property
    def before(self) -> HeldOutScores:
        return HeldOutScores(**self.results["held_out"]["before"])

    @property
    def after(self) -> HeldOutScores:
        return HeldOutScores(**self.results["held_out"]["best"])

    @property
    def best_step(self) -> int:
        return int(self.results["held_out"]["best_step"])

    def copy_without_model(self, output: Path) -> Path:
        """Copy the run as a kill between its last step and its model leaves it."""
        shutil.copytree(self.output, output)
        shutil.rmtree(output / "model")
        return output


class KillAtBegin(TrainerCallback):
    """Ends a run before its first step, as a kill does."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        raise KeyboardInterrupt


class EndAfter(TrainerCallback):
    """Ends a run after a step, as a kill or, with `by_signal`, a scheduler does."""

    def __init__(self, step: int, *, by_signal: bool = False) -> None:
        self._step, self._by_signal = step, by_signal

    def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        if state.global_step == self._step:
            if not self._by_signal:
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGTERM)


def write_data(folder: Path, *, count: int = NUM_RECORDS) -> Path:
    """Write JPEG images of noise with two short captions, and a long one for all but the first.

    The first two records show the same thing.
    """
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    lines = []
    for number in range(count):
        pixels = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        name = f"{number:02}.jpg"
        Image.fromarray(pixels).resize((150, 120)).save(folder / name)
        line: dict[str, Any] = {
            "image": name,
            "captions": [f"image {number}", f"a photo of thing {number}"],
            "group_id": str(max(number, 1)),
        }
        if number:
            line["long_captions"] = [f"a long text on {number} of many words"]
        lines.append(json.dumps(line))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_color_data(folder: Path, *, count: int) -> Path:
    """Write images of four colored squares, with two captions that name the colors in order.

    Even towers with random weights separate colors and words, so that a linear fit finds what the
    two sides share.
    """
    folder.mkdir(parents=True)
    drawn = np.random.default_rng(0).permutation(len(COLORS) ** 4)[:count]
    lines = []
    for number in drawn.tolist():
        names = [list(COLORS)[number // len(COLORS) ** place % len(COLORS)] for place in range(4)]
        pixels = np.array([COLORS[name] for name in names], dtype=np.uint8).reshape(2, 2, 3)
        Image.fromarray(pixels).resize((32, 32), Image.Resampling.NEAREST).save(
            folder / f"{number}.png"
        )
        captions = [" ".join(names), "squares of " + " and ".join(names)]
        lines.append(json.dumps({"image": f"{number}.png", "captions": captions}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def prepare(
    folder: Path,
    *,
    vision: str = "clip",
    num_colored: int | None = None,
    has_stores: bool = True,
    **build: Any,
) -> Prepared:
    """Write data, export a tiny model, extract both stores in float32.

    Args:
        num_colored: so many images of `write_color_data`, instead of noise.
        has_stores: False where no test reads the stores.
    """
    data = (
        write_data(folder / "data")
        if num_colored is None
        else write_color_data(folder / "data", count=num_colored)
    )
    model, processor = tiny_model(vision, visual_projection_bias=True, max_text_length=64, **build)
    save_model(model, processor, folder / "exported")
    records = load_records(data)
    config = ExtractConfig(store_dtype="float32", device="cpu", show_progress=False)
    for modality, name in (("text", "captions"), ("image", "images")) if has_stores else ():
        extract(folder / "exported", records, folder / name, config, modality=modality)
    return Prepared(data, folder / "exported", folder / "captions", folder / "images")


def read_metrics(output: Path, name: str) -> dict[int, float]:
    """A number by step, where a line of the metrics has it."""
    lines = map(json.loads, (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    read = [(line["step"], line[name]) for line in lines if name in line]
    assert len(read) == len(dict(read)), "a step was logged twice"
    return dict(read)


def read_losses(output: Path) -> dict[int, float]:
    return read_metrics(output, "loss")


def read_tensorboard_losses(output: Path) -> dict[int, float]:
    """Loss of each step as TensorBoard shows it: from the event files of a run, by its reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (output / "checkpoints" / "runs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    return {event.step: event.value for event in events.Scalars("train/loss")}


def command_of(prepared: Prepared, output: Path, **changed: Any) -> list[str]:
    """Arguments of `llm2clip` for a long run with some options changed."""
    options = {**LONG_RUN, **changed}
    flags = [
        part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)
    ]
    online = options.get("text_training", "stored") != "stored"
    stored = [] if online else ["--caption-store", prepared.captions]
    return [str(p) for p in ("align", prepared.model, prepared.data, output, *stored, *flags)]


def weights_of(folder: Path) -> dict[str, Tensor]:
    return dict(LLM2CLIPModel.from_pretrained(folder).state_dict())


def names_that_differ(one: Path, other: Path) -> set[str]:
    first, second = weights_of(one), weights_of(other)
    assert set(first) == set(second)
    return {name for name, value in first.items() if not torch.equal(value, second[name])}


def skip_where_transformers_renames(vision: str) -> None:
    """transformers 5.6 renames weights of the other parts too when a model has a DINOv3 tower.

    Strict loading says so. 5.24 does not; the versions between were not tried.
    """
    if vision == "dinov3_vit" and Version(transformers_version) < Version("5.24"):
        pytest.skip(f"transformers {transformers_version} cannot load a part with DINOv3")
