"""What `llm2clip search` finds by an image, what it skips, and how it shows what it found."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import os
import re
import shutil
import sys
from dataclasses import replace
from itertools import cycle, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from browsing import WIDTHS, measure_hits, needs_browser, open_browser, overflows
from indexes import build, save_model
from interruptions import read_bytes
from launches import run_python
from PIL import Image, features
from read_only import read_only
from shared_models import ROUNDING
from tiny import draw_noise

from modeling_llm2clip import ImageIndex
from modeling_llm2clip.__main__ import main
from modeling_llm2clip.cli.search import _write
from modeling_llm2clip.encoding.encode import encode_images, encode_texts
from modeling_llm2clip.model_folders.model_loading import load_model
from modeling_llm2clip.search import search_results
from modeling_llm2clip.search.image_files import list_images
from modeling_llm2clip.search.search_results import (
    SearchResult,
    make_csv_row,
    rank_images,
    write_results_page,
    write_results_sheet,
)

SENTENCES = ["a dog", 'a "red", ripe apple']
# Contrast of an element's color with the page's, as WCAG 2 defines it.
CONTRAST = """
(element) => {
    const draw = (color) => {
        const context = document.createElement("canvas").getContext("2d");
        context.fillStyle = getComputedStyle(document.body).backgroundColor;
        context.fillRect(0, 0, 1, 1);
        context.fillStyle = color;
        context.fillRect(0, 0, 1, 1);
        return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map((value) => {
            const share = value / 255;
            return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
        });
    };
    const luminance = ([red, green, blue]) => 0.2126 * red + 0.7152 * green + 0.0722 * blue;
    const [low, high] = [getComputedStyle(element).color, "transparent"]
        .map((color) => luminance(draw(color))).sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
}
"""

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number, name in enumerate(["a.png", "b & #2.png", "ü %20.png", "d, e.png"]):
        draw_noise(400, 500, seed=number).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def index(images: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("indexes") / "index"
    build(model_folder, images, path)
    return str(path)


def read_json(capsys: pytest.CaptureFixture[str], index: str, *words: str) -> Any:
    """Search by command; return its JSON."""
    assert main(["search", index, *words, "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_command_prints_and_draws_what_it_found(
    index: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "found"
    flags = ["--top-k", "3", "--output", str(output)]
    assert main(["search", index, *SENTENCES, *flags]) == 0
    tables = [table.splitlines() for table in capsys.readouterr().out.rstrip().split("\n\n")]
    assert [lines[0] for lines in tables] == SENTENCES
    for lines in tables:
        assert lines[1].split() == ["rank", "cosine", "image"]
        ranks, cosines, paths = zip(*(line.split(maxsplit=2) for line in lines[2:]), strict=True)
        assert ranks == ("1", "2", "3")
        assert list(map(float, cosines)) == sorted(map(float, cosines), reverse=True)
        assert all(Path(path).is_file() for path in paths)
    with Image.open(output / "search.png") as sheet:
        assert sheet.width > 3 * 160
    assert (output / "search.html").read_text().count("<li>") == 6


def test_json_and_csv_hold_what_the_table_shows_and_nothing_else_is_on_stdout(
    index: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = {}
    for style in ("table", "json", "csv"):
        flags = ["--top-k", "2", "--format", style]
        assert main(["search", index, *SENTENCES, *flags]) == 0
        shown[style] = capsys.readouterr().out
    records = json.loads(shown["json"])
    assert [(r["query"], r["rank"]) for r in records] == [(s, n) for s in SENTENCES for n in (1, 2)]
    rows = list(csv.DictReader(io.StringIO(shown["csv"])))
    assert [{key: str(value) for key, value in record.items()} for record in records] == rows
    lines = [line for line in shown["table"].splitlines() if line.startswith("     ")]
    assert lines == [f"  {r['rank']:>4}  {r['cosine']:>6.3f}  {r['image']}" for r in records]


def test_csv_is_as_the_standard_library_writes_it_but_for_line_breaks_and_formulas() -> None:
    texts = ["a, b", 'a "b"', "a\nb", "ü", "", " a", "'a'"]
    for text in texts:
        expected = io.StringIO()
        csv.writer(expected, lineterminator="\n").writerow([text, -0.5, 1e-06, 3])
        assert make_csv_row([text, -0.5, 1e-06, 3]) + "\n" == expected.getvalue()
    for text in ("a\rb", "=1+1", "+1", "-1", "@SUM(A1)", "\t=1"):
        row = make_csv_row([text, 1])
        assert row == f'"{text}",1'
        assert next(csv.reader(io.StringIO(row, newline=""))) == [text, "1"]


def test_codes_of_a_terminal_are_escaped_where_people_read_them(
    index: str, capsys: pytest.CaptureFixture[str]
) -> None:
    query = "a dog\x1b[2J\x9b2J\r"
    assert main(["search", index, query, "--top-k", "1"]) == 0
    assert capsys.readouterr().out.startswith("a dog\\u001b[2J\\u009b2J\\u000d\n")
    assert main(["search", index, query, "--top-k", "1", "--format", "json"]) == 0
    shown = capsys.readouterr().out
    assert "\x9b" not in shown and json.loads(shown)[0]["query"] == query
    assert main(["search", "no\x1b[2Jindex", "a dog"]) == 2
    assert "no\\u001b[2Jindex" in capsys.readouterr().err


def test_a_query_image_finds_itself_first_beside_and_without_a_sentence(
    images: Path, index: str, capsys: pytest.CaptureFixture[str]
) -> None:
    query = str(images / "b & #2.png")
    for words in (["--image", query], ["--image", query, "a dog"], ["a dog", "--image", query]):
        records = read_json(capsys, index, *words)
        assert {record["query"] for record in records} == ({"a dog", query} & {*words})
        first = next(record for record in records if record["query"] == query)
        assert first["image"] == query and first["cosine"] == pytest.approx(1, abs=ROUNDING)


def test_images_that_are_gone_or_changed_are_named_and_not_shown(
    images: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output, red = tmp_path / "images", tmp_path / "found", (200, 0, 0)
    shutil.copytree(images, folder)
    build(model_folder, folder, tmp_path / "index")
    search = ["search", str(tmp_path / "index"), "a dog"]
    assert main(search) == 0
    assert "found but" not in capsys.readouterr().err
    Image.new("RGB", (300, 300), red).save(folder / "a.png")
    (folder / "d, e.png").unlink()
    assert main([*search, "--output", str(output)]) == 0
    error = capsys.readouterr().err
    assert "1 image found but changed since it was indexed: " in error
    assert "1 image found but no longer there:" in error
    page = (output / "search.html").read_text(encoding="utf-8")
    notes = re.findall(r'<span class="caption">(.*?)</li>', page)
    for problem, name in (("changed since indexed", "a.png"), ("no longer there", "d, e.png")):
        assert [note for note in notes if problem in note] == [
            note for note in notes if f'<span class="name">{name}</span>' in note
        ]
    shown = [io.BytesIO(base64.b64decode(text)) for text in re.findall('base64,([^"]+)', page)]
    assert len(shown) == len(notes) == page.count("<li>") == 4
    for drawing in (*shown, output / "search.png"):
        with Image.open(drawing) as opened:
            pixels = np.asarray(opened.convert("RGB"), dtype=int)
        # JPEG moves the red by a few levels; one pixel in ten thousand of noise is as near to it.
        near_red = (np.abs(pixels - red) < 16).all(axis=-1)
        assert near_red.mean() < 0.01


def test_sentences_and_images_can_be_one_query(
    images: Path, index: str, capsys: pytest.CaptureFixture[str]
) -> None:
    query = str(images / "a.png")
    combined = read_json(capsys, index, "a dog", "--image", query, "--combine")
    assert {record["query"] for record in combined} == {f"a dog + {query}"}
    sums: dict[str, float] = {}
    for record in read_json(capsys, index, "a dog", "--image", query):
        sums[record["image"]] = sums.get(record["image"], 0) + record["cosine"]
    assert [r["image"] for r in combined] == sorted(sums, key=lambda name: -sums[name])


def test_a_filter_narrows_what_is_found(
    index: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (record,) = read_json(capsys, index, "a dog", "--where", "path LIKE 'b%'")
    assert record["image"].endswith("b & #2.png")
    words = ["--where", "height > 9999", "--output", str(tmp_path / "found")]
    assert main(["search", index, "a dog", *words]) == 0
    assert capsys.readouterr().out.splitlines() == ["a dog", "  No image was found."]
    page = (tmp_path / "found" / "search.html").read_text(encoding="utf-8")
    assert "No image was found." in page and "<li>" not in page
    assert main(["search", index, "a dog", "--where", "color = 1"]) == 2
    shown = capsys.readouterr().err
    assert "where='color = 1'" in shown and "The columns are path, sha256" in shown


def test_a_threshold_keeps_the_hits_that_reach_it(
    index: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in ([], ["--not", "a cat", "--top-k", "3"]):
        found = read_json(capsys, index, *SENTENCES, *words)
        cosines = sorted({-1, 1, *(record["cosine"] for record in found)})
        for threshold in (sum(pair) / 2 for pair in pairwise(cosines)):
            kept = [record for record in found if record["cosine"] >= threshold]
            flags = [*words, f"--threshold={threshold}"]
            assert read_json(capsys, index, *SENTENCES, *flags) == kept
    (result,) = ImageIndex.open(index).search(["a dog"], top_k=9)
    for _, cosine in result.hits:  # a hit at the threshold is kept
        found = ImageIndex.open(index).search("a dog", threshold=cosine)
        assert found == replace(result, hits=[hit for hit in result.hits if hit[1] >= cosine])
        assert found.best_cosine == result.hits[0][1] and len(found.columns) == len(found.hits)


def test_if_nothing_reaches_the_threshold_the_best_cosine_is_named(
    index: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = read_json(capsys, index, "a dog", "--top-k", "1")[0]["cosine"]
    note = f"No image reaches the threshold; the best cosine is {best:.3f}."
    words = ["search", index, "a dog", "--threshold", "0.999", "--output", str(tmp_path / "found")]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines() == ["a dog", f"  {note}"] and note not in shown.err
    assert f"<p>{note}</p>" in (tmp_path / "found" / "search.html").read_text(encoding="utf-8")
    for style, empty in (("json", "[]"), ("csv", "query,rank,cosine,image")):
        assert main([*words, "--format", style]) == 0
        shown = capsys.readouterr()
        assert shown.out.strip() == empty and f"a dog: {note}\n" in shown.err
    for threshold in ("1.1", "nan", "30"):
        assert main([*words[:3], f"--threshold={threshold}"]) == 2
        assert "--threshold" in capsys.readouterr().err
        with pytest.raises(ValueError, match=r"is not a cosine\. Choose one from -1 to 1"):
            ImageIndex.open(index).search("a dog", threshold=float(threshold))


def test_negatives_subtract_half_of_their_mean_embedding_from_each_query(
    index: str, images: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = ImageIndex.open(index)
    ((paths, embeds),) = opened.iterate_embeddings()
    model, processor = load_model(model_folder, device="cpu")
    dog, cat, beach = encode_texts(model, processor, ["a dog", "a cat", "a beach"]).double().numpy()
    (image,) = encode_images(model, processor, [images / "a.png"]).double().numpy()

    def scale(row: Any) -> Any:
        return row / np.linalg.norm(row)

    cases: list[tuple[Any, Any, Any]] = [
        ("a dog", "a cat", dog - cat / 2),
        ("a dog", ["a cat", "a beach"], dog - scale(cat + beach) / 2),
        ("a dog", images / "a.png", dog - image / 2),
        ([["a dog", "a beach"]], ["a cat"], scale(dog + beach) - cat / 2),
        (3 * dog[None], ["a cat"], dog - cat / 2),
    ]
    for query, negative, embed in cases:
        expected = dict(zip(paths, embeds @ scale(embed), strict=True))
        found = opened.search(query, negative=negative)
        result = found[0] if isinstance(found, list) else found
        assert dict(result.hits) == pytest.approx(expected, abs=ROUNDING)
        assert [*expected.values()] != pytest.approx(list(embeds @ dog), abs=0.01)
    words = ["--not", "a cat", "--not", "a beach"]
    printed = read_json(capsys, index, *words, "a dog")
    result = opened.search("a dog", negative=["a cat", "a beach"])
    assert {record["query"] for record in printed} == {result.query} == {"a dog - a cat - a beach"}
    shown = [(Path(record["image"]), record["cosine"]) for record in printed]
    assert shown == [(path, round(cosine, 6)) for path, cosine in result.hits]
    assert opened.search("a dog", negative=[]) == opened.search("a dog")
    unopened = ImageIndex.open(index)
    for words, wrong, message in (
        (["--not", " "], " ", r"Negative number 1 has a blank sentence\."),
        (["--not", "a cat", "--not", ""], ["a cat", ""], r"Negative number 2 has a blank sentence"),
    ):
        with pytest.raises(ValueError, match=message):
            unopened.search("a dog", negative=wrong)
        assert main(["search", index, *words, "a dog"]) == 2
        assert re.search(message, capsys.readouterr().err)
    with pytest.raises(ValueError, match="nothing to search for"):
        unopened.search("a dog", negative=0)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"Negative number 1 is .'int'"):
        unopened.search("a dog", negative=[3])  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="Query number 2 has a blank sentence"):
        unopened.search(["a dog", ""])
    assert unopened._encoder is None  # refused before a model is loaded


@pytest.mark.parametrize("name", ["notes.txt", "search.png"])
def test_a_page_of_an_earlier_search_is_replaced_and_no_other_file(
    name: str, index: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "found"
    for query in ("a dog", "a red circle"):
        assert main(["search", index, query, "--output", str(output)]) == 0
        assert query in (output / "search.html").read_text(encoding="utf-8")
    (output / name).write_text("mine", encoding="utf-8")  # whatever its name
    assert main(["search", index, "a cat", "--output", str(output)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert "a red circle" in (output / "search.html").read_text(encoding="utf-8")
    assert (output / name).read_text(encoding="utf-8") == "mine"


def test_of_two_searches_at_once_both_files_are_of_one(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hits = [(path, 0.5) for path in list_images(images).readable]
    ours, theirs = SearchResult("a cat", hits[:1]), SearchResult("two dogs", hits[:2])
    _write([theirs], tmp_path / "alone")
    other = Thread(target=_write, args=([theirs], tmp_path / "found"))

    def write_while_another_begins(*args: Any, **options: Any) -> None:
        if other.ident is None:
            other.start()
            other.join(timeout=0.5)  # without a lock, it ends
        write_results_page(*args, **options)

    monkeypatch.setattr(search_results, "write_results_page", write_while_another_begins)
    _write([ours], tmp_path / "found")
    other.join()
    assert read_bytes(tmp_path / "found") == read_bytes(tmp_path / "alone")


def test_an_empty_folder_below_one_that_may_not_be_written_is_taken(index: str) -> None:
    with TemporaryDirectory() as scratch:  # pytest's folders are closed to other users
        output = Path(scratch) / "mine"
        output.mkdir()
        output.chmod(0o777)
        with read_only(output.parent):
            assert main(["search", index, "two dogs", "--output", str(output)]) == 0


def test_an_image_among_the_sentences_is_searched_as_one_and_the_flag_is_named(
    index: str, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["search", index, str(images / "a.png"), "a.png"]) == 0
    hint = f"is treated as a sentence. To search by image: --image {images / 'a.png'}\n"
    shown = capsys.readouterr().err
    assert hint in shown and shown.count("is treated as") == 1  # no file has the other name


def test_an_argument_that_is_not_utf_8_is_refused_before_the_index_is_opened(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    query = shutil.copy(images / "a.png", tmp_path / os.fsdecode(b"sea\xff.png"))
    assert main(["search", "no-such-index", "--image", str(query)]) == 2
    assert "sea\\udcff.png' is not UTF-8. Rename the file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--image", "missing.png"], "--image missing.png: no such image"),
        (["a dog", "--model", "nowhere"], "nowhere: no such folder"),
        (["a dog", "--image-dir", "nowhere"], "nowhere"),
        (["a dog", "--model", "IMAGES"], "IMAGES is not a model folder: it has no config.json and"),
    ],
)
def test_a_search_for_nothing_is_refused(
    words: list[str], error: str, index: str, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.replace("IMAGES", str(images)) for word in words]
    assert main(["search", index, *words]) == 2
    assert error.replace("IMAGES", str(images)) in capsys.readouterr().err


def test_a_model_in_place_of_an_index_is_answered_with_the_command_that_makes_one(
    model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["search", str(model_folder), "a dog"]) == 2
    assert "llm2clip index MODEL IMAGES DB" in capsys.readouterr().err


@pytest.mark.slow
def test_from_the_shell_another_process_searches_the_database_and_finds_the_same(
    index: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process torch is imported already, and the database opened here."""
    words = ["a dog", "--where", "width > 10"]
    printed = run_python("-m", "modeling_llm2clip", "search", index, *words, "--format", "json")
    assert json.loads(printed) == read_json(capsys, index, *words)


def test_the_page_links_to_the_files_shows_their_paths_and_images_of_320_pixels(
    images: Path, index: str, tmp_path: Path
) -> None:
    output = tmp_path / "found"
    query = str(images / "a.png")
    flags = ["--output", str(output), "--image", query]
    assert main(["search", index, "<a dog>", *flags]) == 0
    page = (output / "search.html").read_text(encoding="utf-8")
    entries = re.findall(r"<li>.*?</li>", page)
    assert len(entries) == 4 + 1 + 4  # two queries, one of them an image that is shown itself
    paths = {str(path) for path in images.iterdir()}
    for entry in entries:
        address, shown = re.findall(r'<a href="([^"]+)" target="_blank" title="([^"]+)">', entry)[0]
        assert html.unescape(shown) in paths
        assert html.unescape(re.sub("<[^>]+>", "", entry)).endswith(f" {html.unescape(shown)}")
        linked = output / unquote(html.unescape(address))
        assert not Path(html.unescape(address)).is_absolute()
        assert linked.resolve() == Path(html.unescape(shown)).resolve()
        assert entry.index("<a ") < entry.index("<img ")  # the image is a link as well
        (encoded,) = re.findall(r"base64,([^\"]+)", entry)
        with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
            assert image.size == (320, 256)
    assert "&lt;a dog&gt;" in page


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), list(zip(WIDTHS, cycle(("light", "dark")))))
def test_the_page_is_filled_by_images_and_readable_paths_at_every_width(
    width: str, scheme: str, tmp_path: Path
) -> None:
    folder = tmp_path / "archive of scans" / "originals" / "写真"
    folder.mkdir(parents=True)
    files = [folder / name for name in (f"{'long_' * 40}.png", "a.png", *map(str, range(10)))]
    for number, file in enumerate(files):
        draw_noise(60 + 30 * number, 200, seed=number).save(file, format="PNG")
    found = [(file, 0.5) for file in files]
    results = [SearchResult("two dogs " * 40, found), SearchResult("犬", found, files[0])]
    write_results_page(results, tmp_path / "search.html", title="a", note="b")
    size = dict(zip(("width", "height"), WIDTHS[width], strict=True))
    with open_browser() as browser:
        page = browser.new_page(viewport=size, color_scheme=scheme)
        page.goto((tmp_path / "search.html").as_uri())
        measured = measure_hits(page)
        assert measured["covering"] == measured["narrow"] == 0
        assert abs(measured["unused"]) < 1  # a pixel is rounded
        assert not overflows(page)
        for selector in ("h2", "p", ".hits .rank", ".hits .cosine", ".hits .folder", ".hits .name"):
            assert page.locator(selector).first.evaluate(CONTRAST) >= 4.5, selector  # WCAG AA
        # One stop of the keyboard per image, which is named by its rank, cosine and whole path.
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.title") == str(files[0])
        assert page.evaluate("getComputedStyle(document.activeElement).outlineWidth") != "0px"
        links = page.get_by_role("link").all_text_contents()
        assert len(links) == len(files) + 1 + len(files)  # with the query image
        assert links[0] == f"1. 0.500 {files[0]}"


def test_image_files_that_cannot_be_read_are_counted_and_named(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.EXTENSION, ".heic", raising=False)
    folder = tmp_path / "images"
    (folder / "below").mkdir(parents=True)
    for name in ("IMG_1.HEIC", "below/IMG_2.heic", "raw.cr2", "notes.txt"):
        (folder / name).write_bytes(b"an image of a camera")
    command = ["index", str(model_folder), str(folder), str(tmp_path / "index")]
    assert main(command) == 2
    assert "Skipped 3 image files" in capsys.readouterr().err
    draw_noise().save(folder / "whole.png")
    assert main(command) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "Skipped" in line]
    assert line == (
        "Skipped 3 image files in formats that this Pillow cannot read: "
        f"{folder / 'IMG_1.HEIC'}, {folder / 'below' / 'IMG_2.heic'}, {folder / 'raw.cr2'}. "
        "Install pillow-heif for HEIC or Pillow 11.3 for AVIF; convert other formats to JPEG "
        "or PNG."
    )


@pytest.mark.parametrize("suffix", ["AVIF", "heic"])
def test_optional_formats_are_indexed_and_shown(
    suffix: str, model_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "images" / f"image.{suffix}"
    file.parent.mkdir()
    if suffix == "heic":
        heif = pytest.importorskip("pillow_heif")
        heif.from_pillow(draw_noise(64, 64)).save(file)
    elif features.check("avif"):
        draw_noise().save(file, format="AVIF")
    else:
        pytest.skip("Pillow 11.3 or later reads AVIF")
    assert len(build(model_folder, file.parent, tmp_path / "index")[0]) == 1
    flags = ["--image", str(file), "--output", str(tmp_path / "found")]
    assert main(["search", str(tmp_path / "index"), *flags]) == 0


@pytest.mark.parametrize("text", ["a dog", "a word " * 60, "x" * 300, "W" * 300])
def test_a_sentence_keeps_within_its_place_on_the_sheet(
    text: str, images: Path, tmp_path: Path
) -> None:
    hits = [(path, 0.5) for path in list_images(images).readable[:2]]
    write_results_sheet([SearchResult(text, hits)] * 2, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        dark = np.asarray(sheet.convert("L")) < 128
    words, imaged = dark[:, : search_results._TEXT_WIDTH], dark[:, search_results._TEXT_WIDTH :]
    height = len(dark) // 2
    assert words[:height].any() and not words[:, -4:].any()  # none runs into the images
    assert not words[height - 4 : height + 4].any()  # nor into the next row
    assert imaged.any()


def test_letters_that_the_font_may_lack_are_not_drawn_as_boxes(
    images: Path, tmp_path: Path
) -> None:
    found = [(list_images(images).readable[0], 0.5)]
    queries = {"a": "ネコ", "b": "イヌ", "c": "a dog, 1862"}
    for name, query in queries.items():
        write_results_sheet([SearchResult(query, found)], tmp_path / f"{name}.png")
    drawn = [(tmp_path / f"{name}.png").read_bytes() for name in queries]
    assert drawn[0] == drawn[1] != drawn[2]  # the first two are named by their number


def test_broken_cosines_are_never_the_best() -> None:
    cosines = torch.tensor([[0.1, 0.2], [float("nan"), 0.3]])
    with pytest.raises(ValueError, match="1 of 4 cosines are NaN"):
        rank_images(SENTENCES, cosines, [Path("a"), Path("b")], top_k=1)
