"""Embeds texts and images with a loaded model: each distinct input once, in batches.

N texts or images, D width of a tower, P `projection_dim`. Every result is float32 on the CPU, in
the order of the input. TF32 is off, whatever the program's settings; the numbers do not depend on
batches, device or padding beyond rounding. The model must be in evaluation mode.
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
from .float32 import float32_as_such
from .pixel_normalization import PixelNormalization, find_normalization
from .precision import describe_precision, load_on_device

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
    """Encode texts, the longest first, in batches of texts of similar length.

    Args:
        model: A model with a text tower.
        processor: The model's processor.
        texts: Any number of non-blank texts, at least one.
        project: Map the tower's embeddings into the space that texts and images share. False
            gives the embeddings before adapter and projection, as an embedding store holds them.
        token_budget: Maximum tokens per batch, on a GPU padding included. Default: by device.
        show_progress: Show a progress bar, which counts tokens.
        on_batch: Called after each batch.

    Returns:
        (N, P) of unit length; with `project=False` (N, D), not normalized.

    Raises:
        ValueError: `texts` is one string or not a list, a text is blank or not a string, the
            budget is below one, the model is in training mode, or it gives NaN or infinity. Every
            such text is named.

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
    """Encode images; threads decode them, beside a GPU the next batches while it works.

    Args:
        model: A model with a vision tower.
        processor: The model's processor.
        images: Paths, URLs, images packed in tar shards or Parquet files, PIL images, or arrays
            as the processor takes them; at least one. The same path is decoded once.
        project: Map the tower's embeddings into the space that texts and images share. False
            gives the embeddings before the projection, as an embedding store holds them.
        batch_size: Images per batch. Default: by device.
        num_workers: Threads that decode images. Default: one per core, at most 8, or 32 beside a
            GPU.
        show_progress: Show a progress bar.
        on_batch: Called after each batch.

    Returns:
        (N, P) of unit length; with `project=False` (N, D), not normalized.

    Raises:
        ValueError: `images` is not a list or is empty, an image is missing or broken (it is
            named), a number is below one, the model is in training mode, or it gives NaN or
            infinity.

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
    """Compute the cosine of each image and its text.

    With the official L/14-336 checkpoint it is what OneIG-Bench computes for an image and the
    answer that it should show (`scripts/utils/inference.py` of OneIG-Bench/OneIG-Benchmark at
    41b4983, from which AISBench and Pruna took it), there with weights in bfloat16 under autocast.

    Args:
        model: A whole model.
        processor: Its processor.
        images: As `encode_images` takes them; an image may occur in several pairs.
        texts: As many non-blank texts.
        batch_size: Images per batch. Default: by device.
        token_budget: Maximum tokens per batch of texts. Default: by device.
        num_workers: Threads that decode images. Default: one per core, at most 8, or 32 beside a
            GPU.
        show_progress: Show progress bars.

    Returns:
        (N,) float32 on the CPU, from -1 to 1, in the order of the pairs.

    Raises:
        ValueError: There are not as many texts as images, or what `encode_images` and
            `encode_texts` refuse.

    Examples:
        >>> model, processor = load_model("my-model")
        >>> score_pairs(model, processor, ["dog.png", "dog.png"], ["a dog", "a red cup"]).shape
        torch.Size([2])
    """
    if len(images) != len(texts):
        raise ValueError(
            f"{counted(len(images), 'image')} and {counted(len(texts), 'text')} are no pairs: give "
            "a text for each image."
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
    """Map stored embeddings of captions or images, (N, D), into the space of both.

    They may be on any device. Raises ValueError for another width than the tower's, and for NaN or
    infinity.
    """
    projected = _project(model, modality, embeds, modules=list(model.modules())).cpu()
    require_finite(projected, range(len(projected)))
    return projected


def average_prompts(embeds: Tensor, num_prompts: Sequence[int]) -> Tensor:
    """Average the unit embeddings of the prompts of each class; (classes, P) of unit length.

    `num_prompts` has the number of each class's prompts, which are adjacent in `embeds`, (N, P).
    """
    means = [part.mean(dim=0) for part in F.normalize(embeds, dim=-1).split(list(num_prompts))]
    return F.normalize(torch.stack(means), dim=-1)


class TorchEncoder(Encoder):
    """A model of this package and its processor.

    Args:
        model: A whole, text-only or vision-only model; or the folder of a whole one, each of whose
            towers is loaded when it is needed first.
        processor: The model's processor.
        device: Where the towers of a folder are loaded to; None for the best there is.
        load: Loads a class of model from a folder; by default in the dtype that it is stored in.

    Modules that a model gets later are not watched for training mode.
    """

    projects_at_once = False
    _lacks = "This model encodes {there}s alone; it has no {wanted} tower."

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
        # On a CPU the model packs texts of any lengths, and batches of few tokens are slow.
        self._plan_texts = plan_packs if self.device.type == "cpu" else plan_token_batches

    @cached_property
    def normalization(self) -> PixelNormalization | None:  # type: ignore[override]
        """Found with the first images: to encode texts alone, none is prepared."""
        on_cpu = self.device.type == "cpu"
        return None if on_cpu else find_normalization(self.processor, self.device)

    @property
    def logit_rule(self) -> LogitRule | None:
        """Rule that turns cosines into logits; None where there is one tower alone."""
        head = getattr(self._models.get("text"), "logit_head", None)
        return None if head is None else head.plain_rule()

    def encode_tokens(
        self, input_ids: Tensor, attention_mask: Tensor, *, num_unpooled: int | None = None
    ) -> Tensor:
        """Run the LLM on one batch, (B, L) int64 each, padded; returns (B, D)."""
        model = self._find_model("text")
        # The model copies them to its device, once they are checked.
        options: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if num_unpooled is not None:  # the model counts as sentence-transformers does
            config = model.config
            num_suffix = len(config.prompt_suffix_ids) - bool(config.prompt_suffix_ends_special)
            options["prompt_length"] = num_unpooled + num_suffix
        with _require_eval_mode(model, self._list_modules("text")):
            embeds: Tensor = model.get_caption_embeds(**options)
        return embeds

    def encode_pixels(self, pixel_values: Tensor, **others: Tensor) -> Tensor:
        """Run the vision tower on one batch, as the processor prepares it; returns (B, D)."""
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
        """List the modules of a model, whose tree takes ten times as long to walk."""
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
    """Let glibc keep freed blocks of up to 256 MiB, 1 GiB of them; works once per process.

    Each batch asks for the same blocks, and each page that the system hands out anew costs a page
    fault, which convolutional towers suffer from most. By default glibc keeps no block above
    32 MiB, which is all that `packing_llm2clip.keep_freed_memory` reaches.

    Returns False without glibc, and where the user set its variables.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, another system
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
    """Raise ValueError if one of the model's modules is in training mode, or comes into it.

    Dropout would make embeddings random, and batch normalization would learn from what it encodes.
    The mode is not switched here: other threads may encode with the same model, or train it.
    """
    before = getattr(model, "num_switches_to_training", 0)  # first: a later switch counts
    if any(module.training for module in modules):
        training = [name or type(m).__name__ for name, m in model.named_modules() if m.training]
        raise ValueError(
            f"The model is in training mode ({len(training)} of its modules are; the first: "
            f"{training[0]!r}), which would make its embeddings random. Call model.eval() before, "
            "and model.train() to go on training."
        )
    yield
    if (
        any(module.training for module in modules)
        or getattr(model, "num_switches_to_training", 0) != before
    ):
        raise ValueError(
            "The model was switched to training mode while it encoded, so that the embeddings may "
            "be random. Encode with a copy, or while no other thread trains the model."
        )
