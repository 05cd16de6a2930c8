"""Each error of an endpoint, and each proxy that changes something, is found.

The proxies were not written for the checks.
"""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from breaking import find
from endpoints import (
    Break,
    Endpoint,
    alter_texts,
    cut_suffix_off,
    ignore_mask,
    keep_lengths,
    lose_prompt,
    pool_prefix,
    serve_tower,
    set_attributes,
    set_causal,
    set_dtype,
    set_pooling,
    share_state,
    truncate_at,
)
from PIL import Image, ImageFilter, ImageOps
from proxies import (
    cache_images,
    cache_texts,
    change_images,
    change_texts,
    drop_repeated,
    keep_half,
    look_alike,
    pad_square,
    recompress,
    round_weights,
    shrink,
    strip_marks,
)
from server_checking import check

from modeling_llm2clip.doctor.served_inputs import EXACT_TEXTS, render_photographs

DIFFER = "embeddings differ by up to"
MIXED_UP = "Inputs are mixed up: .* got the embedding of "
NFC, NFD, NFKC = (partial(unicodedata.normalize, form) for form in ("NFC", "NFD", "NFKC"))


def embed_blank(endpoint: Endpoint) -> None:
    endpoint.refuses_blank = False
    change_texts(str)(endpoint)


def swap_channels(content: bytes) -> Image.Image:
    red, green, blue, alpha = Image.open(io.BytesIO(content)).convert("RGBA").split()
    return Image.merge("RGBA", (blue, green, red, alpha))


def drop_alpha(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def flatten_only(*modes: str) -> Callable[[bytes], Image.Image]:
    """Decode images of these modes as the model does, and others as Pillow does."""

    def decode(content: bytes) -> Image.Image:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
        return image if image.mode in modes else Image.fromarray(np.asarray(image.convert("RGB")))

    return decode


def strip_special(endpoint: Endpoint) -> None:
    tokens = "|".join(map(re.escape, endpoint.processor.tokenizer.all_special_tokens))
    change_texts(lambda text: re.sub(tokens, "", text))(endpoint)


def cut_wrongly_below(share: float) -> Break:
    """Return the last dimensions in place of the first ones below a share of them."""

    def apply(endpoint: Endpoint) -> None:
        honest = endpoint.answer

        def answer(body: dict[str, Any]) -> dict[str, Any]:
            count, full = body.get("dimensions"), endpoint.model.config.projection_dim
            if count is None or (share == 0.5) == (count == full // 2):
                return honest(body)
            rows = F.normalize(endpoint.embed(body)[:, -count:], dim=-1).tolist()
            return {"data": [{"index": n, "embedding": row} for n, row in enumerate(rows)]}

        endpoint.answer = answer  # type: ignore[method-assign]

    return apply


def swap_base64(endpoint: Endpoint) -> None:
    """Swap the first rows of large answers in base64."""
    honest = endpoint.answer

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        reply = honest(body)
        data = reply["data"]
        if body.get("encoding_format") == "base64" and len(data) > 20:
            data[0]["embedding"], data[1]["embedding"] = data[1]["embedding"], data[0]["embedding"]
        return reply

    endpoint.answer = answer  # type: ignore[method-assign]


def spoil_last(embeds: torch.Tensor) -> torch.Tensor:
    return torch.cat([embeds[:-1], embeds[-1:] * torch.nan])


def finish(change: Callable[[torch.Tensor], torch.Tensor]) -> Break:
    return set_attributes(finish=change)


# A way to break an endpoint, the check that must fail, and what it must say.
CASES: dict[str, tuple[Break, str, str]] = {
    "last-token pooling": (set_pooling, "texts", DIFFER),
    "prompt lost": (lose_prompt, "texts", "The prompt is missing"),
    "prefix pooled": (pool_prefix, "texts", DIFFER),
    "causal attention": (set_causal, "texts", DIFFER),
    "LLM alone": (serve_tower, "texts", DIFFER),
    "not normalized": (keep_lengths, "texts", "not normalized: lengths are"),
    "instruction added": (change_texts("Find an image: ".__add__), "texts", DIFFER),
    "float16": (set_dtype(torch.float16), "texts", DIFFER),
    "8-bit weights": (round_weights, "texts", DIFFER),
    "2 decimals": (finish(lambda embeds: embeds.round(decimals=2)), "texts", DIFFER),
    "NaN": (finish(spoil_last), "texts", "have NaN or infinity"),
    "dimensions cut off": (
        finish(lambda embeds: F.normalize(embeds[:, :8], dim=-1)), "texts",
        "have 8 dimensions, the model's have 32",
    ),
    "half of the dimensions": (finish(keep_half), "texts", DIFFER),
    "truncated early": (truncate_at(64), "mixed lengths", DIFFER),
    "suffix cut off": (cut_suffix_off, "long text", DIFFER),
    "padding pooled": (ignore_mask, "batched texts", DIFFER),
    "rows sorted by length": (
        alter_texts(lambda honest, texts: honest(sorted(texts, key=len, reverse=True))),
        "batched texts", MIXED_UP,
    ),
    "rows sorted as strings": (  # in which 10 comes before 2
        alter_texts(
            lambda honest, texts: honest([texts[n] for n in sorted(range(len(texts)), key=str)])
        ),
        "batched texts", MIXED_UP,
    ),
    "one row for all": (
        alter_texts(lambda honest, texts: honest(texts[:1]).expand(len(texts), -1)),
        "batched texts", MIXED_UP,
    ),
    "repeated texts": (drop_repeated, "batched texts", MIXED_UP),
    "shared state": (share_state, "concurrent texts", f"requests at once: .*{MIXED_UP}"),
    "blank accepted": (
        set_attributes(refuses_blank=False), "empty text", r"\[''\]: .* answered 500"
    ),
    "blank embedded": (
        embed_blank, "empty text", r"\['   '\] gets a response without an error"
    ),
    "base64 of float64": (set_attributes(base64_dtype="<f8"), "base64", "have 64 dimensions"),
    "base64 of big endian": (set_attributes(base64_dtype=">f4"), "base64", DIFFER),
    "rows of base64 swapped": (swap_base64, "base64", MIXED_UP),
    "half of the dimensions only": (cut_wrongly_below(0.5), "dimensions", "first 8, renormalized"),
    "dimensions but half": (cut_wrongly_below(1), "dimensions", "first 16, renormalized"),
    "pixels not normalized": (
        set_attributes(pixels=lambda pixels: pixels * 0.27 + 0.45), "images", DIFFER
    ),
    "BGR": (set_attributes(decode=swap_channels), "images", DIFFER),
    "alpha dropped": (set_attributes(decode=drop_alpha), "image decoding", r"image 0 \(RGBA, "),
    "special tokens": (strip_special, "exact texts", DIFFER),
    **{
        f"no {mode}": (
            set_attributes(decode=flatten_only(*({"RGBA", "LA", "P", "I;16"} - {mode}))),
            "image decoding", rf"1 of 5 embeddings .*: image \d \({mode}, ",
        )
        for mode in ("LA", "P", "I;16")
    },
    "GIF": (recompress("GIF"), "images", DIFFER),
    "cache of alike images": (
        cache_images(lambda image: (image.size, look_alike(image))), "photographs",
        r"image 5 .* got the .* of image 0",
    ),
    "cache by size": (
        cache_images(lambda image: image.size), "photographs", r"image 5 .* got the .* of image 0"
    ),
}  # fmt: skip
REWRITTEN: dict[str, tuple[Callable[[str], str], str]] = {
    "lowercased": (str.lower, "texts"),
    "NFKC": (NFKC, "exact texts"),
    "NFC": (NFC, "exact texts"),
    "NFD": (NFD, "texts"),
    "newlines": (lambda text: text.replace("\n", " "), "exact texts"),
    "whitespace": (lambda text: re.sub(r"\s+", " ", text).strip(), "exact texts"),
    "one line": (lambda text: " ".join(text.splitlines()), "exact texts"),
    "no-break spaces": (lambda text: " ".join(text.split("\N{NO-BREAK SPACE}")), "exact texts"),
    "all kinds of spaces": (
        lambda text: re.sub("[\u00a0\u2000-\u200b\u202f\u3000]", " ", text), "exact texts"
    ),
    "accents": (strip_marks, "texts"),
    "ASCII": (lambda text: text.encode("ascii", "ignore").decode(), "texts"),
    "emoji": (lambda text: re.sub("[\U0001f300-\U0001faff]", "", text), "texts"),
    "quotes": (lambda text: text.translate(str.maketrans("“”’", "\"\"'")), "exact texts"),
    "escaped": (
        lambda text: text.replace("&", "&amp;").replace("<", "&lt;"), "exact texts"
    ),
    "no markup": (lambda text: re.sub(r"</?\w+>", "", text), "exact texts"),
    "cut at 100": (lambda text: text[:100], "exact texts"),
    "cut at 20 words": (lambda text: " ".join(text.split(" ")[:20]), "exact texts"),
}  # fmt: skip
CACHED: dict[str, Callable[[str], str]] = {
    "beginning": lambda text: text[:100],
    "both ends": lambda text: text[:50] + text[-50:],
    "lowercase": str.lower,
    "whitespace": lambda text: " ".join(text.split()),
    "words": lambda text: re.sub(r"[^\w\s]", "", text),
}
CHANGED_IMAGES: dict[str, tuple[Break, str]] = {
    "nearest, 256": (shrink(256, Image.Resampling.NEAREST), "photographs"),
    "JPEG 75": (recompress("JPEG", quality=75), "images"),
    "JPEG 95, full chroma": (recompress("JPEG", quality=95, subsampling=0), "images"),
    "WebP": (recompress("WEBP", quality=80), "images"),
    "gray": (change_images(lambda image: image.convert("L").convert("RGB")), "images"),
    "padded": (change_images(pad_square), "images"),
    "sharpened": (change_images(lambda image: image.filter(ImageFilter.SHARPEN)), "images"),
}
ALL = {
    **CASES,
    **{name: (change_texts(change), where, "") for name, (change, where) in REWRITTEN.items()},
    **{f"cached by {k}": (cache_texts(v), "exact texts", MIXED_UP) for k, v in CACHED.items()},
    **{name: (*case, DIFFER) for name, case in CHANGED_IMAGES.items()},
}
# Another of its kind is in the default suite.
SLOW = {
    "sharpened", "cache by size", "cached by lowercase", "cached by whitespace", "cached by words",
    "cached by both ends", "all kinds of spaces", "escaped",
    "no markup", "cut at 100", "NFC", "NFD", "gray", "JPEG 95, full chroma", "accents", "ASCII",
    "one line", "quotes", "rows sorted by length", "WebP", "padded", "half of the dimensions",
    "base64 of big endian", "float16",
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in ALL]
)
def test_an_error_of_an_endpoint_is_found(name: str, served: Path) -> None:
    break_it, failing, says = ALL[name]
    with Endpoint(served, break_it) as endpoint:
        report = check(served, endpoint, failing)
    result = find(report, failing)
    assert (result.passed, result.skipped) == (False, False), str(report)
    assert re.search(says, result.message), result.message
    assert report.failed == [result]  # nothing before it was harmed, or it would have said so first


def test_the_inputs_are_the_same_each_time_and_have_what_servers_rewrite() -> None:
    first = [image.tobytes() for image in render_photographs()]
    render_photographs.cache_clear()
    assert first == [image.tobytes() for image in render_photographs()]
    sizes = {image.size for image in render_photographs()}
    assert (640, 427) in sizes and max(max(size) for size in sizes) > 1024
    text = "".join(EXACT_TEXTS)
    assert all(normalize(text) != text for normalize in (NFC, NFD, NFKC))
    rewritten = ("\n", "\r\n", "  ", "\u200d", "\u00a0", "\u200b", "\u3000")
    assert [part for part in rewritten if part not in text] == []
