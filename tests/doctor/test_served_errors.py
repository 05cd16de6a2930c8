"""Each error of an endpoint, and each proxy that changes something, is found and rightly named.

The proxies were not written for the checks. Where a cause is not known, the report says so.
"""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Callable
from functools import partial
from pathlib import Path

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
from PIL import Image, ImageFilter
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
from tiny import tiny_model

from modeling_llm2clip.doctor.served_inputs import EXACT_TEXTS, render_photographs
from modeling_llm2clip.model_folders.model_writing import save_model

UNKNOWN = r"No known error gives them(?!.*(served-dtype|cross-talk))"
CACHE = r"has that of .*Each was sent alone, so that a cache, or a change of the inputs"
UNNAMED = f"{UNKNOWN}|{CACHE}"
NFC, NFD, NFKC = (partial(unicodedata.normalize, form) for form in ("NFC", "NFD", "NFKC"))


def embed_blank(endpoint: Endpoint) -> None:
    endpoint.refuses_blank = False
    change_texts(str)(endpoint)


def swap_channels(content: bytes) -> Image.Image:
    red, green, blue, alpha = Image.open(io.BytesIO(content)).convert("RGBA").split()
    return Image.merge("RGBA", (blue, green, red, alpha))


def drop_alpha(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def spoil_last(embeds: torch.Tensor) -> torch.Tensor:
    return torch.cat([embeds[:-1], embeds[-1:] * torch.nan])


def add_noise(embeds: torch.Tensor) -> torch.Tensor:
    noise = torch.randn(embeds.shape, generator=torch.Generator().manual_seed(0))
    return embeds + 0.004 * noise


def finish(change: Callable[[torch.Tensor], torch.Tensor]) -> Break:
    """Change the embeddings of each answer."""
    return set_attributes(finish=change)


# A way to break an endpoint, the check that must fail, and what it must say.
CASES: dict[str, tuple[Break, str, str]] = {
    "last-token pooling": (set_pooling, "texts", "'last_token' pooling instead of 'mean'"),
    "prompt lost": (lose_prompt, "texts", "the prompt is lost"),
    "prefix pooled": (pool_prefix, "texts", "the prompt's prefix is pooled too"),
    "causal attention": (set_causal, "texts", "attention is causal"),
    "LLM alone": (serve_tower, "texts", "text adapter and projection are left out"),
    "not normalized": (keep_lengths, "texts", r"not normalized: lengths are .* not 1"),
    "instruction added": (
        change_texts("Find an image: ".__add__), "texts", "texts get the instruction 'query'"
    ),
    "float16": (set_dtype(torch.float16), "texts", "computing in float16 .*--served-dtype"),
    "bfloat16": (set_dtype(torch.bfloat16), "texts", "computing in bfloat16"),
    "8-bit weights": (round_weights, "texts", UNKNOWN),
    "int8": (
        finish(lambda embeds: (embeds * 127 / embeds.abs().max()).round()), "texts",
        "the values are integers",
    ),
    "2 decimals": (
        finish(lambda embeds: embeds.round(decimals=2)), "texts",
        "the values are rounded to 2 decimals",
    ),
    "bfloat16 values": (
        finish(lambda embeds: embeds.bfloat16().float()), "texts",
        "the values are rounded to bfloat16",
    ),
    "NaN": (finish(spoil_last), "texts", "have NaN or infinity"),
    "zeros": (finish(torch.zeros_like), "texts", "are zero"),
    "noise": (finish(add_noise), "texts", UNKNOWN),
    "dimensions cut off": (
        finish(lambda embeds: F.normalize(embeds[:, :8], dim=-1)), "texts",
        "have 8 dimensions, the model's have 32: only the first 8 dimensions",
    ),
    "half of the dimensions": (finish(keep_half), "texts", UNKNOWN),
    "truncated early": (truncate_at(64), "mixed lengths", "truncated to 64 tokens, not to 128"),
    "suffix cut off": (cut_suffix_off, "long text", "cuts off the prompt's suffix"),
    "padding pooled": (
        ignore_mask, "batched texts", "padding on the right is attended to and pooled"
    ),
    "rows sorted by length": (
        alter_texts(lambda honest, texts: honest(sorted(texts, key=len, reverse=True))),
        "batched texts", "have another input's embedding: .*cross-talk",
    ),
    "rows sorted as strings": (  # in which 10 comes before 2
        alter_texts(
            lambda honest, texts: honest([texts[n] for n in sorted(range(len(texts)), key=str)])
        ),
        "batched texts", "has that of .*cross-talk",
    ),
    "one row for all": (
        alter_texts(lambda honest, texts: honest(texts[:1]).expand(len(texts), -1)),
        "batched texts", "inputs have one embedding",
    ),
    "repeated texts": (drop_repeated, "batched texts", "has that of"),
    "shared state": (share_state, "concurrent texts", "requests at once: .*cross-talk"),
    "blank accepted": (
        set_attributes(refuses_blank=False), "empty text", r"\[''\]: .* answered 500"
    ),
    "blank embedded": (
        embed_blank, "empty text", r"\['   '\] gets an answer without an error"
    ),
    "base64 of float64": (set_attributes(base64_dtype="<f8"), "base64", "different embeddings"),
    "base64 of big endian": (set_attributes(base64_dtype=">f4"), "base64", "different embeddi"),
    "pixels not normalized": (
        set_attributes(pixels=lambda pixels: pixels * 0.27 + 0.45), "images", "not normalized by m"
    ),
    "BGR": (set_attributes(decode=swap_channels), "images", "color channels are BGR"),
    "alpha dropped": (
        set_attributes(decode=drop_alpha), "image decoding", "transparency is not put on white"
    ),
    "GIF": (recompress("GIF"), "images", "reduced to 256 colors|" + UNKNOWN),
    "cache of alike images": (
        cache_images(lambda image: (image.size, look_alike(image))), "photographs",
        "image 5 has that of image 0.*Each was sent alone, so that a cache",
    ),
    "cache by size": (
        cache_images(lambda image: image.size), "photographs", "image 5 has that of image 0"
    ),
}  # fmt: skip
REWRITTEN: dict[str, tuple[Callable[[str], str], str, str]] = {
    "lowercased": (str.lower, "texts", "texts are lowercased"),
    "case-folded": (str.casefold, "texts", "texts are lowercased"),
    "NFKC": (NFKC, "exact texts", "normalized to NFKC"),
    "NFC": (NFC, "exact texts", "normalized to NFC "),
    "NFD": (NFD, "texts", UNNAMED),
    "newlines": (
        lambda text: text.replace("\n", " "), "exact texts",
        ": line breaks are replaced by spaces",
    ),
    "whitespace": (
        lambda text: re.sub(r"\s+", " ", text).strip(), "exact texts", "whitespace is collapsed"
    ),
    "one line": (lambda text: " ".join(text.splitlines()), "exact texts", UNNAMED),
    "no-break spaces": (
        lambda text: " ".join(text.split("\N{NO-BREAK SPACE}")), "exact texts", UNNAMED
    ),
    "space separators": (
        lambda text: "".join(" " if unicodedata.category(c) == "Zs" else c for c in text),
        "exact texts", UNNAMED,
    ),
    "all kinds of spaces": (
        lambda text: re.sub("[\u00a0\u2000-\u200b\u202f\u3000]", " ", text), "exact texts", UNNAMED
    ),
    "accents": (strip_marks, "texts", UNNAMED),
    "ASCII": (lambda text: text.encode("ascii", "ignore").decode(), "texts", UNNAMED),
    "question marks": (lambda text: text.encode("ascii", "replace").decode(), "texts", UNNAMED),
    "emoji": (lambda text: re.sub("[\U0001f300-\U0001faff]", "", text), "texts", UNNAMED),
    "quotes": (
        lambda text: text.translate(str.maketrans("“”’", "\"\"'")), "exact texts", UNNAMED
    ),
    "escaped": (
        lambda text: text.replace("&", "&amp;").replace("<", "&lt;"), "exact texts", UNNAMED
    ),
    "no markup": (lambda text: re.sub(r"</?\w+>", "", text), "exact texts", UNNAMED),
    "cut at 100": (lambda text: text[:100], "exact texts", UNNAMED),
    "cut at an odd length": (lambda text: text[:123], "exact texts", UNNAMED),
    "cut at 20 words": (lambda text: " ".join(text.split(" ")[:20]), "exact texts", UNNAMED),
}  # fmt: skip
CACHED: dict[str, Callable[[str], str]] = {
    "beginning": lambda text: text[:100],
    "end": lambda text: text[-100:],
    "both ends": lambda text: text[:50] + text[-50:],
    "lowercase": str.lower,
    "whitespace": lambda text: " ".join(text.split()),
    "NFKC": NFKC,
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
    **{name: (change_texts(case[0]), *case[1:]) for name, case in REWRITTEN.items()},
    **{f"cached by {k}": (cache_texts(v), "exact texts", CACHE) for k, v in CACHED.items()},
    **{name: (*case, UNKNOWN) for name, case in CHANGED_IMAGES.items()},
}
# Another of its kind is in the default suite.
SLOW = {
    "sharpened", "cache by size", "cached by end", "cached by lowercase", "cached by whitespace",
    "cached by NFKC", "cached by words", "cached by both ends", "all kinds of spaces",
    "space separators", "escaped", "no markup", "cut at 100", "cut at an odd length", "NFC", "NFD",
    "case-folded", "question marks", "gray", "JPEG 95, full chroma", "accents", "ASCII",
    "one line", "quotes", "rows sorted by length", "bfloat16 values", "zeros", "WebP", "padded",
    "half of the dimensions", "base64 of big endian", "float16",
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in ALL]
)
def test_an_error_of_an_endpoint_is_found_and_named(name: str, served: Path) -> None:
    break_it, failing, says = ALL[name]
    with Endpoint(served, break_it) as endpoint:
        report = check(served, endpoint, failing)
    result = find(report, failing)
    assert (result.passed, result.skipped) == (False, False), str(report)
    assert re.search(says, result.message), result.message
    assert report.failed == [result]  # nothing before it was harmed, or it would have said so first


@pytest.mark.slow
def test_texts_cut_off_at_2000_characters_are_no_matter_of_precision(tmp_path: Path) -> None:
    """The model reads 2,500 characters, as real ones do."""
    folder = save_model(*tiny_model(max_text_length=1500), tmp_path / "model")
    names = ("exact texts", "batched texts", "mixed lengths", "concurrent texts", "long text")
    with Endpoint(folder, change_texts(lambda text: text[:2000])) as endpoint:
        report = check(folder, endpoint, *names)
    assert report.failed[-1].name == "long text"
    for result in report.failed:
        assert re.search(UNNAMED, result.message), result.message
        assert "served-dtype" not in result.message


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
