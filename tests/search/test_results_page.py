"""What `llm2clip search` finds by an image, what it skips, and how it shows what it found."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import re
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from PIL import Image, features
from shared_models import ROUNDING, shared_model
from tiny import draw_noise

from modeling_llm2clip import LLM2CLIPProcessor
from modeling_llm2clip.__main__ import main
from modeling_llm2clip.search.image_index import list_images

SENTENCES = ["a dog", 'a "red", ripe apple']

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    model, processor = shared_model()
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number, name in enumerate(["a.png", "b & #2.png", "ü %20.png", "d, e.png"]):
        draw_noise(400, 500, seed=number).save(folder / name)
    return folder


def test_json_and_csv_hold_what_the_table_shows_and_nothing_else_is_on_stdout(
    images: Path, model_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = {}
    for style in ("table", "json", "csv"):
        flags = ["--top-k", "2", "--format", style]
        assert main(["search", model_folder, str(images), *SENTENCES, *flags]) == 0
        shown[style] = capsys.readouterr().out
    records = json.loads(shown["json"])
    assert [(r["query"], r["rank"]) for r in records] == [(s, n) for s in SENTENCES for n in (1, 2)]
    rows = list(csv.DictReader(io.StringIO(shown["csv"])))
    assert [{key: str(value) for key, value in record.items()} for record in records] == rows
    lines = [line for line in shown["table"].splitlines() if line.startswith("     ")]
    assert lines == [f"  {r['rank']:>4}  {r['cosine']:>6.3f}  {r['image']}" for r in records]


def test_a_query_image_finds_itself_first_and_the_others_by_their_cosines(
    images: Path, model_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = list_images(images).readable
    # Of the folder, whose image processor may be another class, with other rounding.
    model, processor = shared_model()[0], LLM2CLIPProcessor.from_pretrained(model_folder)
    with torch.no_grad():
        embeds = model(**processor(text=["x"], images=[str(path) for path in paths])).image_embeds
    wanted = (embeds[1] @ embeds.T).sort(descending=True)
    query = str(paths[1])
    for words in (["--image", query], ["--image", query, "a dog"], ["a dog", "--image", query]):
        flags = ["--format", "json", *words]
        assert main(["search", model_folder, str(images), *flags]) == 0
        found = json.loads(capsys.readouterr().out)
        assert {record["query"] for record in found} == ({"a dog", query} & {*words})
        by_image = [record for record in found if record["query"] == query]
        assert [record["image"] for record in by_image] == [str(paths[i]) for i in wanted.indices]
        cosines = [record["cosine"] for record in by_image]
        assert cosines == pytest.approx(wanted.values.tolist(), abs=ROUNDING)
        assert cosines[0] == pytest.approx(1, abs=ROUNDING)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "nothing to search for"),
        (["--image", "missing.png"], "--image missing.png: no such image"),
        (["a dog", "--top-k", "0"], "--top-k 0 must be at least 1"),
    ],
)
def test_a_search_for_nothing_is_refused_before_the_model_is_looked_at(
    words: list[str], error: str, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["search", "no-such-model", str(images), *words]) == 2
    assert error in capsys.readouterr().err


def test_the_page_links_to_the_files_shows_their_paths_and_images_of_320_pixels(
    images: Path, model_folder: str, tmp_path: Path
) -> None:
    output = tmp_path / "found"
    query = str(images / "a.png")
    flags = ["--output", str(output), "--image", query]
    assert main(["search", model_folder, str(images), "<a dog>", *flags]) == 0
    page = (output / "search.html").read_text(encoding="utf-8")
    figures = re.findall(r"<figure>.*?</figure>", page)
    assert len(figures) == 4 + 1 + 4  # two queries, one of them an image that is shown itself
    paths = {str(path) for path in images.iterdir()}
    for figure in figures:
        address, shown = re.findall(r'<a href="([^"]+)">([^<]+)</a></figcaption>', figure)[0]
        assert html.unescape(shown) in paths
        linked = output / unquote(html.unescape(address))
        assert not Path(html.unescape(address)).is_absolute()
        assert linked.resolve() == Path(html.unescape(shown)).resolve()
        assert figure.count(f'href="{address}"') == 2  # the image is a link as well
        (encoded,) = re.findall(r"base64,([^\"]+)", figure)
        with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
            assert image.size == (320, 256)
    assert "&lt;a dog&gt;" in page


def write_unread(folder: Path) -> None:
    (folder / "below").mkdir()
    for name in ("IMG_1.HEIC", "below/IMG_2.heic", "raw.cr2"):
        (folder / name).write_bytes(b"an image of a camera")
    (folder / "notes.txt").write_text("no image")


def test_image_files_that_cannot_be_read_are_counted_and_named(
    model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.EXTENSION, ".heic", raising=False)
    write_unread(tmp_path)
    assert main(["search", model_folder, str(tmp_path), "a dog"]) == 2
    assert "Skipped 3 image files" in capsys.readouterr().err
    draw_noise().save(tmp_path / "whole.png")
    assert main(["search", model_folder, str(tmp_path), "a dog"]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "Skipped" in line]
    assert line == (
        "Skipped 3 image files that Pillow cannot read here (1 .cr2, 2 .heic): "
        f"{tmp_path / 'IMG_1.HEIC'}, {tmp_path / 'below' / 'IMG_2.heic'}, {tmp_path / 'raw.cr2'}. "
        "To read .heic: pip install pillow-heif. Convert .cr2 to JPEG or PNG."
    )


@pytest.mark.skipif(not features.check("avif"), reason="Pillow 11.3 or later reads AVIF")
def test_avif_is_searched(model_folder: str, tmp_path: Path) -> None:
    draw_noise().save(tmp_path / "image.AVIF", format="AVIF")
    assert list_images(tmp_path).readable == [tmp_path / "image.AVIF"]
    assert main(["search", model_folder, str(tmp_path), "a dog"]) == 0


def test_heic_is_searched_where_pillow_heif_is_installed(model_folder: str, tmp_path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(draw_noise(64, 64)).save(tmp_path / "image.heic")
    assert main(["search", model_folder, str(tmp_path), "a dog"]) == 0
    query = ["--image", str(tmp_path / "image.heic")]
    assert main(["search", model_folder, str(tmp_path), *query]) == 0
