"""Laws of the example data: whatever a line promises is there, and its counts and size are true."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

DATA = Path(__file__).parents[2] / "examples" / "data"
FOLDERS = ("emoji", "photographs")
EMOJI_LANGUAGES = {"en", "de", "fr", "es", "it", "pt", "ru", "ar", "hi", "zh", "ja", "ko"}
EMOJI_FIELDS = {"image", "group_id", "captions", "keywords", "lang"}
PHOTOGRAPH_FIELDS = {"image", "group_id", "captions", "lang", "license", "source"}
LICENSE_MARKS = {
    "noto-emoji-Apache-2.0.txt": "Apache License",
    "fluent-emoji-MIT.txt": "Microsoft",
    "emoji-datasource-MIT.txt": "Cal Henderson",
    "cldr-Unicode-3.0.txt": "UNICODE LICENSE V3",
}
MAXIMUM_BYTES = 12_000_000


@cache
def read_lines(folder: str) -> list[dict[str, Any]]:
    text = (DATA / folder / "captions.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@cache
def read_images(folder: str) -> dict[str, tuple[str, tuple[int, int], bytes, bool]]:
    """Decode every image named by a line: mode, size, RGB pixels, whether it has EXIF data."""
    images = {}
    for name in sorted({line["image"] for line in read_lines(folder)}):
        with Image.open(DATA / folder / name) as image:
            pixels = image.convert("RGB").tobytes()
            images[name] = (image.mode, image.size, pixels, bool(image.getexif()))
    return images


def read_counts(folder: str) -> dict[str, str]:
    """Read the two-column tables of a README: first cell to second cell."""
    text = (DATA / folder / "README.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1] for row in rows if len(row) == 2}


@pytest.mark.parametrize("folder", FOLDERS)
def test_lines_are_sorted_and_say_something_of_every_image_once_a_language(folder: str) -> None:
    lines, root = read_lines(folder), DATA / folder
    for line in lines:
        assert line["captions"], line
        texts = [line["group_id"], line["lang"], *line["captions"]]
        assert all(isinstance(text, str) and text and text == text.strip() for text in texts), line
    files = {p.relative_to(root).as_posix() for p in (root / "images").rglob("*") if p.is_file()}
    assert files == {line["image"] for line in lines}
    pairs = Counter((line["image"], line["lang"]) for line in lines)
    assert [pair for pair, count in pairs.items() if count > 1] == []
    order = [(line["group_id"], line["lang"], line["image"]) for line in lines]
    assert order == sorted(order)


def test_emoji_lines_have_the_documented_fields_and_keywords_that_repeat_nothing() -> None:
    for line in read_lines("emoji"):
        english = {"style", "group"} if line["lang"] == "en" else set()
        assert set(line) == EMOJI_FIELDS | english, line
        style = line.get("style", "noto")
        assert style in {"noto", "fluent3d"}, line
        assert line["image"] == f"images/{style}/{line['group_id']}.png", line
        words = [word.casefold() for word in line["captions"] + line["keywords"]]
        assert len(words) == len(set(words)), line


def test_every_emoji_has_a_name_of_its_own_in_all_twelve_languages() -> None:
    languages: dict[str, set[str]] = {line["group_id"]: set() for line in read_lines("emoji")}
    group_ids: dict[tuple[str, str], set[str]] = defaultdict(set)
    for line in read_lines("emoji"):
        group_ids[line["lang"], line["captions"][0].casefold()].add(line["group_id"])
        if line["image"].startswith("images/noto/"):
            languages[line["group_id"]].add(line["lang"])
    assert [group_id for group_id, langs in languages.items() if langs != EMOJI_LANGUAGES] == []
    assert {name: groups for name, groups in group_ids.items() if len(groups) > 1} == {}


def test_every_emoji_image_is_a_square_palette_image_that_is_drawn_once() -> None:
    images = read_images("emoji").values()
    assert {(mode, size) for mode, size, _, _ in images} == {("P", (64, 64))}
    assert set(Counter(pixels for _, _, pixels, _ in images).values()) == {1}


def test_photograph_lines_have_the_documented_fields_and_two_captions() -> None:
    for line in read_lines("photographs"):
        assert set(line) == PHOTOGRAPH_FIELDS, line
        assert line["license"] and line["source"] and line["lang"] == "en", line
        # 49 to 54 words as written; the bounds are those that the README promises.
        short, long = (len(caption.split()) for caption in line["captions"])
        assert short <= 15 and 40 <= long <= 60, line
    for image, (mode, size, _, has_exif) in read_images("photographs").items():
        assert (mode, max(size), has_exif) == ("RGB", 256, False), image


def test_the_counts_in_the_emoji_readme_are_those_of_the_data() -> None:
    lines, counts = read_lines("emoji"), read_counts("emoji")
    images = Counter(Path(image).parent.name for image in read_images("emoji"))
    languages = Counter(line["lang"] for line in lines)
    expected = {
        "images in `images/noto`": images["noto"],
        "images in `images/fluent3d`": images["fluent3d"],
        "lines in `captions.jsonl`": len(lines),
        **languages,
    }
    assert {name: counts[name] for name in expected} == {k: str(v) for k, v in expected.items()}


def test_the_photograph_readme_gives_the_counts_and_the_attribution_of_every_line() -> None:
    lines, counts = read_lines("photographs"), read_counts("photographs")
    assert counts["images in `images`"] == str(len(read_images("photographs")))
    assert counts["lines in `captions.jsonl`"] == str(len(lines))
    text = (DATA / "photographs" / "README.md").read_text(encoding="utf-8")
    rows = [f"| `{line['image']}` | {line['license']} | {line['source']} |" for line in lines]
    assert [row for row in rows if row not in text] == []


def test_every_license_text_of_the_emoji_is_there() -> None:
    for name, mark in LICENSE_MARKS.items():
        assert mark in (DATA / "emoji" / "LICENSES" / name).read_text(encoding="utf-8")


def count_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_example_data_stay_small() -> None:
    # A clone carries them for ever; today the images and texts are 9.8 million bytes, scripts
    # included, and the adapter's weights as many.
    assert count_bytes(DATA / "caption_lora") <= 10_000_000
    assert count_bytes(DATA) - count_bytes(DATA / "caption_lora") <= MAXIMUM_BYTES
