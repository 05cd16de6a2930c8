"""Images found by sentences, in Python and by the command."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shared_models import ROUNDING, shared_model
from tiny import draw_noise

from modeling_llm2clip.__main__ import main
from modeling_llm2clip.configs.search_config import IndexConfig
from modeling_llm2clip.data.named_embeddings import read_named_embeddings, write_named_embeddings
from modeling_llm2clip.encoding.encode import encode_images
from modeling_llm2clip.model_folders.fingerprint import fingerprint_vision
from modeling_llm2clip.search import embedding_cache, results_page
from modeling_llm2clip.search.embedding_cache import EmbeddingCache
from modeling_llm2clip.search.image_index import ImageIndex, SearchResult, list_images, rank_images
from modeling_llm2clip.search.results_page import write_results_sheet

SENTENCES = ["a dog", "two red apples on a wooden table"]

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images, some in a folder below, beside a text."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "below").mkdir()
    for number in range(10):
        name = f"{number}.png" if number % 2 else f"below/{number}.JPG"
        draw_noise(seed=number).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    model, processor = shared_model()
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def test_images_are_found_below_the_folder_in_order(images: Path) -> None:
    found = [str(path.relative_to(images)) for path in list_images(images).readable]
    assert found == [
        *(f"{n}.png" for n in (1, 3, 5, 7, 9)),
        *(f"below/{n}.JPG" for n in (0, 2, 4, 6, 8)),
    ]


def test_the_best_images_are_those_of_the_greatest_cosine(images: Path) -> None:
    model, processor = shared_model()
    paths = list_images(images).readable
    with torch.no_grad():
        output = model(**processor(text=SENTENCES, images=[str(path) for path in paths]))
    cosines = output.text_embeds @ output.image_embeds.T
    image_embeds = encode_images(model, processor, paths, batch_size=3)
    index = ImageIndex(model, processor, paths, image_embeds)
    for top_k in (1, 4, 50):
        results = index.search(SENTENCES, top_k=top_k)
        assert index.search(SENTENCES[0], top_k=top_k).query == SENTENCES[0]
        for sentence, result, row in zip(SENTENCES, results, cosines, strict=True):
            assert result.query == sentence
            wanted = row.topk(min(top_k, len(paths)))
            assert [path for path, _ in result.hits] == [paths[i] for i in wanted.indices]
            assert [c for _, c in result.hits] == pytest.approx(
                wanted.values.tolist(), abs=ROUNDING
            )
    with pytest.raises(ValueError, match="top_k=0 must be at least 1"):
        index.search(SENTENCES, top_k=0)


def test_an_index_that_is_built_is_opened_again_without_encoding(
    images: Path, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched = Path(shutil.copytree(images, tmp_path / "searched"))
    built = ImageIndex.build(model_folder, searched, tmp_path / "index")
    found = built.search([SENTENCES[0], searched / "3.png"], top_k=3)
    assert found[1].hits[0][0] == found[1].query_image == searched / "3.png"
    assert str(found[0]).splitlines()[0] == SENTENCES[0]
    monkeypatch.setattr(embedding_cache, "encode_images", None)
    opened = ImageIndex.open(tmp_path / "index")
    assert torch.equal(opened.image_embeds, built.image_embeds)
    assert opened.search([SENTENCES[0], searched / "3.png"], top_k=3) == found
    draw_noise(seed=99).save(searched / "new.png")
    with pytest.warns(UserWarning, match="1 of 11 images in .*searched are not in .*index"):
        assert len(ImageIndex.open(tmp_path / "index")) == 10
    moved = searched.rename(tmp_path / "moved")
    with pytest.warns(UserWarning, match="1 of 11 images"):
        opened = ImageIndex.open(tmp_path / "index", model=model_folder, image_dir=moved)
    assert torch.equal(opened.image_embeds, built.image_embeds)
    (tmp_path / "others").mkdir()
    draw_noise(seed=98).save(tmp_path / "others" / "a.png")
    with pytest.raises(ValueError, match=r"index has none of the 1 images in .*others"):
        ImageIndex.open(tmp_path / "index", image_dir=tmp_path / "others")
    with pytest.raises(ValueError, match=r"nowhere does not exist"):
        ImageIndex.open(tmp_path / "nowhere")


def test_an_index_built_in_python_warns_of_what_it_skips(model_folder: str, tmp_path: Path) -> None:
    draw_noise().save(tmp_path / "whole.png")
    (tmp_path / "raw.cr2").write_bytes(b"an image of a camera")
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"Skipped 1 image files .*raw\.cr2"):
        with pytest.raises(ValueError, match=r"1 of 2 images cannot be read:\n.*broken\.png"):
            ImageIndex.build(model_folder, tmp_path)
    with pytest.warns(UserWarning, match=r"Skipped 1 of 2 images:\n.*broken\.png"):
        index = ImageIndex.build(model_folder, tmp_path, config=IndexConfig(skip_invalid=True))
    assert index.paths == [tmp_path / "whole.png"]


def test_an_index_needs_one_finite_embedding_per_image(images: Path) -> None:
    paths = list_images(images).readable
    with pytest.raises(ValueError, match=r"shape \(2, 4\); give one row for each of the 10"):
        ImageIndex(*shared_model(), paths, torch.ones(2, 4))
    with pytest.raises(ValueError, match="40 of 40 embeddings are NaN"):
        ImageIndex(*shared_model(), paths, torch.full((10, 4), float("nan")))


def test_the_command_prints_and_draws_what_it_found(
    images: Path, model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "found"
    flags = ["--top-k", "3", "--output", str(output)]
    assert main(["search", model_folder, str(images), *SENTENCES, *flags]) == 0
    tables = [table.splitlines() for table in capsys.readouterr().out.split("\n\n")]
    assert [lines[0] for lines in tables] == SENTENCES
    for lines in tables:
        assert lines[1].split() == ["rank", "cosine", "image"]
        ranks, cosines, paths = zip(*(line.split() for line in lines[2:]), strict=True)
        assert ranks == ("1", "2", "3")
        assert list(map(float, cosines)) == sorted(map(float, cosines), reverse=True)
        assert all(Path(path).is_file() for path in paths)
    with Image.open(output / "search.png") as sheet:
        assert sheet.width > 3 * 160
    assert (output / "search.html").read_text().count("<figure>") == 6
    assert main(["search", model_folder, str(images), "a dog", *flags]) == 2
    assert "found" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["a dog", "a word " * 60, "犬" * 200, "x" * 300])
def test_a_sentence_keeps_within_its_place_on_the_sheet(
    text: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results_page, "_has_letters", lambda *_: True)
    found = [(path, 0.5) for path in list_images(images).readable[:2]]
    write_results_sheet([SearchResult(text, found)] * 2, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        dark = np.asarray(sheet.convert("L")) < 128
    words, imaged = dark[:, : results_page._TEXT_WIDTH], dark[:, results_page._TEXT_WIDTH :]
    height = len(dark) // 2
    assert words[:height].any() and not words[:, -4:].any()  # none runs into the images
    assert not words[height - 4 : height + 4].any()  # nor into the next row
    assert imaged.any()


def test_letters_that_the_fonts_lack_are_not_drawn_as_boxes(images: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")  # its font has the umlaut
    found = [(list_images(images).readable[0], 0.5)]
    queries = {"a": "ネコ", "b": "イヌ", "c": "a dog, 1862", "d": "ein Käfig", "e": "ein Kofig"}
    for name, query in queries.items():
        write_results_sheet([SearchResult(query, found)], tmp_path / f"{name}.png")
    drawn = [(tmp_path / f"{name}.png").read_bytes() for name in "abcde"]
    assert drawn[0] == drawn[1]  # both are named by their number
    assert len(set(drawn)) == 4


def test_broken_images_are_named_or_left_out_and_counted(
    model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_noise().save(tmp_path / "whole.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert main(["search", model_folder, str(tmp_path), "a dog"]) == 2
    error = capsys.readouterr().err
    assert "1 of 2 images cannot be read" in error
    assert "broken.png: not an image" in error
    assert main(["search", model_folder, str(tmp_path), "a dog", "--skip-invalid"]) == 0
    shown = capsys.readouterr()
    assert "Skipped 1 of 2 images" in shown.err
    assert str(tmp_path / "whole.png") in shown.out
    (tmp_path / "whole.png").unlink()
    assert main(["search", model_folder, str(tmp_path), "a dog", "--skip-invalid"]) == 2


def test_kept_embeddings_spare_what_was_encoded_before(
    images: Path, model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    searched = Path(shutil.copytree(images, tmp_path / "searched"))
    kept = tmp_path / "kept" / "embeddings.safetensors"
    command = ["search", model_folder, str(searched), "a dog", "--top-k", "20"]

    def search(*flags: str) -> tuple[str, str]:
        assert main([*command, *flags]) == 0
        shown = capsys.readouterr()
        (report,) = [line for line in shown.err.splitlines() if "of them known" in line]
        return report, shown.out

    keep = ("--index", str(kept))
    assert search(*keep)[0] == f"10 images, 0 of them known; embeddings in {kept}."
    (searched / "1.png").rename(searched / "other name.png")
    shutil.copy(searched / "3.png", searched / "copy of 3.png")
    (searched / "5.png").unlink()
    draw_noise(seed=77).save(searched / "7.png")
    report, found = search(*keep)
    assert report == f"10 images, 9 of them known; embeddings in {kept}."
    assert search("--no-keep-index") == (
        "10 images, 0 of them known; embeddings are not kept.", found
    )  # fmt: skip
    names, stored = read_named_embeddings(kept).names, read_named_embeddings(kept).embeddings
    assert len(names) == len(set(names)) == len(stored) == 11  # what is gone stays, copies are one


def test_kept_embeddings_survive_a_break(images: Path, model_folder: str, tmp_path: Path) -> None:
    model, processor = shared_model()
    paths, fingerprint = list_images(images).readable, fingerprint_vision(model_folder)
    kept = EmbeddingCache(tmp_path / "kept.safetensors", fingerprint)
    kept.encode(model, processor, paths[:4])
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken\.png: not an image"):
        kept.encode(model, processor, [*paths, broken])
    again = EmbeddingCache(tmp_path / "kept.safetensors", fingerprint)
    assert [path for path in paths if path in again] == paths[:4]


def test_embeddings_of_another_model_or_use_are_refused(
    images: Path, model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, processor = shared_model()
    paths = list_images(images).readable
    fingerprint = fingerprint_vision(model_folder)
    kept = tmp_path / "kept.safetensors"
    EmbeddingCache(kept, {**fingerprint, "pooling": "another"}).encode(model, processor, paths[:1])
    command = ["search", model_folder, str(images), "a dog", "--index"]
    assert main([*command, str(kept)]) == 2
    assert "embeddings of another model: pooling: 'another'" in capsys.readouterr().err
    write_named_embeddings(kept, ["a"], torch.ones(1, 4))
    assert main([*command, str(kept)]) == 2
    assert "is not an index of images" in capsys.readouterr().err
    assert main([*command, str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_what_another_search_kept_meanwhile_stays(
    images: Path, model_folder: str, tmp_path: Path
) -> None:
    model, processor = shared_model()
    paths, fingerprint = list_images(images).readable, fingerprint_vision(model_folder)
    file = tmp_path / "kept.safetensors"
    first, second = EmbeddingCache(file, fingerprint), EmbeddingCache(file, fingerprint)
    first.encode(model, processor, paths[:3])
    second.encode(model, processor, paths[3:])
    again = EmbeddingCache(file, fingerprint)
    assert all(path in again for path in paths)


def test_a_file_that_cannot_be_kept_in_is_reported_first_or_warned_of(
    images: Path, model_folder: str, tmp_path: Path
) -> None:
    model, processor = shared_model()
    paths, fingerprint = list_images(images).readable, fingerprint_vision(model_folder)
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(ValueError, match=r"kept\.safetensors cannot be written"):
        EmbeddingCache(tmp_path / "taken" / "kept.safetensors", fingerprint)
    kept = EmbeddingCache(tmp_path / "gone" / "kept.safetensors", fingerprint)
    (tmp_path / "gone").rmdir()
    (tmp_path / "gone").write_text("now a file")
    with pytest.warns(UserWarning, match=r"No embeddings were kept in .*kept\.safetensors"):
        assert len(kept.encode(model, processor, paths)) == 10  # and the search goes on


@pytest.mark.parametrize("note", ["{", "null", "[1]"])
def test_a_kept_file_that_says_nothing_of_its_model_is_refused(
    note: str, model_folder: str, tmp_path: Path
) -> None:
    file = tmp_path / "kept.safetensors"
    write_named_embeddings(file, ["a"], torch.ones(1, 4), notes={"fingerprint": note})
    with pytest.raises(ValueError, match=r"kept\.safetensors is not an index of images"):
        EmbeddingCache(file, fingerprint_vision(model_folder))


def test_kept_embeddings_of_another_width_are_refused(
    images: Path, model_folder: str, tmp_path: Path
) -> None:
    fingerprint, file = fingerprint_vision(model_folder), tmp_path / "kept.safetensors"
    write_named_embeddings(
        file, ["a"], torch.ones(1, 5), notes={"fingerprint": json.dumps(fingerprint)}
    )
    with pytest.raises(ValueError, match=r"of width \[5\], the model's have"):
        EmbeddingCache(file, fingerprint).encode(*shared_model(), list_images(images).readable)


def test_an_image_that_may_not_be_read_is_left_out_like_a_broken_one(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed, kept = list_images(images).readable[0], EmbeddingCache()
    kept.encode(*shared_model(), list_images(images).readable[1:])

    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(embedding_cache, "hash_file", refuse)
    assert closed not in kept  # so that the check of images names it


def test_broken_embeddings_are_never_the_best(images: Path) -> None:
    model, processor = shared_model()
    broken = copy.deepcopy(model)
    with torch.no_grad():
        next(broken.vision_model.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or infinity for 8 of 8 inputs"):
        EmbeddingCache().encode(broken, processor, list_images(images).readable)
    with pytest.raises(ValueError, match="1 of 4 cosines are NaN"):
        cosines = torch.tensor([[0.1, 0.2], [float("nan"), 0.3]])
        rank_images(SENTENCES, cosines, list("ab"), top_k=1)


@pytest.mark.parametrize(
    ("folder", "sentence", "error"),
    [
        ("missing", "a dog", "missing: no such folder"),
        (".", "a dog", "no image in it or below it"),
        (".", "  ", "number 0 is blank"),
    ],
)
def test_bad_input_is_refused_before_the_model_is_loaded(
    folder: str, sentence: str, error: str, model_folder: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main(["search", model_folder, str(tmp_path / folder), sentence]) == 2
    assert error in capsys.readouterr().err
