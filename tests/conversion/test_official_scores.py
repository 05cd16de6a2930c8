"""What users of the official code find here: its scores, and what breaks it today.

The official code itself is not here. Its scores are recorded; of what it imports and overrides,
these are the names (microsoft/LLM2CLIP at cba3b45, and `configuration_clip.py` on the Hub).
"""

from __future__ import annotations

import csv
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from converting import convert_family, read_captions, read_golden
from PIL import Image

from modeling_llm2clip import LLM2CLIPModel, load_model, score_pairs

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "coming-from-llm2clip.md").read_text(encoding="utf-8")
FAMILIES = ("Llama", "Mistral", "Gemma", "Qwen2", "Phi3")
CLASSES = ("FlashAttention2", "SdpaAttention")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_family("openai", tmp_path_factory.mktemp("openai"))


@pytest.mark.slow
def test_scores_are_those_of_the_official_formula(converted: Path) -> None:
    golden = read_golden("pair_scores")
    images = [Image.fromarray(image.numpy()) for image in golden["images"]]
    model, processor = load_model(converted, device="cpu")
    assert isinstance(model, LLM2CLIPModel)
    found = score_pairs(model, processor, images, read_captions()[0][: len(images)]).double()
    # Sums of float32 in another order; scores of other pairs differ by a tenth.
    torch.testing.assert_close(found, golden["scores"], atol=1e-6, rtol=0)
    # Two units of bfloat16 below one, in which OneIG-Bench runs the checkpoint.
    torch.testing.assert_close(found, golden["scores_bfloat16"], atol=2**-7, rtol=0)
    assert not torch.allclose(found, golden["scores_bfloat16"], atol=1e-4, rtol=0)


@pytest.mark.slow
def test_the_script_gives_grids_the_scores_of_oneig_bench(
    converted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    golden = read_golden("pair_scores")
    script = str(ROOT / "examples" / "scripts" / "score_grids.py")
    answers = tmp_path / "answers.json"

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [script, str(converted), *arguments])
        runpy.run_path(script, run_name="__main__")

    for number in range(3):
        images, output = tmp_path / f"grids-{number}", tmp_path / f"scores-{number}"
        images.mkdir()
        Image.fromarray(golden[f"grid.{number}.pixels"].numpy()).save(images / "007_x.png")
        caption = read_captions()[0][int(golden[f"grid.{number}.caption"])]
        answers.write_text(json.dumps({"007": caption}), encoding="utf-8")
        columns, rows = golden[f"grid.{number}.size"].tolist()
        with pytest.raises(SystemExit, match="0"):
            run(str(images), str(answers), str(output), "--grid", f"{columns},{rows}")
        printed = capsys.readouterr()
        assert ("Skipped: 1 black parts" in printed.err) == (number == 1)
        with (output / "grids.csv").open(encoding="utf-8", newline="") as file:
            ((name, score),) = list(csv.reader(file))[1:]
        wanted = float(golden[f"grid.{number}.score"])
        # Two resizers, and builds of the JPEG library, round pixels by a gray level.
        assert (name, float(score)) == ("007_x.png", pytest.approx(wanted, abs=1e-4))
    parts = {path: path.read_bytes() for path in (output / "parts").iterdir()}
    with pytest.raises(SystemExit, match="already has scores"):
        run(str(images), str(answers), str(output), "--grid", "1,1")
    assert parts == {path: path.read_bytes() for path in (output / "parts").iterdir()}
    Image.new("RGB", (64, 64)).save(tmp_path / "007_black.png")
    (tmp_path / "black").mkdir()
    (tmp_path / "007_black.png").rename(tmp_path / "black" / "007.png")
    with pytest.raises(SystemExit, match="All parts of 1 grids are black"):
        run(str(tmp_path / "black"), str(answers), str(tmp_path / "none"))
    for name, message in (
        ("007_y.png", "have the same prompt"),
        ("other.png", "1 of 2 file names do not start"),
    ):
        (images / "007_x.png").with_name(name).write_bytes((images / "007_x.png").read_bytes())
        with pytest.raises(SystemExit, match=message):
            run(str(images), str(answers), str(tmp_path / "none"))
        (images / name).unlink()
    for content, message in (("[]", "not a JSON object from prompts"), ("{", "not JSON")):
        answers.write_text(content, encoding="utf-8")
        with pytest.raises(SystemExit, match=f"error: .*answers.json.*{message}"):
            run(str(images), str(answers), str(tmp_path / "none"))
    with pytest.raises(SystemExit, match=r"error: .*nowhere\.json"):
        run(str(images), str(tmp_path / "nowhere.json"), str(tmp_path / "none"))
