"""`llm2clip tag`: labels of images, each label encoded once."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from failing_disk import make_failing_file
from indexes import ANN, build, save_model
from shared_models import ROUNDING, shared_model
from tiny import draw_noise
from transformers import pipeline

from modeling_llm2clip.__main__ import main
from modeling_llm2clip.data.labels import read_labels
from modeling_llm2clip.encoding.encode import average_prompts, encode_texts
from modeling_llm2clip.search import tag_images
from modeling_llm2clip.search.index_database import IndexDatabase

LABELS = ["a dog", "Katze", "ripe, red apples"]

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number, name in enumerate(["a.png", "b, c.png", "d.png"]):
        draw_noise(32, 32, seed=number).save(folder / name)
    return folder


class Tagger:
    """The command `tag` on images and labels."""

    def __init__(self, model: str, images: Path, labels: Path, capsys: Any) -> None:
        self.model, self.images, self.labels, self._capsys = model, images, labels, capsys
        self.error = ""

    def run(self, *flags: str | Path, code: int = 0) -> list[dict[str, str]]:
        """Return the rows of the CSV on stdout; what is on stderr is in `error`."""
        words = ["tag", self.model, self.images, "--labels", self.labels, *flags]
        assert main([*map(str, words)]) == code
        out, self.error = self._capsys.readouterr()
        return list(csv.DictReader(io.StringIO(out)))

    def copy_images(self, folder: Path) -> None:
        """Tag copies of the images, which a test may change."""
        self.images = Path(shutil.copytree(self.images, folder))


@pytest.fixture
def tagger(
    model_folder: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Tagger:
    file = tmp_path / "labels.txt"
    file.write_text("\ufeff" + "\n\n".join(LABELS) + "\n", encoding="utf-8")
    return Tagger(model_folder, images, file, capsys)


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_tags_are_those_of_the_zero_shot_pipeline(tagger: Tagger, tmp_path: Path) -> None:
    template = "a photo of {}."
    output = tmp_path / "new" / "tags.jsonl"
    tagger.run("--template", template, "--output", output)
    records = read_lines(output)
    assert [record["image"] for record in records] == sorted(map(str, tagger.images.iterdir()))
    classify = pipeline("zero-shot-image-classification", model=tagger.model)
    for record in records:
        expected = classify(record["image"], candidate_labels=LABELS, hypothesis_template=template)
        assert [t["label"] for t in record["labels"]] == [e["label"] for e in expected]
        probabilities = [t["probability"] for t in record["labels"]]
        # Six digits are written, of what differs by rounding times the temperature of 1/0.07.
        assert probabilities == pytest.approx([e["score"] for e in expected], abs=15 * ROUNDING)
        cosines = [t["cosine"] for t in record["labels"]]
        assert cosines == sorted(cosines, reverse=True)


def test_csv_has_a_line_per_label_and_json_lines_an_object_per_image_of_the_same_tags(
    tagger: Tagger, tmp_path: Path
) -> None:
    for name in ("tags.csv", "tags.jsonl"):
        assert tagger.run("--top-k", "2", "--output", tmp_path / name) == []
    rows = tagger.run("--top-k", "2")
    written = (tmp_path / "tags.csv").read_text(encoding="utf-8")
    assert rows == list(csv.DictReader(io.StringIO(written)))
    assert list(rows[0]) == ["image", "rank", "label", "cosine", "probability"]
    assert rows == [
        {"image": record["image"], "rank": str(rank), **{k: str(v) for k, v in label.items()}}
        for record in read_lines(tmp_path / "tags.jsonl")
        for rank, label in enumerate(record["labels"], start=1)
    ]
    assert len(rows) == 2 * 3
    assert sorted(path.name for path in tmp_path.glob("*tags*")) == ["tags.csv", "tags.jsonl"]


def test_of_two_runs_into_one_file_the_later_is_refused_and_keeps_its_labels(
    tagger: Tagger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, write = tmp_path / "tags.csv", tag_images.write_tags
    flags: tuple[str | Path, ...] = ("--top-k", "1", "--output", output)

    def run_another(*arguments: Any) -> tuple[int, int]:
        monkeypatch.setattr(tag_images, "write_tags", write)
        tagger.run("--template", "not {}", *flags)
        return write(*arguments)

    monkeypatch.setattr(tag_images, "write_tags", run_another)
    tagger.run(*flags, code=2)
    (kept,) = tmp_path.glob("tags-*.csv")
    assert f"{output} was written by another process" in tagger.error and str(kept) in tagger.error
    for file, template in ((output, "not {}"), (kept, "{}")):
        expected = tagger.run("--template", template, "--top-k", "1")
        assert list(csv.DictReader(io.StringIO(file.read_text(encoding="utf-8")))) == expected


def test_an_image_below_the_threshold_stays_in_the_file_and_is_counted(tagger: Tagger) -> None:
    cosines = [float(row["cosine"]) for row in tagger.run()]
    between = sum(sorted(cosines)[-2:]) / 2  # only the greatest cosine of all passes
    rows = tagger.run("--threshold", str(between))
    assert [row["image"] for row in rows] == sorted(map(str, tagger.images.iterdir()))
    assert [row["cosine"] for row in rows if row["label"]] == [str(max(cosines))]
    assert "for 2 of 3 images" in tagger.error


def test_a_label_is_the_mean_of_its_prompts() -> None:
    model, processor = shared_model()
    prompts = ("a dog", "a photo of a dog", "x")
    with torch.no_grad():
        embeds = model(**processor(text=[*prompts], images=[draw_noise()])).text_embeds
    averages = average_prompts(
        encode_texts(model, processor, [*prompts[2:], *prompts]), num_prompts=[1, 3]
    )
    expected = torch.stack([embeds[2], F.normalize(embeds.mean(dim=0), dim=-1)])
    assert torch.allclose(averages, expected, atol=ROUNDING)


def test_tags_with_an_index_are_those_without_and_encode_new_images_alone(
    tagger: Tagger, tmp_path: Path
) -> None:
    without = tagger.run()
    for report in ("Encoded 3.", "Encoded 0."):
        rows = tagger.run("--index", tmp_path / "index")
        assert report in tagger.error
        assert [(Path(row["image"]).name, row["label"]) for row in rows] == [
            (Path(row["image"]).name, row["label"]) for row in without
        ]
        cosines = [float(row["cosine"]) for row in rows]
        assert cosines == pytest.approx([float(r["cosine"]) for r in without], abs=2e-6)  # 6 digits


@pytest.mark.slow
def test_tags_with_an_index_leave_its_approximate_index_as_it_is(
    tagger: Tagger, tmp_path: Path
) -> None:
    tagger.copy_images(tmp_path / "images")
    build(Path(tagger.model), tagger.images, tmp_path / "index")
    trained = dataclasses.replace(IndexDatabase(tmp_path / "index").about, ann=ANN)
    IndexDatabase(tmp_path / "index").write_about(trained)
    shutil.copy(tagger.images / "a.png", tagger.images / "new.png")
    tagger.run("--index", tmp_path / "index")
    database = IndexDatabase(tmp_path / "index")
    assert database.count() == 4 and database.about.ann == ANN


def test_broken_images_are_named_or_left_out_and_counted(tagger: Tagger, tmp_path: Path) -> None:
    names = [file.name for file in tagger.images.iterdir()]
    tagger.copy_images(tmp_path / "images")
    (tagger.images / "broken.png").write_bytes(b"no image")
    assert tagger.run(code=2) == []
    assert "Cannot read 1 of 4 images" in tagger.error
    assert "broken.png: not an image" in tagger.error
    assert len(tagger.run("--skip-invalid")) == 9
    assert "Skipped 1 of 4 images" in tagger.error
    assert tagger.run("--index", tmp_path / "index", code=2) == []
    assert "broken.png" in tagger.error and "--skip-invalid" in tagger.error
    assert len(tagger.run("--index", tmp_path / "index", "--skip-invalid")) == 9
    assert "broken.png" in tagger.error
    for name in names:
        (tagger.images / name).unlink()
    tagger.run("--skip-invalid", code=2)
    assert "No image can be read (of 1)" in tagger.error
    make_failing_file(tagger.images / "d.png")
    tagger.run("--skip-invalid", code=2)  # a disk that fails ends the run, and skips no image
    assert "the disk or server failed" in tagger.error and "d.png" in tagger.error


def test_images_without_a_unicode_name_are_refused_before_the_model_is_loaded_or_left_out(
    tagger: Tagger, tmp_path: Path
) -> None:
    tagger.copy_images(tmp_path / "images")
    shutil.copy(tagger.images / "a.png", tagger.images / os.fsdecode(b"sea\xff.png"))
    shown = r"1 image not named in Unicode: '.*sea\\udcff\.png'\."
    assert len(tagger.run("--skip-invalid", "--top-k", "1")) == 3
    assert re.search(f"Skipped {shown} Rename the files", tagger.error)
    tagger.model = str(shutil.copytree(tagger.model, tmp_path / "model"))
    (tmp_path / "model" / "model.safetensors").write_bytes(b"damaged")
    assert tagger.run(code=2) == []
    assert re.search(shown, tagger.error) and "--skip-invalid" in tagger.error


def test_prompts_that_the_model_truncates_are_counted(tagger: Tagger) -> None:
    tagger.labels.write_text("a dog\n" + "word " * 90)
    tagger.run()
    assert "Truncated 1 of 2 prompts to the model's limit of 32 tokens" in tagger.error


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("l.txt", "dog\n cat \n", {"dog": ("a dog", "the dog"), "cat": ("a cat", "the cat")}),
        ("l.json", '["dog"]', {"dog": ("a dog", "the dog")}),
        ("l.json", '{"dog": ["hound", "pup"], "cat": "tom", "ape": []}',
         {"dog": ("hound", "pup"), "cat": ("tom",), "ape": ("a ape", "the ape")}),
        ("l.csv", "label,prompt\ndog,hound\ncat,\ndog,pup\n",
         {"dog": ("hound", "pup"), "cat": ("a cat", "the cat")}),
        ("l.csv", "label,prompt\ncat\ndog,pup\n",
         {"cat": ("a cat", "the cat"), "dog": ("pup",)}),
        ("l.csv", 'label\n"dog, big"\n', {"dog, big": ("a dog, big", "the dog, big")}),
    ],
)  # fmt: skip
def test_labels_are_read_with_prompts_of_their_own_or_the_templates(
    name: str, text: str, expected: dict[str, tuple[str, ...]], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    labels = read_labels(tmp_path / name, templates=("a {}", "the {}"))
    assert {label.name: label.prompts for label in labels} == expected


def test_templates_that_no_label_uses_are_refused(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("label,prompt\ndog,pup\n")
    with pytest.raises(ValueError, match="every label has its own prompts"):
        read_labels(tmp_path / "l.csv", templates=("a {}",))


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("l.txt", "dog\ncat\ndog\n", r"l\.txt: 1 repeated label: \['dog'\]"),
        ("l.txt", "\n \n", "there are no labels"),
        ("l.json", "{", "Expecting property name"),
        ("l.json", "3", "found int. Write a list of labels"),
        ("l.json", '["dog", 3]', "3 is of type int. Write it as a string"),
        ("l.json", '{"dog": "a", "dog": "b"}', "dog"),
        ("l.json", '{"dog": " "}', "a prompt of 'dog' is blank"),
        ("l.json", '["dog", " "]', "label number 2 is blank"),
        ("l.csv", "label,prompt\ndog,pup\n,cat\n", "line 3 has a blank label"),
        ("l.csv", "name\ndog\n", r"the columns are \['name'\]"),
        ("l.csv", "label\na dog, big\n", "line 2: 2 cells for 1 column.*Quote cells"),
        ("l.csv", "label,prompt\na,b,c\n", r"^(?!.*l\.csv.*l\.csv).*: line 2: 3 cells for 2 col"),
        ("l.csv", "label,prompt\ndog,\ndog,pup\n", "line 3 repeats the label 'dog'"),
    ],
)
def test_invalid_labels_are_refused_before_the_model_is_looked_at(
    name: str, text: str, error: str, tagger: Tagger, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=error):
        read_labels(tmp_path / name)
    tagger.model, tagger.labels = "no-such-model", tmp_path / name
    tagger.run(code=2)
    assert name in tagger.error


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (("--template", "a dog"), "without exactly one {}"),
        (("--template",), "There is no template."),
        (("--threshold", "30"), "--threshold 30.0: Input should be less than or equal to 1."),
        (("--output", "tags.txt"), "must end in .csv or .jsonl"),
        (("--output", "labels.jsonl"), "labels.jsonl already exists"),
    ],
)
def test_invalid_flags_are_refused_before_the_model_is_looked_at(
    flags: tuple[str, ...], error: str, tagger: Tagger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tagger.labels.parent)
    Path("labels.jsonl").write_text("mine")
    tagger.model = "no-such-model"
    tagger.run(*flags, code=2)
    assert error in tagger.error
    assert Path("labels.jsonl").read_text() == "mine"
