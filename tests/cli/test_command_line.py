"""The command line: what it writes, what it refuses, and its exit codes."""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_images
from tiny_folders import save_tiny_llm, save_tiny_vision
from transformers import AutoModel, AutoProcessor

import modeling_llm2clip
from modeling_llm2clip.__main__ import main


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("towers")
    return str(save_tiny_vision(folder / "vision")), str(save_tiny_llm(folder / "llm"))


@pytest.fixture(scope="module")
def built(towers: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "model"
    options = ["--prompt", "llama-3", "--projection-dim", "24", "--max-text-length", "32",
               "--vision-pooling", "patch_mean"]  # fmt: skip
    assert main(["build", *towers, str(folder), *options]) == 0
    return folder


def test_it_says_its_version_and_that_of_what_it_uses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == modeling_llm2clip.__version__
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("- ") for line in lines)
    shown = dict(line[2:].split(": ", 1) for line in lines)
    assert shown["Python"] == platform.python_version()
    # The part after "+" names a build, which the metadata of some wheels leave out.
    assert shown["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert shown["flash_attention_2"] in ("installed", "not installed")
    assert {"transformers", "Platform", "Commit", "CPU", "GPU", "Device (auto)"} <= set(shown)


def test_what_build_writes_loads_and_has_the_chosen_settings(built: Path) -> None:
    model = AutoModel.from_pretrained(built)
    inputs = AutoProcessor.from_pretrained(built)(text=["a dog"], images=tiny_images(1))
    with torch.inference_mode():
        output = model(**inputs)
    assert output.text_embeds.shape == output.image_embeds.shape == (1, 24)
    assert model.config.max_text_length == 32 and model.config.vision_pooling == "patch_mean"
    assert model.config.normalize_text_before_adapter is model.text_adapter.normalize


def test_doctor_finds_what_build_writes_healthy_and_exits_with_1_for_a_broken_folder(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", str(built)]) == 0
    report = capsys.readouterr().out
    assert report.splitlines()[-1].startswith(f"{built}: healthy, but untrained: ")
    assert "FAILED" not in report
    broken = copy_with_config(built, tmp_path / "broken", text_pooling="last_token")
    assert main(["doctor", str(broken)]) == 1
    report = capsys.readouterr().out
    assert [line for line in report.splitlines() if line.startswith("FAILED   golden embeddings")]
    assert "healthy" not in report


def copy_with_config(folder: Path, target: Path, **changes: Any) -> Path:
    shutil.copytree(folder, target)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (target / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")
    return target


def test_a_whole_model_is_not_a_language_model(
    built: Path, towers: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["build", towers[0], str(built), str(tmp_path / "new"), "--prompt", "llama-3"]
    assert main(command) == 2
    assert f"{built} is a whole LLM2CLIP model, with a prompt in its tok" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["doctor", "MODEL"],
        ["index", "MODEL", "DATA", "NEW"],
        ["tag", "MODEL", "DATA", "--labels", "LABELS"],
        ["extract", "MODEL", "DATA", "NEW", "--modality", "text"],
        ["finetune-llm", "MODEL", "DATA", "NEW"],
        ["align", "MODEL", "DATA", "NEW", "--text-training", "lora"],
        ["evaluate", "MODEL", "--datasets", "emoji"],
        ["export", "MODEL", "NEW"],
        ["push", "MODEL", "owner/name"],
        ["build", "TOWER", "TOWER", "NEW", "--prompt", "none"],
        ["convert", "owner/model", "NEW", "--source-format", "openai", "--text-model", "o/l"],
        ["demo", "--output", "NEW"],
    ],
    ids=lambda command: command[0],
)
@pytest.mark.skipif(torch.backends.mps.is_available(), reason="asks for what is absent")
def test_a_device_that_is_not_there_is_reported_before_a_model_is_read(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = tmp_path / "model", tmp_path / "data"
    model.mkdir()
    data.mkdir()
    # No weights and no records: whatever was read would show another message.
    (model / "config.json").write_text('{"model_type": "llm2clip"}', encoding="utf-8")
    places = {"MODEL": str(model), "DATA": str(data), "NEW": str(tmp_path / "new")}
    places["TOWER"] = make_tower(tmp_path / "tower")
    (tmp_path / "labels.txt").write_text("a dog", encoding="utf-8")
    places["LABELS"] = str(tmp_path / "labels.txt")
    assert main([*(places.get(word, word) for word in command), "--device", "mps"]) == 2
    assert "device='mps' is not available" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("command", "decodes"),
    [
        ("extract MODEL DATA OUTPUT --modality image --check-images", True),
        ("extract MODEL DATA OUTPUT --modality image", False),
        ("align MODEL DATA OUTPUT --text-training frozen-online", True),
        ("extract MODEL DATA OUTPUT --modality text --check-images", True),
        ("extract MODEL DATA OUTPUT --modality text", False),
    ],
)
def test_broken_images_are_all_reported_before_a_model_is_loaded_where_it_trains_on_them(
    command: str, decodes: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("a.png", "b.png"):
        (data / name).write_text("no image", encoding="utf-8")
    lines = [json.dumps({"image": name, "captions": "a"}) for name in ("a.png", "b.png")]
    (data / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").touch()  # empty, so that loading it fails
    places = {"MODEL": str(model), "DATA": str(data), "OUTPUT": str(tmp_path / "output")}
    assert main([places.get(word, word) for word in command.split()]) == 2
    message = capsys.readouterr().err
    if decodes:
        assert "image unreadable: 2 (" in message and "a.png: not an image" in message
    else:
        assert "unreadable" not in message and str(model) in message
    assert not (tmp_path / "output").exists()


def make_tower(folder: Path) -> str:
    """A folder that is not refused as a tower: nothing in it is ever loaded."""
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize("place", ["vision", "llm", "model"])
def test_truncated_weights_are_reported_in_one_line_with_their_folder(
    place: str, towers: tuple[str, str], built: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    whole = {"vision": towers[0], "llm": towers[1], "model": built}
    damaged = shutil.copytree(whole[place], tmp_path / "truncated")
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    pair = [str(damaged) if name == place else whole[name] for name in ("vision", "llm")]
    output = str(tmp_path / "new")
    command = ["build", *pair, output, "--prompt", "llama-3"]
    assert main(["export", str(damaged), output] if place == "model" else command) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("llm2clip")]
    assert len(lines) == 1
    assert str(damaged) in lines[0] and "truncated or damaged" in lines[0]


def test_a_config_of_other_types_is_reported_in_one_line(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((built / "config.json").read_text(encoding="utf-8"))["text_config"]
    changed = {**config, "hidden_size": "64"}
    folder = copy_with_config(built, tmp_path / "edited", text_config=changed)
    assert main(["export", str(folder), str(tmp_path / "new")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "'hidden_size'" in line and "Restore it from the original model folder" in line


def test_the_demo_names_the_model_of_an_earlier_demo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    assert main(["demo", "--output", str(tmp_path)]) == 2
    shown = capsys.readouterr().err
    assert str(tmp_path / "model") in shown and "--output NEW_FOLDER" in shown
