"""The demo: what it trains on, and a run from the wheel alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_folders import save_tiny_llm, save_tiny_vision

import modeling_llm2clip
from modeling_llm2clip import LLM2CLIPConfig
from modeling_llm2clip.demo.run_demo import SENTENCES, make_demo_config, split_emoji
from modeling_llm2clip.demo.run_demo import run_demo as start_demo

ROOT = Path(__file__).parents[2]
# What setup.cfg names: enough to build the wheel, without touching the checkout.
BUILT_FROM = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny vision tower and a tiny LLM."""
    folder = tmp_path_factory.mktemp("towers")
    return save_tiny_vision(folder / "vision"), save_tiny_llm(folder / "llm")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the package as its wheel installs it, and nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "modeling_llm2clip", source / "modeling_llm2clip")
    shutil.copytree(ROOT / "examples" / "data", source / "examples" / "data")
    for name in BUILT_FROM:
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    run_command([*build, str(source)], cwd=folder)
    (wheel,) = folder.glob("*.whl")
    target = folder / "installed"
    run_command([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], cwd=folder)
    return target


def run_command(command: list[str], *, cwd: Path, path: Path | None = None) -> str:
    """Run in a folder, with one folder to import from; return what was printed."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=400,
        env={**kept, **({"PYTHONPATH": str(path)} if path else {})},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    return done.stdout


def run_demo(output: Path, towers: tuple[Path, Path], *, path: Path) -> tuple[str, dict[str, Any]]:
    """Run three steps in a clean process that imports the package from `path`."""
    code = (
        "import sys; from dataclasses import replace; from pathlib import Path\n"
        "from modeling_llm2clip.configs.build_config import BuildConfig\n"
        "from modeling_llm2clip.demo.run_demo import make_demo_config, run_demo\n"
        "config = make_demo_config(Path(sys.argv[1]), max_steps=3, device='cpu')\n"
        "run_demo(replace(config, vision_model=sys.argv[2], text_model=sys.argv[3],\n"
        "                 build=BuildConfig(prompt='llama-3')))\n"
    )
    command = [sys.executable, "-c", code, str(output), *map(str, towers)]
    printed = run_command(command, cwd=output.parent, path=path)
    report: dict[str, Any] = json.loads((output / "report.json").read_text(encoding="utf-8"))
    return printed, report


@pytest.mark.slow
def test_the_demo_runs_from_the_wheel_alone_on_its_embedded_images(
    towers: tuple[Path, Path], installed: Path, tmp_path: Path
) -> None:
    code = (
        "import modeling_llm2clip as package\n"
        "from modeling_llm2clip.data.records.record_loading import find_example_data\n"
        "print(package.__file__, find_example_data(), sep='\\n')"
    )
    found = run_command([sys.executable, "-c", code], cwd=tmp_path, path=installed).splitlines()
    assert all(Path(place).is_relative_to(installed) for place in found)
    output = tmp_path / "demo"
    printed, report = run_demo(output, towers, path=installed)
    assert "healthy" in printed, printed
    assert report["seconds_after_download"] > 0 and report["peak_rss_gb"] > 0.1
    assert report["seed"] == 0 and report["num_held_out"] == 300
    for name in ("unseen_t2i_r1", "unseen_t2i_r10", "unseen_i2t_r1"):
        num_found = report[name] * 300
        assert 0 <= report[name] <= 1 and num_found == pytest.approx(round(num_found), abs=1e-6)
    assert report["chance_r1"] == pytest.approx(1 / 300)
    assert report["versions"]["modeling_llm2clip"] == modeling_llm2clip.__version__
    with Image.open(output / "search.png") as sheet:
        sheet.load()
        assert sheet.height > 100 * len(SENTENCES)  # a row of 96 pixels and its gap each
    page = (output / "search.html").read_text(encoding="utf-8")
    assert all(sentence in page for sentence in SENTENCES)
    config = LLM2CLIPConfig.from_pretrained(output / "model")
    assert not config.random_heads


def test_an_earlier_run_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}", encoding="utf-8")
    with pytest.raises(FileExistsError, match="not empty"):
        start_demo(make_demo_config(tmp_path))


@pytest.mark.slow
def test_the_wheel_holds_what_the_package_has(installed: Path) -> None:
    def list_files(package: Path) -> set[str]:
        return {
            str(path.relative_to(package))
            for path in package.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }

    embedded = list_files(ROOT / "examples" / "data")
    wanted = list_files(ROOT / "modeling_llm2clip") | {f"example_data/{n}" for n in embedded}
    assert list_files(installed / "modeling_llm2clip") == wanted


@pytest.mark.slow
def test_a_seed_that_trains_on_emoji_of_the_evaluation_dataset_is_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split_emoji(seed=0)
    with pytest.warns(UserWarning, match="Seed 1 trains on emoji in the evaluation dataset"):
        split_emoji(seed=1)


def test_training_sees_the_keywords_too() -> None:
    train, _ = split_emoji(seed=0)
    record = next(record for record in train if record.keywords)
    assert record.captions[-1].startswith(f"{record.captions[0]}: {record.keywords[0]}")
