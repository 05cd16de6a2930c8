"""Whatever changes something between a client and a model is found, and rightly named.

The proxies were not written for the checks. Where a cause is not known, the report says so.
"""

from __future__ import annotations

import re
import unicodedata
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from breaking import find
from endpoints import Break, Endpoint
from PIL import Image, ImageFilter
from proxies import (
    cache_images,
    cache_texts,
    change_embeddings,
    change_images,
    change_texts,
    drop_repeated,
    keep_half,
    look_alike,
    pad_square,
    recompress,
    round_weights,
    shrink,
    shuffle_batches,
    sort_as_strings,
    strip_marks,
)
from tiny import tiny_model

from modeling_llm2clip.configs.serve_config import ServerCheckConfig
from modeling_llm2clip.doctor import server_checks
from modeling_llm2clip.doctor.served_inputs import EXACT_TEXTS, render_photographs
from modeling_llm2clip.doctor.server_checks import check_server
from modeling_llm2clip.model_folders.model_writing import save_model

UNKNOWN = r"No known error gives them(?!.*(served-dtype|cross-talk))"
CACHE = r"has that of .*Each was sent alone, so that a cache, or a change of the inputs"
UNNAMED = f"{UNKNOWN}|{CACHE}"
NEAREST = Image.Resampling.NEAREST


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, processor = tiny_model(max_text_length=256)
    return save_model(model, processor, tmp_path_factory.mktemp("proxied") / "model")


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that reads 2,500 characters, as real ones do."""
    model, processor = tiny_model(max_text_length=1500)
    return save_model(model, processor, tmp_path_factory.mktemp("long") / "model")


class Case(NamedTuple):
    """A proxy, the check that must fail, and what it must say."""

    proxy: Break
    check: str
    says: str


TEXTS = {
    "NFKC": Case(
        change_texts(partial(unicodedata.normalize, "NFKC")), "exact texts", "normalized to NFKC"
    ),
    "NFC": Case(
        change_texts(partial(unicodedata.normalize, "NFC")), "exact texts", "normalized to NFC "
    ),
    "NFD": Case(
        change_texts(partial(unicodedata.normalize, "NFD")), "texts", UNNAMED
    ),
    "newlines": Case(
        change_texts(lambda text: text.replace("\n", " ")), "exact texts",
        ": line breaks are replaced by spaces",
    ),
    "one line": Case(
        change_texts(lambda text: " ".join(text.splitlines())), "exact texts",
        UNNAMED,
    ),
    "whitespace": Case(
        change_texts(lambda text: re.sub(r"\s+", " ", text).strip()), "exact texts",
        "whitespace is collapsed",
    ),
    "no-break spaces": Case(
        change_texts(lambda text: " ".join(text.split("\N{NO-BREAK SPACE}"))), "exact texts",
        UNNAMED,
    ),
    "space separators": Case(
        change_texts(
            lambda text: "".join(" " if unicodedata.category(c) == "Zs" else c for c in text)
        ),
        "exact texts", UNNAMED,
    ),
    "all kinds of spaces": Case(
        change_texts(lambda text: re.sub("[\u00a0\u2000-\u200b\u202f\u3000]", " ", text)),
        "exact texts", UNNAMED,
    ),
    "accents": Case(change_texts(strip_marks), "texts", UNNAMED),
    "lowercased": Case(change_texts(str.lower), "texts", "texts are lowercased"),
    "case-folded": Case(change_texts(str.casefold), "texts", "texts are lowercased"),
    "ASCII": Case(
        change_texts(lambda text: text.encode("ascii", "ignore").decode()), "texts", UNNAMED
    ),
    "question marks": Case(
        change_texts(lambda text: text.encode("ascii", "replace").decode()), "texts",
        UNNAMED,
    ),
    "emoji": Case(
        change_texts(lambda text: re.sub("[\U0001f300-\U0001faff]", "", text)), "texts",
        UNNAMED,
    ),
    "quotes": Case(
        change_texts(lambda text: text.replace("“", '"').replace("”", '"').replace("’", "'")),
        "exact texts", UNNAMED,
    ),
    "escaped": Case(
        change_texts(lambda text: text.replace("&", "&amp;").replace("<", "&lt;")),
        "exact texts", UNNAMED,
    ),
    "no markup": Case(
        change_texts(lambda text: re.sub(r"</?\w+>", "", text)), "exact texts",
        UNNAMED,
    ),
    "cut at 100": Case(
        change_texts(lambda text: text[:100]), "exact texts", UNNAMED
    ),
    "cut at an odd length": Case(
        change_texts(lambda text: text[:123]), "exact texts", UNNAMED
    ),
    "cut at 20 words": Case(
        change_texts(lambda text: " ".join(text.split(" ")[:20])), "exact texts", UNNAMED
    ),
    "cache by the beginning": Case(
        cache_texts(lambda text: text[:100]), "exact texts",
        CACHE,
    ),
    "cache by the end": Case(
        cache_texts(lambda text: text[-100:]), "exact texts",
        CACHE,
    ),
    "cache without case": Case(
        cache_texts(str.lower), "exact texts",
        CACHE,
    ),
    "shuffled": Case(shuffle_batches, "batched texts", r"another input's embedding: .*cross-talk"),
    "repeated texts": Case(drop_repeated, "batched texts", "has that of"),
    "cache without whitespace": Case(
        cache_texts(lambda text: " ".join(text.split())), "exact texts", CACHE
    ),
    "cache by NFKC": Case(
        cache_texts(partial(unicodedata.normalize, "NFKC")), "exact texts", CACHE
    ),
    "cache without punctuation": Case(
        cache_texts(lambda text: re.sub(r"[^\w\s]", "", text)), "exact texts", CACHE
    ),
    "cache by both ends": Case(
        cache_texts(lambda text: text[:50] + text[-50:]), "exact texts", CACHE
    ),
    "rows sorted as strings": Case(sort_as_strings, "batched texts", "has that of .*cross-talk"),
    "2 decimals": Case(
        change_embeddings(lambda embeds: embeds.round(decimals=2)), "texts",
        "the values are rounded to 2 decimals",
    ),
    "3 decimals": Case(
        change_embeddings(lambda embeds: embeds.round(decimals=3)), "texts",
        "the values are rounded to 3 decimals",
    ),
    "bfloat16 values": Case(
        change_embeddings(lambda embeds: embeds.bfloat16().float()), "texts",
        "the values are rounded to bfloat16",
    ),
    "8-bit weights": Case(round_weights, "texts", UNKNOWN),
    "noise": Case(
        change_embeddings(
            lambda embeds: embeds
            + 0.004 * torch.randn(embeds.shape, generator=torch.Generator().manual_seed(0))
        ),
        "texts", UNKNOWN,
    ),
    "half of the dimensions": Case(change_embeddings(keep_half), "texts", UNKNOWN),
}  # fmt: skip
IMAGES = {
    "nearest, 256": Case(
        shrink(256, NEAREST), "photographs", UNKNOWN
    ),
    "JPEG 75": Case(recompress("JPEG", quality=75), "images", UNKNOWN),
    "JPEG 95, full chroma": Case(
        recompress("JPEG", quality=95, subsampling=0), "images", UNKNOWN
    ),
    "WebP": Case(recompress("WEBP", quality=80), "images", UNKNOWN),
    "GIF": Case(recompress("GIF"), "images", "reduced to 256 colors|" + UNKNOWN),
    "gray": Case(
        change_images(lambda image: image.convert("L").convert("RGB")), "images", UNKNOWN
    ),
    "padded": Case(change_images(pad_square), "images", UNKNOWN),
    "sharpened": Case(
        change_images(lambda image: image.filter(ImageFilter.SHARPEN)), "images", UNKNOWN
    ),
    "cache of alike images": Case(
        cache_images(lambda image: (image.size, look_alike(image))), "photographs",
        "image 5 has that of image 0.*Each was sent alone, so that a cache",
    ),
    "cache by size": Case(
        cache_images(lambda image: image.size), "photographs", "image 5 has that of image 0"
    ),
}  # fmt: skip
CASES = {**TEXTS, **IMAGES}
# Each makes a second of work, and another of its kind is in the default suite.
SLOW = {
    "sharpened", "cache by size", "cache by the end", "cache without case",
    "cache without whitespace", "cache by NFKC", "cache without punctuation", "cache by both ends",
    "all kinds of spaces", "space separators", "escaped", "no markup", "cut at 100",
    "cut at an odd length", "NFC", "NFD", "case-folded", "question marks", "3 decimals",
}  # fmt: skip


def run_until(monkeypatch: pytest.MonkeyPatch, name: str, of_images: bool) -> None:
    """Run the checks of one modality up to this one, and no others."""
    names = [plan.name for plan in server_checks._PLANNED]
    kept = [
        plan
        for plan in server_checks._PLANNED[: names.index(name) + 1]
        if (plan.about not in (None, "option")) == of_images or plan.name == "connection"
    ]
    monkeypatch.setattr(server_checks, "_PLANNED", tuple(kept))


def check(folder: Path, endpoint: Endpoint, **options: Any) -> Any:
    config = ServerCheckConfig(server=endpoint.url, schema="jina", device="cpu", **options)
    return check_server(folder, config)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES],
)
def test_a_proxy_that_changes_something_is_found_and_rightly_named(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    run_until(monkeypatch, case.check, name in IMAGES)
    with Endpoint(folder, case.proxy) as endpoint:
        report = check(folder, endpoint)
    found = find(report, case.check)
    assert (found.passed, found.skipped) == (False, False), str(report)
    assert re.search(case.says, found.message), found.message
    # Nothing before it was harmed, or it would have said so first.
    assert report.failed[-1] == found


@pytest.mark.slow
def test_texts_cut_off_at_2000_characters_are_no_matter_of_precision(
    long_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_until(monkeypatch, "long text", False)
    with Endpoint(long_folder, change_texts(lambda text: text[:2000])) as endpoint:
        report = check(long_folder, endpoint)
    assert [one.name for one in report.failed][-1] == "long text"
    for one in report.failed:
        assert re.search(UNNAMED, one.message), one.message
        assert "served-dtype" not in one.message


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_that_are_stored_in_half_precision_are_named_as_that(
    dtype: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def store(endpoint: Endpoint) -> None:
        with torch.no_grad():
            for weight in endpoint.model.text_model.parameters():
                weight.copy_(weight.to(getattr(torch, dtype)).float())

    run_until(monkeypatch, "texts", False)
    with Endpoint(folder, store) as endpoint:
        report = check(folder, endpoint)
    message = find(report, "texts").message
    assert report.healthy or f"--served-dtype {dtype}" in message, message


def test_the_inputs_are_the_same_each_time_and_have_what_servers_rewrite() -> None:
    first = [image.tobytes() for image in render_photographs()]
    render_photographs.cache_clear()
    assert first == [image.tobytes() for image in render_photographs()]
    sizes = {image.size for image in render_photographs()}
    assert (640, 427) in sizes and max(max(size) for size in sizes) > 1024
    text = "".join(EXACT_TEXTS)
    for form in ("NFC", "NFD", "NFKC"):
        assert unicodedata.normalize(form, text) != text
    assert "\n" in text and "\r\n" in text and "  " in text and "\u200d" in text
    assert "\u00a0" in text and "\u200b" in text and "\u3000" in text
