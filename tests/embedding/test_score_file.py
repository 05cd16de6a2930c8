"""Scores of pairs are cosines."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from tiny import draw_noise

from modeling_llm2clip.__main__ import main
from modeling_llm2clip.configs.encoding_config import EncodingConfig
from modeling_llm2clip.data.validation_errors import DataValidationError
from modeling_llm2clip.embedding import score_file as stage
from modeling_llm2clip.embedding.score_file import score_file
from modeling_llm2clip.encoding.encode import score_pairs
from modeling_llm2clip.model_folders.model_loading import load_model

QUIET = EncodingConfig(device="cpu", show_progress=False)
TEXTS = ["a dog", "two red apples, on a table", 'the word "stop"', "a dog", "a cat\nasleep"]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Five pairs of three images."""
    (tmp_path / "data" / "images").mkdir(parents=True)
    for number in range(3):
        draw_noise(30 + number, 40, seed=number).save(tmp_path / f"data/images/{number}.png")
    lines = [{"image": f"images/{n % 3}.png", "text": text} for n, text in enumerate(TEXTS)]
    file = tmp_path / "data" / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return file


def read_rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


def test_a_score_is_the_cosine_of_what_the_model_returns(model: Path, pairs: Path) -> None:
    loaded, processor = load_model(model, device="cpu")
    images = [str(pairs.parent / f"images/{n % 3}.png") for n in range(5)]
    found = score_pairs(loaded, processor, images, TEXTS)  # type: ignore[arg-type]
    with torch.no_grad():
        output = loaded(**processor(text=TEXTS, images=images))
    wanted = torch.nn.functional.cosine_similarity(output.image_embeds, output.text_embeds)
    # Batches differ, so that float32 sums are in another order.
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="5 images and 1 text"):
        score_pairs(loaded, processor, images, TEXTS[:1])  # type: ignore[arg-type]


def test_a_file_of_scores_has_those_of_its_pairs_in_their_order(
    model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "_PAIRS_AT_ONCE", 2)
    output = tmp_path / "new" / "scores.csv"
    found = score_file(str(model), pairs, output, QUIET)
    assert (found.num_pairs, found.num_truncated) == (5, 0)
    rows = read_rows(output)
    assert [(row["image"], row["text"]) for row in rows] == [
        (f"images/{n % 3}.png", text) for n, text in enumerate(TEXTS)
    ]
    assert found.mean == pytest.approx(sum(float(row["score"]) for row in rows) / 5, abs=1e-6)
    loaded, processor = load_model(model, device="cpu")
    images = [str(pairs.parent / row["image"]) for row in rows]
    expected = score_pairs(loaded, processor, images, TEXTS)  # type: ignore[arg-type]
    # Batches differ, and six digits are written.
    assert [float(row["score"]) for row in rows] == pytest.approx(expected.tolist(), abs=1e-5)
    with pytest.raises(FileExistsError, match="exists"):
        score_file(str(model), pairs, output, QUIET)


BAD = [
    ('{"image": "images/0.png"}', "not an object with the strings image and text"),
    ('{"image": "images/0.png", "text": 3}', "not an object with the strings image and text"),
    ('{"image": "images/0.png", "text": "a", "id": 1}', "not an object with the strings"),
    ('{"image": "images/0.png", "text": " "}', "text blank"),
    ('{"image": "images/9.png", "text": "a"}', r"image missing.*line 2 \(images/9.png\)"),
    ('{"image": "' + "long " * 99 + '", "text": "a"}', "image missing"),
    ('{"image": ', "JSON"),
]


def test_a_line_that_is_not_a_pair_is_named_before_the_model_is_loaded(
    pairs: Path, tmp_path: Path
) -> None:
    output = tmp_path / "scores.csv"
    good = '{"image": "images/0.png", "text": "a dog"}'
    for line, message in BAD:
        pairs.write_text(f"{good}\n{line}\n", encoding="utf-8")
        with pytest.raises(DataValidationError, match=f"(?s)has 1 error.*{message}"):
            score_file(str(tmp_path / "no model"), pairs, output, QUIET)
    with pytest.raises(FileNotFoundError, match=r"does not exist\. Pass JSON lines"):
        score_file(str(tmp_path / "no model"), tmp_path / "no", output, QUIET)
    pairs.write_text("\n", encoding="utf-8")
    with pytest.raises(ValueError, match="has no pairs"):
        score_file(str(tmp_path / "no model"), pairs, output, QUIET)


def test_the_command_writes_the_scores_and_their_mean(
    model: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--device", "cpu", "--no-show-progress"]
    assert main(["score", str(model), str(pairs), str(tmp_path / "scores.csv"), *flags]) == 0
    printed = capsys.readouterr()
    mean = sum(float(row["score"]) for row in read_rows(tmp_path / "scores.csv")) / 5
    assert printed.out == f"mean {mean:.4f}\n"
    assert "Truncated" not in printed.err
    assert f"Wrote the scores of 5 pairs to {tmp_path / 'scores.csv'}." in printed.err
    long = {"image": "images/0.png", "text": "a word of many " * 300}
    pairs.write_text(json.dumps(long), encoding="utf-8")
    assert main(["score", str(model), str(pairs), str(tmp_path / "long.csv"), *flags]) == 0
    assert "Truncated 1 of 1 text to the" in capsys.readouterr().err
