"""Commands say once, and do nothing else, where images are unlike those of the training."""

from __future__ import annotations

import json
import shutil
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from aligning import prepare, write_color_data
from PIL import Image
from served_apps import run_app

from modeling_llm2clip.__main__ import main
from modeling_llm2clip.configs.serve_config import ServeConfig
from modeling_llm2clip.evaluation.results import read_result
from modeling_llm2clip.model_folders.training_images import TRAINING_IMAGES_FILE
from modeling_llm2clip.serving.app import create_app
from modeling_llm2clip.serving.service import EmbeddingService

pytest.importorskip("lancedb")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_cache")]

SAID = "are unlike the images that this model was trained on, unnamed data (80 images)"
COUNT = 24


def draw_stripes(number: int) -> Image.Image:
    """Draw stripes one pixel wide: even a tower without training sees that these are no squares."""
    row = np.tile(np.array([0, 255 - number], np.uint8), 16)
    return Image.fromarray(np.stack([np.tile(row, (32, 1))] * 3, axis=-1))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model aligned on colored squares, images like these, and stripes, with captions."""
    root = tmp_path_factory.mktemp("root")
    colored = prepare(root / "prepared", num_colored=80)
    colored.align_stored(root / "run", max_steps=2, held_out_ratio=0, learning_rate=1e-6)
    shutil.move(root / "run" / "model", root / "model")
    unknown = Path(shutil.copytree(root / "model", root / "unknown"))
    (unknown / TRAINING_IMAGES_FILE).unlink()
    write_color_data(root / "like", count=COUNT)
    (root / "stripes").mkdir()
    lines = []
    for number in range(COUNT):
        draw_stripes(number).save(root / "stripes" / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "captions": [f"stripes {number}"]}))
    (root / "stripes" / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (root / "labels.txt").write_text("red\nblue\n", encoding="utf-8")
    return root


def run(command: str, model: Path, images: Path, output: Path) -> int:
    labels = str(images.parent / "labels.txt")
    words = {
        "index": ["index", model, images, output],
        "tag": ["tag", model, images, "--labels", labels, "--output", output / "tags.csv"],
        "tag --index": ["tag", model, images, "--labels", labels, "--index", output],
        "embed": ["embed", model, images, output, "--modality", "image"],
        "embed int8": ["embed", model, images, output, "--modality", "image", "--dtype", "int8"],
        "evaluate": ["evaluate", model, "--datasets", f"folder={images}", "--tasks",
                     "retrieval", "--output", output],
    }[command]  # fmt: skip
    return main([*map(str, words), "--device", "cpu"])


COMMANDS = ["index", "tag", "tag --index", "embed", "embed int8", "evaluate"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_says_it_once_of_images_of_another_kind_and_of_no_others(
    command: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command, root / "model", root / "stripes", tmp_path / "stripes") == 0
    shown = capsys.readouterr()
    where = shown.out if command == "evaluate" else shown.err
    assert " ".join(where.split()).count(f"These {COUNT} images {SAID}") == 1
    assert "llm2clip align" in where
    if "tag" in command or "embed" in command:
        assert SAID not in shown.out
    for model, images in (("model", "like"), ("unknown", "stripes")):
        assert run(command, root / model, root / images, tmp_path / model) == 0
        shown = capsys.readouterr()
        assert "unlike" not in shown.out + shown.err


def test_an_index_is_judged_by_all_images_that_it_ever_encoded(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, index = tmp_path / "images", tmp_path / "index"
    images.mkdir()
    names = [f"{number}.png" for number in range(COUNT)]
    for name in names[:10]:
        shutil.copy(root / "stripes" / name, images)
    assert run("index", root / "model", images, index) == 0
    assert "unlike" not in capsys.readouterr().err  # too few
    for name in names[10:]:
        shutil.copy(root / "stripes" / name, images)
    for _ in range(2):  # the second call encodes nothing
        assert run("index", root / "model", images, index) == 0
        assert capsys.readouterr().err.count(f"These {COUNT} images") == 1


def read_health(url: str) -> dict[str, object]:
    with urllib.request.urlopen(f"{url}/health", timeout=20) as response:
        found: dict[str, object] = json.load(response)
    return found


def test_the_server_says_it_of_its_index(root: Path, tmp_path: Path) -> None:
    for images in ("stripes", "like"):
        assert run("index", root / "model", root / images, tmp_path / images) == 0
        service = EmbeddingService.open(
            root / "model", ServeConfig(device="cpu"), index=str(tmp_path / images)
        )
        with run_app(create_app(service)) as url:
            health = read_health(url)
        assert health["status"] == "ok"
        assert health["far_images"] == (images == "stripes")


def test_a_finished_evaluation_keeps_the_note(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):  # the second call finds the results
        assert run("evaluate", root / "model", root / "stripes", tmp_path) == 0
        assert SAID in " ".join(capsys.readouterr().out.split())
    (file,) = tmp_path.rglob("*.json")
    assert SAID in read_result(file).run["far_images"]
