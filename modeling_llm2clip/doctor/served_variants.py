"""Embeddings that a server with one error would return, computed with the model itself.

Shapes: N texts or images, D width of the LLM, P `projection_dim`.
"""

from __future__ import annotations

import copy
import html
import io
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..base_llm2clip import set_attention_direction
from ..heads_llm2clip import build_pooling_mask, pool_tokens
from ..image_loading_llm2clip import load_images
from ..pooling_llm2clip import TEXT_POOLINGS
from .model_under_test import ModelUnderTest

_EmbedIds: TypeAlias = Callable[[list[int]], Tensor]
_Encode: TypeAlias = Callable[[Sequence[Any]], Tensor]

# What servers and libraries truncate to by default.
_COMMON_LENGTHS = (16, 32, 64, 77, 128, 256, 512, 1024, 2048)
# Mean and std of CLIP, of ImageNet, and of towers trained on [-1, 1].
_PIXEL_STATISTICS = {
    "CLIP's": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "0.5": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
_INTERPOLATIONS = tuple(
    Image.Resampling[name] for name in ("NEAREST", "BILINEAR", "BICUBIC", "LANCZOS")
)
# Numbers of characters that gateways and databases cut texts off at.
_COMMON_CUTS = (
    64, 80, 100, 128, 140, 200, 250, 255, 256, 280, 300, 400, 500, 512, 768, 800, 1000, 1024, 1500,
    2000, 2048, 2500, 3000, 4000, 4096, 5000, 8000, 8191, 8192, 10_000, 16_000, 16_384, 32_000,
    32_768,
)  # fmt: skip
_PLAIN = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "—": "-", "–": "-", "…": "..."})
_JOINERS = re.compile("[\u200b-\u200d\ufe0e\ufe0f\ufeff]")
_OTHER_POOLINGS = {
    "mean": "mean pooling",
    "last_token": "last-token pooling",
    "cls": "first-token (CLS) pooling",
}
_COMMON_SIDES = (224, 256, 336, 384, 448, 512, 640, 768, 1024)
_COMMON_QUALITIES = (95, 90, 85, 80, 75, 70, 60, 50)


@dataclass(frozen=True)
class Variant:
    """An error of a server, and a function that reproduces it.

    Attributes:
        name: A sentence on the error, without a full stop.
        compute: Maps N texts or images to the embeddings of such a server, (N, width)
            float32 of unit length.
        of_batch: True if the embedding of an input depends on the others of its request.
    """

    name: str
    compute: _Encode
    of_batch: bool = False


class TextVariants:
    """Encodes texts as servers with an error would."""

    def __init__(self, tested: ModelUnderTest) -> None:
        self.tested = tested
        config = tested.config
        self.prefix = list(config.prompt_prefix_ids)
        self.suffix = list(config.prompt_suffix_ids)
        self.pools_prefix = config.num_unpooled < len(self.prefix)
        self.limit, self.room = int(config.max_text_length), tested.room

    def list_variants(self, texts: Sequence[str]) -> list[Variant]:
        """List the errors that change at least one of these texts."""
        lengths = {len(self.tested.list_bare_ids(text)) for text in texts}
        errors = {**self._list_prompts(), **self._list_poolings_and_heads()}
        variants = [Variant(name, self._per_text(embed)) for name, embed in errors.items()]
        wrong = "causal" if self.tested.config.bidirectional else "bidirectional"
        variants.append(Variant(f"attention is {wrong}", self._encode_other_direction))
        changes = [
            (f"texts get the instruction {name!r}", instruction.__add__)
            for name, instruction in (self.tested.config.instructions or {}).items()
            if instruction.strip()
        ]
        for name, change in (*changes, *_list_text_changes(texts)):
            variants.append(Variant(name, _encode_changed(self._per_text(self._enclose), change)))
        if len(lengths) > 1:
            variants += self._list_paddings()
        truncations = self._list_truncations(max(lengths)).items()
        return variants + [Variant(name, self._per_text(embed)) for name, embed in truncations]

    def _list_paddings(self) -> Iterator[Variant]:
        """List the errors of a batch without an attention mask."""
        for side in ("right", "left"):
            for pools, effect in ((True, "attended to and pooled"), (False, "attended to")):
                yield Variant(
                    f"padding on the {side} is {effect}",
                    partial(self._encode_unmasked, side=side, pools_padding=pools),
                    of_batch=True,
                )

    @torch.no_grad()
    def _encode_unmasked(self, texts: Sequence[str], *, side: str, pools_padding: bool) -> Tensor:
        model = self.tested.model
        batch = self.tested.tokenize(texts, padding_side=side)
        mask = build_pooling_mask(
            batch["attention_mask"], num_unpooled=self.tested.config.num_unpooled
        )
        if pools_padding:
            mask = mask | (batch["attention_mask"] == 0)
        hidden = model.text_model(
            input_ids=batch["input_ids"],
            attention_mask=torch.ones_like(batch["attention_mask"]),
            use_cache=False,
        ).last_hidden_state
        pooled = model._apply_dense(
            pool_tokens(hidden, mask, pooling=self.tested.config.text_pooling)
        )
        return F.normalize(model.project_caption_embeds(pooled), dim=-1).cpu()

    def _encode_other_direction(self, texts: Sequence[str]) -> Tensor:
        model, bidirectional = self.tested.model, self.tested.config.bidirectional
        with model.text_forward_lock():
            set_attention_direction(model.text_model, bidirectional=not bidirectional)
            try:
                return self._per_text(self._enclose)(texts)
            finally:
                set_attention_direction(model.text_model, bidirectional=bidirectional)

    def _list_prompts(self) -> dict[str, _EmbedIds]:
        prefix, suffix, fit, embed = self.prefix, self.suffix, self._fit, self._embed
        begin = self.tested.tokenizer.bos_token_id
        errors: dict[str, _EmbedIds] = {}
        if prefix or suffix:
            errors["the prompt is lost"] = lambda ids: embed([], ids[: self.limit])
            errors["the prompt is applied twice"] = lambda ids: embed(
                prefix, [*prefix, *fit(ids), *suffix, *suffix]
            )
        if begin is not None and (prefix or suffix) and prefix != [begin]:
            errors["the prompt is lost but for the token that begins a text"] = lambda ids: embed(
                [], [begin, *ids][: self.limit]
            )
        if prefix:
            errors["the prompt's prefix is lost"] = lambda ids: embed([], [*fit(ids), *suffix])
            change = "not pooled" if self.pools_prefix else "pooled too"
            errors[f"the prompt's prefix is {change}"] = lambda ids: embed(
                prefix, [*fit(ids), *suffix], pools_before=not self.pools_prefix
            )
        if suffix:
            errors["the prompt's suffix is lost"] = lambda ids: embed(prefix, fit(ids))
            errors["the prompt's suffix is not pooled"] = lambda ids: embed(
                prefix, fit(ids), suffix
            )
        return errors

    def _list_poolings_and_heads(self) -> dict[str, _EmbedIds]:
        model = self.tested.model
        own = self.tested.config.text_pooling
        return {
            **{
                f"{name} instead of {TEXT_POOLINGS[own].description}": partial(
                    self._enclose, pooling=pooling, pools_before=pooling == "cls" or None
                )
                for pooling, name in _OTHER_POOLINGS.items()
                if pooling not in (own, own.removeprefix("full_"))
            },
            "the text adapter is left out": partial(self._enclose, head=model.text_projection),
            "text adapter and projection are left out": partial(
                self._enclose, head=lambda pooled: pooled
            ),
            "the text projection is left out": partial(self._enclose, head=model.text_adapter),
        }

    def _list_truncations(self, longest: int) -> dict[str, _EmbedIds]:
        """List other lengths, truncation at the other end, and no truncation."""
        prefix, suffix, embed = self.prefix, self.suffix, self._embed
        room, num_prompt = self.room, len(prefix) + len(suffix)
        errors: dict[str, _EmbedIds] = {
            f"texts are truncated to {length} tokens, not to {self.limit}": partial(
                self._enclose, room=length - num_prompt
            )
            for length in sorted({*_COMMON_LENGTHS, self.limit // 2, room} - {self.limit})
            if 0 < length - num_prompt < longest
        }
        if longest <= room:
            return errors
        errors["truncation cuts off the prompt's suffix"] = lambda ids: embed(
            prefix, [*ids, *suffix][: self.limit - len(prefix)]
        )
        errors["truncation keeps the end of a text, not its beginning"] = lambda ids: embed(
            prefix, [*ids[-room:], *suffix]
        )
        positions = getattr(self.tested.config.text_config, "max_position_embeddings", None)
        if positions is None or num_prompt + longest <= positions:
            errors["long texts are not truncated"] = lambda ids: embed(prefix, [*ids, *suffix])
        errors["long texts are split, and their parts averaged"] = self._average_parts
        return errors

    def _average_parts(self, ids: list[int]) -> Tensor:
        parts = [ids[start : start + self.room] for start in range(0, len(ids), self.room)]
        weights = torch.tensor([len(part) for part in parts], dtype=torch.float32).unsqueeze(1)
        embeds = torch.cat([self._enclose(part) for part in parts])  # (parts, P)
        return F.normalize((embeds * weights).sum(0, keepdim=True), dim=-1)

    def _per_text(self, embed: Callable[[list[int]], Tensor]) -> Callable[[Sequence[str]], Tensor]:
        return lambda texts: torch.cat([embed(self.tested.list_bare_ids(text)) for text in texts])

    def _fit(self, ids: list[int]) -> list[int]:
        return ids[: self.room]

    def _enclose(self, ids: list[int], *, room: int | None = None, **options: Any) -> Tensor:
        """Embed a text as the model does, except for the options."""
        kept = ids[: self.room if room is None else room]
        return self._embed(self.prefix, [*kept, *self.suffix], **options)

    @torch.no_grad()
    def _embed(
        self,
        before: list[int],
        pooled: list[int],
        after: Sequence[int] = (),
        *,
        pooling: str | None = None,
        pools_before: bool | None = None,
        head: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Run the LLM on token ids and pool those in the middle; returns (1, width).

        With `pools_before` those before them are pooled too; None as the model does.
        """
        tested = self.tested
        row = torch.tensor([[*before, *pooled, *after]], device=tested.device)
        hidden = tested.model.text_model(
            input_ids=row, attention_mask=torch.ones_like(row), use_cache=False
        ).last_hidden_state  # (1, L, D)
        pools_before = self.pools_prefix if pools_before is None else pools_before
        mask = torch.zeros_like(row, dtype=torch.bool)
        mask[:, 0 if pools_before else len(before) : len(before) + len(pooled)] = True
        embeds = tested.model._apply_dense(
            pool_tokens(hidden, mask, pooling=pooling or tested.config.text_pooling)
        )
        head = head or tested.model.project_caption_embeds
        return F.normalize(head(embeds).float(), dim=-1).cpu()


def list_image_variants(tested: ModelUnderTest, images: Sequence[Any]) -> Iterator[Variant]:
    """Yield errors in the preparation and encoding of images."""
    for name, change in _IMAGE_ERRORS.items():
        yield Variant(name, _encode_changed(tested.encode_images, change))
    yield Variant("the image projection is left out", partial(_encode_unprojected, tested))
    yield from _list_pixel_variants(tested)
    for name, change in _list_image_changes(images):
        yield Variant(name, _encode_changed(tested.encode_images, change))
    current = getattr(tested.processor.image_processor, "resample", None)
    for method in _INTERPOLATIONS:
        if current is not None and int(method) != int(current):
            processor = copy.deepcopy(tested.processor)
            processor.image_processor.resample = method
            yield Variant(
                f"images are resized by {method.name.lower()} interpolation",
                replace(tested, processor=processor).encode_images,
            )


def _encode_changed(encode: _Encode, change: Callable[[Any], Any]) -> _Encode:
    return lambda inputs: encode([change(one) for one in inputs])


def _list_pixel_variants(tested: ModelUnderTest) -> Iterator[Variant]:
    processor = tested.processor.image_processor
    statistics = [getattr(processor, name, None) for name in ("image_mean", "image_std")]
    if any(one is None for one in statistics) or not getattr(processor, "do_normalize", True):
        return
    if hasattr(processor, "patch_size"):  # pixels come in patches, without an axis of channels
        return
    own = _to_tensor(statistics)

    def encode(change: Callable[[Tensor], Tensor], images: Sequence[Any]) -> Tensor:
        batch = tested.processor(images=list(images))
        batch["pixel_values"] = change(batch["pixel_values"] * own[1] + own[0])
        return tested.encode_prepared(batch)

    def normalize(by: Tensor, pixels: Tensor) -> Tensor:
        return (pixels - by[0]) / by[1]

    yield Variant("pixels are not normalized by mean and std", partial(encode, lambda one: one))
    yield Variant(
        "the color channels are BGR, not RGB",
        partial(encode, lambda pixels: normalize(own, pixels.flip(1))),
    )
    for name, published in _PIXEL_STATISTICS.items():
        other = _to_tensor(published)
        if not torch.allclose(own, other, atol=1e-3):
            change = partial(normalize, other)
            yield Variant(f"pixels are normalized by {name} mean and std", partial(encode, change))


def _to_tensor(statistics: Sequence[Any]) -> Tensor:
    """Return mean and std of pixels, (2, 1, 3, 1, 1)."""
    return torch.tensor(statistics).view(2, 1, 3, 1, 1)


@torch.no_grad()
def _encode_unprojected(tested: ModelUnderTest, images: Sequence[Any]) -> Tensor:
    batch = tested.processor(images=list(images)).to(tested.device)
    return F.normalize(tested.model.get_vision_embeds(**batch), dim=-1).cpu()


def _crop_square(image: Image.Image) -> Image.Image:
    image = load_images(image)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _stretch_square(image: Image.Image) -> Image.Image:
    image = load_images(image)
    side = min(image.size)
    return image.resize((side, side), Image.Resampling.BICUBIC)


_IMAGE_ERRORS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "transparency is not put on white": (
        lambda image: image.convert("RGB") if image.mode == "RGBA" else image
    ),
    # Pixels alone: a copy keeps the EXIF data.
    "the EXIF rotation is not applied": (
        lambda image: Image.frombytes(image.mode, image.size, image.tobytes())
    ),
    "images are cropped to a square where the model stretches them": _crop_square,
    "images are stretched to a square where the model crops them": _stretch_square,
}


_TEXT_CHANGES: dict[str, Callable[[str], str]] = {
    "texts are lowercased": str.lower,
    "line breaks are replaced by spaces": lambda text: text.replace("\n", " "),
    "all line breaks are replaced by spaces": lambda text: re.sub(r"\r\n?|\n", " ", text),
    "line breaks are removed": lambda text: re.sub(r"[\r\n]", "", text),
    "line breaks are rewritten as \\n": lambda text: re.sub(r"\r\n?", "\n", text),
    "whitespace is collapsed": lambda text: " ".join(text.split()),
    "no-break spaces are replaced by plain ones": lambda text: text.replace("\u00a0", " "),
    "Unicode spaces are replaced by plain ones": partial(re.sub, r"[^\S\t-\r]", " "),
    "Unicode spaces, zero-width ones too, are replaced by plain ones": (
        partial(re.sub, r"[^\S\t-\r]|\u200b", " ")
    ),
    "texts are normalized to NFC": partial(unicodedata.normalize, "NFC"),
    "texts are normalized to NFKC": partial(unicodedata.normalize, "NFKC"),
    "texts are normalized to NFD": partial(unicodedata.normalize, "NFD"),
    "texts are normalized to NFKD": partial(unicodedata.normalize, "NFKD"),
    "accents are removed": lambda text: "".join(
        part for part in unicodedata.normalize("NFD", text) if not unicodedata.combining(part)
    ),
    "characters outside of ASCII are removed": lambda text: text.encode("ascii", "ignore").decode(),
    "characters outside of ASCII become question marks": (
        lambda text: text.encode("ascii", "replace").decode()
    ),
    "emoji are removed": lambda text: "".join(
        part for part in text if unicodedata.category(part) not in ("So", "Sk")
    ),
    "invisible joiners are removed": lambda text: _JOINERS.sub("", text),
    "typographic quotes and dashes are made plain": lambda text: text.translate(_PLAIN),
    "HTML entities are unescaped": html.unescape,
    "texts are escaped for HTML": html.escape,
    "HTML tags are removed": lambda text: re.sub(r"<[^<>]*>", "", text),
    "punctuation is removed": lambda text: re.sub(r"[^\w\s]", "", text),
}


def _list_text_changes(texts: Sequence[str]) -> Iterator[tuple[str, Callable[[str], str]]]:
    """Yield the name and function of each change that shows in some of these texts."""
    for name, change in _TEXT_CHANGES.items():
        if any(change(text) != text for text in texts):
            yield name, change
    longest = max(map(len, texts))
    for count in _COMMON_CUTS:
        if count < longest:
            yield f"texts are truncated to {count:,} characters", itemgetter(slice(count))


def _list_image_changes(
    images: Sequence[Any],
) -> Iterator[tuple[str, Callable[[Image.Image], Image.Image]]]:
    """Yield the name and function of each change that shows in some of these images."""
    largest = max(max(image.size) for image in images)
    for side in _COMMON_SIDES:
        if side < largest:
            for method in _INTERPOLATIONS:
                yield (
                    f"images are shrunk to {side} pixels by {method.name.lower()} interpolation",
                    partial(_shrink, side, method),
                )
    for quality in _COMMON_QUALITIES:
        yield f"images are saved as JPEG of quality {quality}", partial(_save_as_jpeg, quality)
    yield "images are made gray", lambda image: load_images(image).convert("L").convert("RGB")
    yield (
        "images are reduced to 256 colors",
        lambda image: load_images(image).quantize(256).convert("RGB"),
    )


def _shrink(side: int, method: Image.Resampling, image: Image.Image) -> Image.Image:
    image = load_images(image).copy()
    if max(image.size) > side:
        image.thumbnail((side, side), method, reducing_gap=None)
    return image


def _save_as_jpeg(quality: int, image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    load_images(image).save(file, format="JPEG", quality=quality)
    return Image.open(io.BytesIO(file.getvalue())).convert("RGB")
