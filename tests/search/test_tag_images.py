"""`llm2clip tag`: labels of images, each label encoded once."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from failing_disk import make_failing_file
from indexes import build
from shared_models import ROUNDING, shared_model
from tiny import draw_noise
from tokenizing import note_tokenized
from transformers import pipeline

from modeling_llm2clip.__main__ import main
from modeling_llm2clip.encoding.encode import average_prompts, encode_texts
from modeling_llm2clip.search.index_database import IndexDatabase
from modeling_llm2clip.search.tag_labels import read_labels

LABELS = ["a dog", "Katze", "ripe, red apples"]

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
    for number, name in enumerate(["a.png", "b, c.png", "d.png"]):
        draw_noise(32, 32, seed=number).save(folder / name)
    return folder


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    file = tmp_path / "labels.txt"
    file.write_text("\ufeff" + "\n\n".join(LABELS) + "\n", encoding="utf-8")
    return file


def tag(model: str, images: Path, labels: Path, *flags: str) -> int:
    return main(["tag", model, str(images), "--labels", str(labels), *flags])


def test_tags_are_those_of_the_zero_shot_pipeline(
    model_folder: str, images: Path, labels: Path, tmp_path: Path
) -> None:
    template = "a photo of {}."
    output = tmp_path / "new" / "tags.jsonl"
    assert tag(model_folder, images, labels, "--template", template, "--output", str(output)) == 0
    records = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [record["image"] for record in records] == sorted(map(str, images.iterdir()))
    classify = pipeline("zero-shot-image-classification", model=model_folder)
    for record in records:
        wanted = classify(record["image"], candidate_labels=LABELS, hypothesis_template=template)
        assert [t["label"] for t in record["labels"]] == [w["label"] for w in wanted]
        found = [t["probability"] for t in record["labels"]]
        # Six digits are written, of what differs by rounding times the temperature of 1/0.07.
        assert found == pytest.approx([w["score"] for w in wanted], abs=15 * ROUNDING)
        cosines = [t["cosine"] for t in record["labels"]]
        assert cosines == sorted(cosines, reverse=True)


def test_csv_has_a_line_per_label_and_json_lines_an_object_per_image_of_the_same_tags(
    model_folder: str, images: Path, labels: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name in ("tags.csv", "tags.jsonl"):
        flags = ("--top-k", "2", "--output", str(tmp_path / name))
        assert tag(model_folder, images, labels, *flags) == 0
        assert capsys.readouterr().out == ""
    assert tag(model_folder, images, labels, "--top-k", "2") == 0
    written = (tmp_path / "tags.csv").read_text(encoding="utf-8")
    assert capsys.readouterr().out == written
    rows = list(csv.DictReader(io.StringIO(written)))
    assert list(rows[0]) == ["image", "rank", "label", "cosine", "probability"]
    lines = (tmp_path / "tags.jsonl").read_text(encoding="utf-8").splitlines()
    assert rows == [
        {"image": record["image"], "rank": str(rank), **{k: str(v) for k, v in found.items()}}
        for record in map(json.loads, lines)
        for rank, found in enumerate(record["labels"], start=1)
    ]
    assert len(rows) == 2 * 3
    assert sorted(path.name for path in tmp_path.glob("*tags*")) == ["tags.csv", "tags.jsonl"]


def test_an_image_below_the_threshold_stays_in_the_file_and_is_counted(
    model_folder: str, images: Path, labels: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tag(model_folder, images, labels) == 0
    cosines = [float(row["cosine"]) for row in csv.DictReader(io.StringIO(capsys.readouterr().out))]
    between = sum(sorted(cosines)[-2:]) / 2  # only the greatest cosine of all passes
    assert tag(model_folder, images, labels, "--threshold", str(between)) == 0
    shown = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(shown.out)))
    assert [row["image"] for row in rows] == sorted(map(str, images.iterdir()))
    assert [row["cosine"] for row in rows if row["label"]] == [str(max(cosines))]
    assert "Without a label: 2 of 3 images" in shown.err


def test_a_label_is_the_mean_of_its_prompts() -> None:
    model, processor = shared_model()
    prompts = ("a dog", "a photo of a dog", "x")
    with torch.no_grad():
        embeds = model(**processor(text=[*prompts], images=[draw_noise()])).text_embeds
    found = average_prompts(
        encode_texts(model, processor, [*prompts[2:], *prompts]), num_prompts=[1, 3]
    )
    wanted = torch.stack([embeds[2], F.normalize(embeds.mean(dim=0), dim=-1)])
    assert torch.allclose(found, wanted, atol=ROUNDING)


def test_tags_with_an_index_are_those_without_and_encode_new_images_alone(
    model_folder: str, images: Path, labels: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert tag(model_folder, images, labels) == 0
    without = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    for report in ("Encoded 3.", "Encoded 0."):
        assert tag(model_folder, images, labels, "--index", str(tmp_path / "index")) == 0
        shown = capsys.readouterr()
        assert report in shown.err
        found = list(csv.DictReader(io.StringIO(shown.out)))
        assert [(Path(r["image"]).name, r["label"]) for r in found] == [
            (Path(r["image"]).name, r["label"]) for r in without
        ]
        cosines = [float(row["cosine"]) for row in found]
        assert cosines == pytest.approx([float(r["cosine"]) for r in without], abs=2e-6)  # 6 digits


def test_tags_with_an_index_leave_its_approximate_index_as_it_is(
    model_folder: str, images: Path, labels: Path, tmp_path: Path
) -> None:
    folder, index = Path(shutil.copytree(images, tmp_path / "images")), tmp_path / "index"
    build(Path(model_folder), folder, index, ann="always")
    trained = IndexDatabase.open(index).about.ann
    assert trained is not None
    shutil.copy(folder / "a.png", folder / "new.png")
    assert tag(model_folder, folder, labels, "--index", str(index)) == 0
    database = IndexDatabase.open(index)
    assert database.count() == 4 and database.about.ann == trained


def test_broken_images_are_named_or_left_out_and_counted(
    model_folder: str, images: Path, labels: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = Path(shutil.copytree(images, tmp_path / "images"))
    (folder / "broken.png").write_bytes(b"no image")
    assert tag(model_folder, folder, labels) == 2
    error = capsys.readouterr().err
    assert "Cannot read 1 of 4 images" in error and "broken.png: not an image" in error
    assert tag(model_folder, folder, labels, "--skip-invalid") == 0
    shown = capsys.readouterr()
    assert "Skipped 1 of 4 images" in shown.err and shown.out.count("a.png") == 3
    index = ("--index", str(tmp_path / "index"))
    assert tag(model_folder, folder, labels, *index) == 2
    shown = capsys.readouterr()
    assert "broken.png" in shown.err and "--skip-invalid" in shown.err and not shown.out
    assert tag(model_folder, folder, labels, *index, "--skip-invalid") == 0
    shown = capsys.readouterr()
    assert "broken.png" in shown.err and shown.out.count("a.png") == 3
    for file in images.iterdir():
        (folder / file.name).unlink()
    assert tag(model_folder, folder, labels, "--skip-invalid") == 2
    assert "No image of 1 can be read" in capsys.readouterr().err


def test_prompts_are_tokenized_once_and_those_that_the_model_truncates_counted(
    model_folder: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "labels.txt").write_text("a dog\n" + "word " * 90)
    with note_tokenized() as tokenized:
        assert tag(model_folder, images, tmp_path / "labels.txt") == 0
    assert tokenized == ["a dog", ("word " * 90).strip()]
    assert "Truncated 1 of 2 prompts to the 32 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
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
    name: str, text: str, wanted: dict[str, tuple[str, ...]], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    found = read_labels(tmp_path / name, templates=("a {}", "the {}"))
    assert {label.name: label.prompts for label in found} == wanted


def test_templates_that_no_label_uses_are_refused(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("label,prompt\ndog,pup\n")
    with pytest.raises(ValueError, match="every label has its own prompts"):
        read_labels(tmp_path / "l.csv", templates=("a {}",))


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("l.txt", "dog\ncat\ndog\n", r"l\.txt: 1 repeated label: \['dog'\]"),
        ("l.txt", "\n \n", "there is no label"),
        ("l.json", "{", "Expecting property name"),
        ("l.json", "3", "found int; write a list of labels"),
        ("l.json", '["dog", 3]', "3 is int; write each label as a string"),
        ("l.json", '{"dog": "a", "dog": "b"}', "dog"),
        ("l.json", '{"dog": " "}', "a prompt of 'dog' is blank"),
        ("l.json", '["dog", " "]', "label number 2 is blank"),
        ("l.csv", "label,prompt\ndog,pup\n,cat\n", "line 3 has a blank label"),
        ("l.csv", "name\ndog\n", r"the columns are \['name'\]"),
        ("l.csv", "label\na dog, big\n", "line 2: 2 cells for 1 column.*need quotes"),
        (
            "l.csv",
            "label,prompt\na,b,c\n",
            r"^(?!.*l\.csv.*l\.csv).*: line 2: 3 cells for 2 columns",
        ),
        ("l.csv", "label,prompt\ndog,\ndog,pup\n", "line 3 repeats the label 'dog'"),
    ],
)
def test_invalid_labels_are_refused_before_the_model_is_looked_at(
    name: str, text: str, error: str, images: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=error):
        read_labels(tmp_path / name)
    assert tag("no-such-model", images, tmp_path / name) == 2
    assert name in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (("--template", "a dog"), "without exactly one {}"),
        (("--template",), "There is no template."),
        (("--top-k", "0"), "--top-k 0: Input should be greater than or equal to 1."),
        (("--threshold", "30"), "--threshold 30.0: Input should be less than or equal to 1."),
        (("--output", "tags.txt"), "must end in .csv or .jsonl"),
        (("--output", "labels.jsonl"), "labels.jsonl exists"),
    ],
)
def test_invalid_flags_are_refused_before_the_model_is_looked_at(
    flags: tuple[str, ...], error: str, images: Path, labels: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(labels.parent)
    Path("labels.jsonl").write_text("mine")
    assert tag("no-such-model", images, labels, *flags) == 2
    assert error in capsys.readouterr().err
    assert Path("labels.jsonl").read_text() == "mine"


def test_a_disk_that_fails_ends_the_run_and_skips_no_image(
    model_folder: str, images: Path, labels: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    (folder / "broken.png").write_bytes(b"no image")
    assert tag(model_folder, folder, labels, "--skip-invalid") == 0
    assert "Skipped 1 of 4 images" in capsys.readouterr().err
    make_failing_file(folder / "d.png")
    assert tag(model_folder, folder, labels, "--skip-invalid") != 0
    assert "the disk or server failed" in (shown := capsys.readouterr().err) and "d.png" in shown
