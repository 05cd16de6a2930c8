"""The commonest errors of servers: each is computed with the model itself and compared.

| cause | what a server does |
| --- | --- |
| prompt | leaves the prompt out, or pools other tokens of it |
| pooling | pools by another rule |
| attention | runs the LLM causally, or bidirectionally where the model is causal |
| projection | returns the embeddings of the LLM |
| instruction | puts an instruction before every text |
| rewriting | sends a changed text to the tokenizer |
| truncation | truncates to another length, or cuts off the prompt's suffix |
| padding | attends to padding and pools it |
| pixels | normalizes pixels by other numbers, or swaps color channels |
| decoding | ignores transparency or the EXIF rotation |
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..base_llm2clip import set_attention_direction
from ..heads_llm2clip import pool_tokens
from .model_under_test import ModelUnderTest

# Default text lengths of servers and libraries.
_COMMON_LENGTHS = (32, 64, 77, 128, 256, 512, 1024, 2048)
# Mean and std of CLIP, of ImageNet, and of towers trained on [-1, 1].
_PIXEL_STATISTICS = {
    "CLIP's": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "0.5": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
REWRITINGS: dict[str, Callable[[str], str]] = {
    "texts are lowercased": str.lower,
    "line breaks are replaced by spaces": lambda text: text.replace("\n", " "),
    "whitespace is collapsed": lambda text: " ".join(text.split()),
    "texts are normalized to NFC": partial(unicodedata.normalize, "NFC"),
    "texts are normalized to NFKC": partial(unicodedata.normalize, "NFKC"),
}
_IMAGE_ERRORS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "transparency is not put on white": (
        lambda image: image.convert("RGB") if image.mode == "RGBA" else image
    ),
    # Pixels alone: a copy keeps the EXIF data.
    "the EXIF rotation is not applied": (
        lambda image: Image.frombytes(image.mode, image.size, image.tobytes())
    ),
}


class TextInput(NamedTuple):
    """Input of the LLM for a text, and the use of its states."""

    ids: tuple[int, ...]
    start: int  # first token that is pooled
    pooling: str
    bidirectional: bool
    projected: bool = True


@dataclass(frozen=True, eq=False)
class ImageInput:
    """Input of the vision tower for an image."""

    batch: Any  # as the processor returns it

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ImageInput) and torch.equal(
            self.batch["pixel_values"], other.batch["pixel_values"]
        )


ModelInput: TypeAlias = TextInput | ImageInput
Cause: TypeAlias = tuple[str, list[Any]]
"""A sentence on an error without a full stop, and what the model would read."""


def list_causes(tested: ModelUnderTest, inputs: Sequence[Any]) -> Iterator[Cause]:
    """Yield the errors that change what the model reads of these texts or images.

    The right input comes first, under an empty name.
    """
    list_all = _list_text_causes if isinstance(inputs[0], str) else _list_image_causes
    causes = list_all(tested, inputs)
    name, right = next(causes)
    yield name, right
    yield from (cause for cause in causes if cause[1] != right)


def read_instructed(
    tested: ModelUnderTest, texts: Sequence[str], instruction: str
) -> list[TextInput]:
    """Return what the model reads of texts with an instruction, pooled where the prompt is."""
    config = tested.config
    start = config.num_unpooled
    if start == len(config.prompt_prefix_ids):
        start += len(tested.list_bare_ids(instruction))
    return [
        TextInput(tuple(ids), start, config.text_pooling, config.bidirectional)
        for ids in (tested.list_ids(instruction + text) for text in texts)
    ]


@torch.no_grad()
def embed_inputs(tested: ModelUnderTest, inputs: Sequence[ModelInput]) -> Tensor:
    """Embed each input alone, (N, width) float32 of unit length.

    The width is `projection_dim`, or the LLM's if the inputs are not projected.
    """
    return torch.cat([_embed(tested, model_input) for model_input in inputs])


def _embed(tested: ModelUnderTest, read: ModelInput) -> Tensor:
    if isinstance(read, ImageInput):
        return tested.encode_prepared(read.batch)
    model, ids = tested.model, torch.tensor([read.ids], device=tested.device)
    with model.text_forward_lock():
        set_attention_direction(model.text_model, bidirectional=read.bidirectional)
        try:
            hidden = model.text_model(
                input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
            ).last_hidden_state  # (1, L, D)
        finally:
            right = tested.config.bidirectional
            set_attention_direction(model.text_model, bidirectional=right)
    mask = torch.arange(ids.shape[1], device=tested.device)[None] >= read.start
    embeds = model._apply_dense(pool_tokens(hidden, mask, pooling=read.pooling))
    if read.projected:
        embeds = model.project_caption_embeds(embeds)
    return F.normalize(embeds.float(), dim=-1).cpu()


def _list_text_causes(tested: ModelUnderTest, texts: Sequence[str]) -> Iterator[Cause]:
    config = tested.config
    prefix, suffix = tuple(config.prompt_prefix_ids), tuple(config.prompt_suffix_ids)
    limit = config.max_text_length
    bare = [tuple(tested.list_bare_ids(text)) for text in texts]

    def read(ids: tuple[int, ...], room: int = tested.room) -> TextInput:
        ids = (*prefix, *ids[:room], *suffix)
        return TextInput(ids, config.num_unpooled, config.text_pooling, config.bidirectional)

    def read_changed(change: Callable[[str], str]) -> list[Any]:
        return [read(tuple(tested.list_bare_ids(change(text)))) for text in texts]

    right = [read(ids) for ids in bare]
    yield "", right
    yield (
        "the prompt is lost",
        [text._replace(ids=ids[:limit], start=0) for text, ids in zip(right, bare, strict=True)],
    )
    start, change = (0, "pooled too") if config.num_unpooled else (len(prefix), "not pooled")
    yield f"the prompt's prefix is {change}", [text._replace(start=start) for text in right]
    right_pooling = config.text_pooling.removeprefix("full_")
    for pooling in sorted({"mean", "last_token", "cls"} - {right_pooling}):
        start = 0 if pooling == "cls" else config.num_unpooled
        name = f"{pooling!r} pooling instead of {config.text_pooling!r}"
        yield name, [text._replace(pooling=pooling, start=start) for text in right]
    direction = not config.bidirectional
    yield (
        f"attention is {'bidirectional' if direction else 'causal'}",
        [text._replace(bidirectional=direction) for text in right],
    )
    yield (
        "text adapter and projection are left out",
        [text._replace(projected=False) for text in right],
    )
    for name, instruction in (config.instructions or {}).items():
        yield f"texts get the instruction {name!r}", read_changed(instruction.__add__)
    for name, rewrite in REWRITINGS.items():
        yield name, read_changed(rewrite)
    for length in sorted({*_COMMON_LENGTHS, limit // 2}):
        room = length - len(prefix) - len(suffix)
        if 0 < room and length < limit:
            name = f"texts are truncated to {length} tokens, not to {limit}"
            yield name, [read(ids, room) for ids in bare]
    cut = [(*prefix, *ids, *suffix)[:limit] for ids in bare]
    yield (
        "truncation cuts off the prompt's suffix",
        [text._replace(ids=ids) for text, ids in zip(right, cut, strict=True)],
    )
    longest, pad = max(len(text.ids) for text in right), tested.tokenizer.pad_token_id
    padding = [(pad,) * (longest - len(text.ids)) for text in right]
    for side in ("right", "left"):
        yield (
            f"padding on the {side} is attended to and pooled",
            [
                text._replace(ids=text.ids + pads if side == "right" else pads + text.ids)
                for text, pads in zip(right, padding, strict=True)
            ],
        )


def _list_image_causes(tested: ModelUnderTest, images: Sequence[Any]) -> Iterator[Cause]:
    def read(change: Callable[[Any], Any]) -> list[Any]:
        return [ImageInput(tested.processor(images=[change(image)])) for image in images]

    yield "", read(lambda image: image)
    for name, change in _IMAGE_ERRORS.items():
        yield name, read(change)
    processor = tested.processor.image_processor
    statistics = [getattr(processor, name, None) for name in ("image_mean", "image_std")]
    # Pixels in patches have no axis of channels.
    if None in statistics or not processor.do_normalize or hasattr(processor, "patch_size"):
        return
    mean, std = torch.tensor(statistics).view(2, 1, 3, 1, 1)

    def read_pixels(change: Callable[[Tensor], Tensor]) -> list[Any]:
        read: list[Any] = []
        for image in images:
            batch = tested.processor(images=[image])
            batch["pixel_values"] = change(batch["pixel_values"] * std + mean)
            read.append(ImageInput(batch))
        return read

    yield "pixels are not normalized by mean and std", read_pixels(lambda pixels: pixels)
    yield (
        "the color channels are BGR, not RGB",
        read_pixels(lambda pixels: (pixels.flip(1) - mean) / std),
    )
    for name, published in _PIXEL_STATISTICS.items():
        other = torch.tensor(published).view(2, 1, 3, 1, 1)
        if not torch.allclose(torch.stack((mean, std)), other, atol=1e-3):
            yield (
                f"pixels are normalized by {name} mean and std",
                read_pixels(lambda pixels, other=other: (pixels - other[0]) / other[1]),  # type: ignore[misc]
            )
