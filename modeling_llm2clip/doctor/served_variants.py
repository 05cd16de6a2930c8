"""What a server would answer with one error in it, computed with the model itself.

Shapes: N texts or images, D width of the LLM, P `projection_dim`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..base_llm2clip import set_attention_direction
from ..image_loading_llm2clip import load_images
from ..pooling_llm2clip import build_pooling_mask, pool_tokens
from .input_changes import list_image_changes, list_text_changes
from .model_under_test import ModelUnderTest

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


@dataclass(frozen=True)
class Variant:
    """One error of a server.

    Attributes:
        name: What the server does, as a sentence without a full stop.
        compute: Takes N texts or images and returns what such a server would answer, (N, width)
            float32 of unit length.
        of_batch: Whether the embedding of an input depends on the others of its request.
    """

    name: str
    compute: Callable[[Sequence[Any]], Tensor]
    of_batch: bool = False


class TextVariants:
    """Texts as servers with an error encode them.

    Args:
        tested: The model, with a text tower and a tokenizer.
    """

    def __init__(self, tested: ModelUnderTest) -> None:
        self.tested = tested
        config = tested.config
        self.prefix = list(config.prompt_prefix_ids)
        self.suffix = list(config.prompt_suffix_ids)
        self.limit = int(config.max_text_length)

    def list_ids(self, text: str) -> list[int]:
        """Tokenize a text without prompt, special tokens and truncation."""
        ids = self.tested.tokenizer(
            text, add_special_tokens=False, truncation=False, verbose=False
        )["input_ids"]
        return [int(i) for i in ids]

    def list_variants(self, texts: Sequence[str]) -> list[Variant]:
        """List the errors that change at least one of these texts."""
        longest = max(len(self.list_ids(text)) for text in texts)
        variants = [*self._list_prompts(), *self._list_poolings(), *self._list_heads()]
        for name, instruction in (self.tested.config.instructions or {}).items():
            if instruction.strip():
                changed = partial(self._encode_changed, instruction.__add__)
                variants.append(Variant(f"texts get the instruction {name!r}", changed))
        for name, change in list_text_changes(list(texts)):
            variants.append(Variant(name, partial(self._encode_changed, change)))
        if len({len(self.list_ids(text)) for text in texts}) > 1:
            variants += self._list_paddings()
        return [*variants, *self._list_truncations(longest)]

    def _list_paddings(self) -> Iterator[Variant]:
        """List what a batch without an attention mask gives."""
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
        mask = build_pooling_mask(batch["attention_mask"], num_unpooled=len(self.prefix))
        if pools_padding:
            mask = mask | (batch["attention_mask"] == 0)
        hidden = model.text_model(
            input_ids=batch["input_ids"],
            attention_mask=torch.ones_like(batch["attention_mask"]),
            use_cache=False,
        ).last_hidden_state
        pooled = pool_tokens(hidden, mask, pooling=self.tested.config.text_pooling)
        return F.normalize(model.project_caption_embeds(pooled), dim=-1).cpu()

    def _encode_changed(self, change: Callable[[str], str], texts: Sequence[str]) -> Tensor:
        return self._per_text(self._enclose)([change(text) for text in texts])

    def _list_prompts(self) -> Iterator[Variant]:
        prefix, suffix = self.prefix, self.suffix
        begin = self.tested.tokenizer.bos_token_id
        if prefix or suffix:
            yield self._variant(
                "the prompt is lost", lambda ids: self._embed([], ids[: self.limit])
            )
            yield self._variant(
                "the prompt is applied twice",
                lambda ids: self._embed(prefix, [*prefix, *self._fit(ids), *suffix, *suffix]),
            )
        if begin is not None and (prefix or suffix) and prefix != [begin]:
            yield self._variant(
                "the prompt is lost but for the token that begins a text",
                lambda ids: self._embed([], [begin, *ids][: self.limit]),
            )
        if prefix:
            yield self._variant(
                "the prompt's prefix is lost",
                lambda ids: self._embed([], [*self._fit(ids), *suffix]),
            )
            yield self._variant(
                "the prompt's prefix is pooled too",
                lambda ids: self._embed([], [*prefix, *self._fit(ids), *suffix]),
            )
        if suffix:
            yield self._variant(
                "the prompt's suffix is lost", lambda ids: self._embed(prefix, self._fit(ids))
            )
            yield self._variant(
                "the prompt's suffix is not pooled",
                lambda ids: self._embed(prefix, self._fit(ids), suffix),
            )

    def _list_poolings(self) -> Iterator[Variant]:
        if self.tested.config.text_pooling == "mean":
            other, name = "last_token", "last-token pooling instead of the mean"
        else:
            other, name = "mean", "mean pooling instead of the last token"
        yield self._variant(name, partial(self._enclose, pooling=other))
        yield self._variant(
            "first-token (CLS) pooling",
            lambda ids: self._embed([], [*self.prefix, *self._fit(ids), *self.suffix], first=True),
        )

        def encode_other_direction(texts: Sequence[str]) -> Tensor:
            with _other_direction(self.tested):
                return self._per_text(self._enclose)(texts)

        wrong = "causal" if self.tested.config.bidirectional else "bidirectional"
        yield Variant(f"attention is {wrong}", encode_other_direction)

    def _list_heads(self) -> Iterator[Variant]:
        model = self.tested.model
        heads: dict[str, Callable[[Tensor], Tensor]] = {
            "the text adapter is left out": model.text_projection,
            "text adapter and projection are left out": lambda pooled: pooled,
            "the text projection is left out": model.text_adapter,
        }
        for name, head in heads.items():
            yield self._variant(name, partial(self._enclose, head=head))

    def _list_truncations(self, longest: int) -> Iterator[Variant]:
        """List other lengths than the model's, other ends, and none at all."""
        room = self.limit - len(self.prefix) - len(self.suffix)
        lengths = {*_COMMON_LENGTHS, self.limit // 2, room} - {self.limit}
        for length in sorted(lengths):
            space = length - len(self.prefix) - len(self.suffix)
            if 0 < space < longest:
                yield self._variant(
                    f"texts are truncated to {length} tokens, not to {self.limit}",
                    partial(self._embed_beginning, space),
                )
        if longest <= room:
            return
        yield self._variant(
            "truncation cuts off the prompt's suffix",
            lambda ids: self._embed(
                self.prefix, [*ids, *self.suffix][: self.limit - len(self.prefix)]
            ),
        )
        yield self._variant(
            "truncation keeps the end of a text, not its beginning",
            lambda ids: self._embed(self.prefix, [*ids[-room:], *self.suffix]),
        )
        positions = getattr(self.tested.config.text_config, "max_position_embeddings", None)
        if positions is None or len(self.prefix) + longest + len(self.suffix) <= positions:
            yield self._variant(
                "long texts are not truncated",
                lambda ids: self._embed(self.prefix, [*ids, *self.suffix]),
            )
        yield self._variant("long texts are split, and their parts averaged", self._average_parts)

    def _embed_beginning(self, num_tokens: int, ids: list[int]) -> Tensor:
        return self._embed(self.prefix, [*ids[:num_tokens], *self.suffix])

    def _average_parts(self, ids: list[int]) -> Tensor:
        room = self.limit - len(self.prefix) - len(self.suffix)
        parts = [ids[start : start + room] for start in range(0, len(ids), room)]
        weights = torch.tensor([len(part) for part in parts], dtype=torch.float32).unsqueeze(1)
        embeds = torch.cat([self._enclose(part) for part in parts])  # (parts, P)
        return F.normalize((embeds * weights).sum(0, keepdim=True), dim=-1)

    def _variant(self, name: str, embed: Callable[[list[int]], Tensor]) -> Variant:
        return Variant(name, self._per_text(embed))

    def _per_text(self, embed: Callable[[list[int]], Tensor]) -> Callable[[Sequence[str]], Tensor]:
        return lambda texts: torch.cat([embed(self.list_ids(text)) for text in texts])

    def _fit(self, ids: list[int]) -> list[int]:
        return ids[: self.limit - len(self.prefix) - len(self.suffix)]

    def _enclose(self, ids: list[int], **options: Any) -> Tensor:
        """Embed a text as the model does, but for the options."""
        return self._embed(self.prefix, [*self._fit(ids), *self.suffix], **options)

    @torch.no_grad()
    def _embed(
        self,
        before: list[int],
        pooled: list[int],
        after: Sequence[int] = (),
        *,
        pooling: str | None = None,
        first: bool = False,
        head: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Run the LLM on token ids, and pool those in the middle; returns (1, width)."""
        tested = self.tested
        row = torch.tensor([[*before, *pooled, *after]], device=tested.device)
        hidden = tested.model.text_model(
            input_ids=row, attention_mask=torch.ones_like(row), use_cache=False
        ).last_hidden_state  # (1, L, D)
        if first:
            embeds = hidden[:, 0].float()
        else:
            mask = torch.zeros_like(row, dtype=torch.bool)
            mask[:, len(before) : len(before) + len(pooled)] = True
            embeds = pool_tokens(hidden, mask, pooling=pooling or tested.config.text_pooling)
        head = head or tested.model.project_caption_embeds
        return F.normalize(head(embeds).float(), dim=-1).cpu()


def list_image_variants(tested: ModelUnderTest, images: Sequence[Any]) -> list[Variant]:
    """List errors in how a server prepares and encodes images."""
    variants = [
        Variant(
            "transparency is not put on white",
            lambda images: tested.encode_images([_without_alpha(image) for image in images]),
        ),
        Variant(
            "the EXIF rotation is not applied",
            lambda images: tested.encode_images([_without_exif(image) for image in images]),
        ),
        Variant(
            "images are cropped to a square where the model stretches them",
            lambda images: tested.encode_images([_crop_square(image) for image in images]),
        ),
        Variant(
            "images are stretched to a square where the model crops them",
            lambda images: tested.encode_images([_stretch_square(image) for image in images]),
        ),
        Variant("the visual projection is left out", partial(_encode_unprojected, tested)),
        *_list_pixel_variants(tested),
    ]
    variants += [
        Variant(name, partial(_encode_changed_images, tested, change))
        for name, change in list_image_changes(list(images))
    ]
    current = getattr(tested.processor.image_processor, "resample", None)
    return variants + [
        Variant(
            f"images are resized by {method.name.lower()} interpolation",
            partial(_encode_resampled, tested, method),
        )
        for method in _INTERPOLATIONS
        if current is not None and int(current) != int(method)
    ]


def _list_pixel_variants(tested: ModelUnderTest) -> Iterator[Variant]:
    processor = tested.processor.image_processor
    mean, std = (getattr(processor, name, None) for name in ("image_mean", "image_std"))
    if mean is None or std is None or not getattr(processor, "do_normalize", True):
        return
    if hasattr(processor, "patch_size"):  # pixels come in patches, without an axis of channels
        return
    own = _to_statistics(mean, std)

    def encode(change: Callable[[Tensor], Tensor], images: Sequence[Any]) -> Tensor:
        batch = tested.processor(images=list(images))
        batch["pixel_values"] = change(batch["pixel_values"] * own.std + own.mean)
        return _encode_batch(tested, batch)

    yield Variant(
        "pixels are not normalized by mean and std", partial(encode, lambda pixels: pixels)
    )
    yield Variant(
        "the color channels are BGR, not RGB",
        partial(encode, lambda pixels: own.normalize(pixels.flip(1))),
    )
    for name, statistics in _PIXEL_STATISTICS.items():
        other = _to_statistics(*statistics)
        if not all(torch.allclose(a, b, atol=1e-3) for a, b in zip(own, other, strict=True)):
            yield Variant(
                f"pixels are normalized by {name} mean and std", partial(encode, other.normalize)
            )


class _Statistics(NamedTuple):
    """Mean and std of pixels, (1, 3, 1, 1) each."""

    mean: Tensor
    std: Tensor

    def normalize(self, pixels: Tensor) -> Tensor:
        return (pixels - self.mean) / self.std


def _to_statistics(mean: Sequence[float], std: Sequence[float]) -> _Statistics:
    return _Statistics(*(torch.tensor(one).view(1, 3, 1, 1) for one in (mean, std)))


@torch.no_grad()
def _encode_batch(tested: ModelUnderTest, batch: Any) -> Tensor:
    batch = batch.to(tested.device)
    return F.normalize(tested.model.get_image_features(**batch).pooler_output, dim=-1).cpu()


def _encode_changed_images(
    tested: ModelUnderTest,
    change: Callable[[Image.Image], Image.Image],
    images: Sequence[Image.Image],
) -> Tensor:
    return tested.encode_images([change(image) for image in images])


@torch.no_grad()
def _encode_unprojected(tested: ModelUnderTest, images: Sequence[Any]) -> Tensor:
    batch = tested.processor(images=list(images)).to(tested.device)
    return F.normalize(tested.model.get_vision_embeds(**batch), dim=-1).cpu()


def _encode_resampled(
    tested: ModelUnderTest, method: Image.Resampling, images: Sequence[Any]
) -> Tensor:
    processor = copy.deepcopy(tested.processor)
    processor.image_processor.resample = method
    return _encode_batch(tested, processor(images=list(images)))


def _without_alpha(image: Image.Image) -> Image.Image:
    return image.convert("RGB") if image.mode == "RGBA" else image


def _without_exif(image: Image.Image) -> Image.Image:
    # Pixels alone: a copy keeps the EXIF data.
    return Image.frombytes(image.mode, image.size, image.tobytes())


def _crop_square(image: Image.Image) -> Image.Image:
    image = load_images(image)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _stretch_square(image: Image.Image) -> Image.Image:
    image = load_images(image)
    side = min(image.size)
    return image.resize((side, side), Image.Resampling.BICUBIC)


@contextmanager
def _other_direction(tested: ModelUnderTest) -> Iterator[None]:
    text_model, bidirectional = tested.model.text_model, tested.config.bidirectional
    with tested.model.text_forward_lock():
        set_attention_direction(text_model, bidirectional=not bidirectional)
        try:
            yield
        finally:
            set_attention_direction(text_model, bidirectional=bidirectional)
