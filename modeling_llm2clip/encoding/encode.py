"""Embeds texts and images with a loaded model: each distinct input once, in batches.

N is the number of texts or images, D the width of a tower, P `projection_dim`. Every result is
float32 on the CPU, in input order. TF32 is off, whatever the program's settings. Batches, device
and padding change the numbers only by rounding. The model must be in evaluation mode.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._suggestions import counted
from ..configuration_llm2clip import LLM2CLIPConfig
from ..heads_llm2clip import LogitRule
from ..modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel, LLM2CLIPVisionModel
from ..packing_llm2clip import plan_packs, plan_token_batches
from ..processing_llm2clip import LLM2CLIPProcessor
from .batches import OnBatch, require_finite
from .devices import find_device, runs_ahead
from .encoder_interface import Encoder, choose_batches
from .pixel_normalization import PixelNormalization, find_normalization
from .precision import describe_precision, float32_as_such, load_on_device

Model: TypeAlias = LLM2CLIPModel | LLM2CLIPTextModel | LLM2CLIPVisionModel

_PROJECTED_AT_ONCE = 4096
# From glibc's malloc.h; see mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_BLOCK, _MOST_KEPT = 2**28, 2**30  # bytes


def encode_texts(
    model: LLM2CLIPModel | LLM2CLIPTextModel,
    processor: LLM2CLIPProcessor,
    texts: Iterable[str],
    *,
    project: bool = True,
    token_budget: int | None = None,
    show_progress: bool = False,
    on_batch: OnBatch | None = None,
) -> Tensor:
    """Encode texts, longest first, in batches of similar length.

    Args:
        model: A model with a text tower.
        processor: The model's processor.
        texts: Any number of non-blank texts, at least one.
        project: Map the tower's embeddings into the space that texts and images share. With
            False, returns the embeddings before adapter and projection, as stored in an
            embedding store.
        token_budget: Maximum tokens per batch, including padding on a GPU. Default: by device.
        show_progress: Show a progress bar that counts tokens.
        on_batch: Called after each batch.

    Returns:
        (N, P) of unit length; with `project=False` (N, D), not normalized.

    Raises:
        ValueError: `texts` is one string or not a list, a text is blank or not a string, the budget
            is below one, the model is in training mode, or an embedding has NaN or infinity. The
            message names the invalid texts.

    Examples:
        >>> model, processor = load_model("my-model")
        >>> embeds = encode_texts(model, processor, ["a dog", "two red apples"])
        >>> embeds.shape == (2, model.config.projection_dim)
        True
    """
    return TorchEncoder(model, processor).encode_texts(
        texts,
        project=project,
        token_budget=token_budget,
        show_progress=show_progress,
        on_batch=on_batch,
    )


def encode_images(
    model: LLM2CLIPModel | LLM2CLIPVisionModel,
    processor: LLM2CLIPProcessor,
    images: Sequence[Any],
    *,
    project: bool = True,
    batch_size: int | None = None,
    num_workers: int | None = None,
    show_progress: bool = False,
    on_batch: OnBatch | None = None,
) -> Tensor:
    """Encode images, which threads decode; with a GPU, threads decode ahead while the GPU computes.

    Args:
        model: A model with a vision tower.
        processor: The model's processor.
        images: Paths, URLs, images packed in tar shards or Parquet files, PIL images, or arrays
            that the processor accepts; at least one. A repeated path is decoded once.
        project: Map the tower's embeddings into the space that texts and images share. With
            False, returns the embeddings before the projection, as stored in an embedding store.
        batch_size: Images per batch. Default: by device.
        num_workers: Threads that decode images. Default: one per core, at most 8, or 32 with a
            GPU.
        show_progress: Show a progress bar.
        on_batch: Called after each batch.

    Returns:
        (N, P) of unit length; with `project=False` (N, D), not normalized.

    Raises:
        ValueError: `images` is not a list or is empty, an image is missing or broken (the message
            names it), a number is below one, the model is in training mode, or an embedding has NaN
            or infinity.

    Examples:
        >>> model, processor = load_model("my-model")
        >>> embeds = encode_images(model, processor, ["my-images/beach.jpg", "dog.png"])
        >>> embeds.shape == (2, model.config.projection_dim)
        True
    """
    return TorchEncoder(model, processor).encode_images(
        images,
        project=project,
        batch_size=batch_size,
        num_workers=num_workers,
        show_progress=show_progress,
        on_batch=on_batch,
    )


def score_pairs(
    model: LLM2CLIPModel,
    processor: LLM2CLIPProcessor,
    images: Sequence[Any],
    texts: Sequence[str],
    *,
    batch_size: int | None = None,
    token_budget: int | None = None,
    num_workers: int | None = None,
    show_progress: bool = False,
) -> Tensor:
    """Compute the cosine similarity of each image and its text.

    With the official L/14-336 checkpoint, this is the score that OneIG-Bench computes between an
    image and the answer that the image should show (`scripts/utils/inference.py` of
    OneIG-Bench/OneIG-Benchmark at 41b4983, which AISBench and Pruna copied). OneIG-Bench runs it
    with bfloat16 weights under autocast.

    Args:
        model: A whole model.
        processor: The model's processor.
        images: As in `encode_images`; an image may occur in several pairs.
        texts: A non-blank text for each image.
        batch_size: Images per batch. Default: by device.
        token_budget: Maximum tokens per batch of texts. Default: by device.
        num_workers: Threads that decode images. Default: one per core, at most 8, or 32 with a
            GPU.
        show_progress: Show progress bars.

    Returns:
        (N,) float32 on the CPU, from -1 to 1, in the order of the pairs.

    Raises:
        ValueError: The numbers of texts and images differ, or `encode_images` or `encode_texts`
            raises an error.

    Examples:
        >>> model, processor = load_model("my-model")
        >>> score_pairs(model, processor, ["dog.png", "dog.png"], ["a dog", "a red cup"]).shape
        torch.Size([2])
    """
    if len(images) != len(texts):
        raise ValueError(
            f"Got {counted(len(images), 'image')} and {counted(len(texts), 'text')}. Pass one text "
            "per image."
        )
    image_embeds = encode_images(
        model, processor, images, batch_size=batch_size, num_workers=num_workers,
        show_progress=show_progress,
    )  # fmt: skip
    text_embeds = encode_texts(
        model, processor, texts, token_budget=token_budget, show_progress=show_progress
    )
    return (image_embeds * text_embeds).sum(dim=1)


def project_stored(model: Model, embeds: Tensor, modality: str) -> Tensor:
    """Map stored embeddings, (N, D), into the space that captions and images share.

    The embeddings may be on any device. Raises ValueError if their width is not the tower's, or if
    they contain NaN or infinity.
    """
    projected = _project(model, modality, embeds, modules=list(model.modules())).cpu()
    require_finite(projected, range(len(projected)))
    return projected


def average_prompts(embeds: Tensor, num_prompts: Sequence[int]) -> Tensor:
    """Average the unit embeddings of the prompts of each class; (classes, P) of unit length.

    `num_prompts` is the number of prompts per class; a class's prompts are adjacent in `embeds`,
    (N, P).
    """
    means = [part.mean(dim=0) for part in F.normalize(embeds, dim=-1).split(list(num_prompts))]
    return F.normalize(torch.stack(means), dim=-1)


class TorchEncoder(Encoder):
    """A model of this package and its processor.

    Args:
        model: A whole, text-only or vision-only model; or the folder of a whole model, whose towers
            are each loaded on first use.
        processor: The model's processor.
        device: Device to load the towers of a folder onto; None for the best one available.
        load: Loads a model of a given class from the folder; by default, in its stored dtype.

    Modules added to the model later are not checked for training mode.
    """

    projects_at_once = False
    _lacks = "This model encodes only {there}s; it has no {wanted} tower."

    def __init__(
        self,
        model: Model | Path,
        processor: LLM2CLIPProcessor,
        *,
        device: torch.device | None = None,
        load: Callable[[Any], Any] | None = None,
    ) -> None:
        self.processor = processor
        self._lock = threading.Lock()
        self._models: dict[str, Any] = {}
        self._modules: dict[str, list[nn.Module]] = {}
        if isinstance(model, Path):
            self.modalities, self.device = ("text", "image"), device or find_device()
            self._load = load or partial(load_on_device, folder=model, device=self.device)
            config = LLM2CLIPConfig.from_pretrained(model)
        else:
            self.device, config = model.device, model.config
            towers = {"text": "text_model", "image": "vision_model"}
            self._models = {name: model for name, tower in towers.items() if hasattr(model, tower)}
            self.modalities = tuple(self._models)
        self.embedding_dim = int(config.projection_dim)
        self.runs_ahead = runs_ahead(self.device)
        self.token_budget, self.batch_size = choose_batches(self.device)
        # On a CPU the model packs texts of any length, and small batches are slow.
        self._plan_texts = plan_packs if self.device.type == "cpu" else plan_token_batches

    @cached_property
    def normalization(self) -> PixelNormalization | None:  # type: ignore[override]
        """Last image preparation steps, which run on the device; found when first used."""
        on_cpu = self.device.type == "cpu"
        return None if on_cpu else find_normalization(self.processor, self.device)

    @property
    def logit_rule(self) -> LogitRule | None:
        """Rule that turns cosines into logits; None unless the encoder holds a whole model."""
        head = getattr(self._models.get("text"), "logit_head", None)
        return None if head is None else head.plain_rule()

    def encode_tokens(
        self, input_ids: Tensor, attention_mask: Tensor, *, num_unpooled: int | None = None
    ) -> Tensor:
        """Run the LLM on one padded batch of ids and mask, (B, L) int64; returns (B, D)."""
        model = self._find_model("text")
        # The model checks the inputs, then copies them to its device.
        options: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if num_unpooled is not None:  # the model counts the suffix too, like sentence-transformers
            config = model.config
            num_suffix = len(config.prompt_suffix_ids) - bool(config.prompt_suffix_ends_special)
            options["prompt_length"] = num_unpooled + num_suffix
        with _require_eval_mode(model, self._list_modules("text")):
            embeds: Tensor = model.get_caption_embeds(**options)
        return embeds

    def encode_pixels(self, pixel_values: Tensor, **others: Tensor) -> Tensor:
        """Run the vision tower on one batch from the processor; returns (B, D)."""
        model = self._find_model("image")
        if self.device.type == "cpu":
            raise_malloc_thresholds()
        inputs = {"pixel_values": pixel_values, **others}
        inputs = {n: value.to(self.device, non_blocking=True) for n, value in inputs.items()}
        if self.normalization is not None:
            inputs["pixel_values"] = self.normalization.apply(inputs["pixel_values"])
        with _require_eval_mode(model, self._list_modules("image")):
            embeds: Tensor = model.get_vision_embeds(**inputs)
        return embeds

    def project(self, modality: str, embeds: Tensor) -> Tensor:
        """Map embeddings of a tower, (B, D), to unit embeddings, (B, P)."""
        model = self._find_model(modality)
        return _project(model, modality, embeds, modules=self._list_modules(modality))

    def _list_modules(self, modality: str) -> list[nn.Module]:
        """List the modules of a model, cached because walking the tree takes ten times as long."""
        if modality not in self._modules:
            self._modules[modality] = list(self._find_model(modality).modules())
        return self._modules[modality]

    def describe_precision(self, modality: str, stored: torch.dtype) -> dict[str, str]:
        """Describe how a tower computes; see `precision.describe_precision`."""
        return describe_precision(self._find_model(modality), stored)

    def _find_model(self, modality: str) -> Any:
        with self._lock:
            if modality not in self._models:
                kind = LLM2CLIPTextModel if modality == "text" else LLM2CLIPVisionModel
                self._models[modality] = self._load(kind)
            return self._models[modality]


@cache
def raise_malloc_thresholds() -> bool:
    """Let glibc keep up to 1 GiB of freed memory, in blocks of up to 256 MiB, in this process.

    Every batch allocates the same blocks, and each page newly obtained from the system costs a page
    fault, which slows convolutional towers the most. By default glibc keeps no block above 32 MiB,
    and `packing_llm2clip.keep_freed_memory` cannot raise that limit.

    Returns False if glibc is not in use, or if the user has set glibc's malloc variables.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library or operating system
        return False
    return bool(
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK) and mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT)
    )


@torch.no_grad()
def _project(model: Any, modality: str, embeds: Tensor, *, modules: Sequence[nn.Module]) -> Tensor:
    """Project in parts, because all embeddings of a large dataset may not fit on the device."""
    to_embeds = model.to_text_embeds if modality == "text" else model.to_image_embeds
    with _require_eval_mode(model, modules), float32_as_such():
        parts = embeds.split(_PROJECTED_AT_ONCE)
        return torch.cat([to_embeds(part.to(model.device)).to(embeds.device) for part in parts])


@contextmanager
def _require_eval_mode(model: nn.Module, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Raise ValueError if any of the model's modules is in training mode or switches to it.

    Dropout would make embeddings random, and batch normalization would update its statistics. The
    mode is not changed here, because other threads may be encoding with the model or training it.
    """
    # Read before the check, so a switch during the check counts.
    before = getattr(model, "num_switches_to_training", 0)
    if any(module.training for module in modules):
        training = [name or type(m).__name__ for name, m in model.named_modules() if m.training]
        raise ValueError(
            f"The model is in training mode ({counted(len(training), 'module')}; the first is "
            f"{training[0]!r}), which would make its embeddings random. Call model.eval() first, "
            "and model.train() to resume training."
        )
    yield
    if (
        any(module.training for module in modules)
        or getattr(model, "num_switches_to_training", 0) != before
    ):
        raise ValueError(
            "The model was switched to training mode while it was encoding, so the embeddings may "
            "be random. Encode with a copy of the model, or while no other thread trains it."
        )
