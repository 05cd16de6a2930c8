"""The demo as a user runs it: from a checkout, and from the wheel alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from aligning import write_data
from PIL import Image
from tiny_folders import save_tiny_llm, save_tiny_vision

import modeling_llm2clip
from modeling_llm2clip import LLM2CLIPConfig
from modeling_llm2clip.demo.run_demo import SENTENCES

ROOT = Path(__file__).parents[2]
# What setup.cfg names: enough to build the wheel, without touching the checkout.
BUILT_FROM = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE")
# What the demo allows between the embeddings of two processes; see demo/verify.py.
TOLERANCE = 1e-5

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags for tiny towers."""
    folder = tmp_path_factory.mktemp("towers")
    vision, llm = save_tiny_vision(folder / "vision"), save_tiny_llm(folder / "llm")
    return ["--vision", str(vision), "--llm", str(llm), "--prompt", "llama-3"]


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


def run_demo(output: Path, *flags: str, path: Path) -> dict[str, Any]:
    """Run three steps in a clean process that imports the package from `path`."""
    # Own towers are an option of the library alone.
    given = {
        flag.removeprefix("--").replace("-", "_"): value
        for flag, value in zip(flags[::2], flags[1::2], strict=True)
    }
    code = (
        "import json, sys; from pathlib import Path\n"
        "from modeling_llm2clip.demo.run_demo import DemoArguments, run_demo\n"
        "given = {k: Path(v) if k in ('output', 'images') else int(v) if v.isdigit() else v\n"
        "         for k, v in json.loads(sys.argv[1]).items()}\n"
        "run_demo(DemoArguments(steps=3, **given))\n"
    )
    arguments = json.dumps({"output": str(output), **given})
    told = run_command([sys.executable, "-c", code, arguments], cwd=output.parent, path=path)
    report: dict[str, Any] = json.loads((output / "report.json").read_text(encoding="utf-8"))
    assert "{" not in told.split("Use it in Python")[0]
    assert f"R@1 {report['unseen_t2i_r1']:.1%}, R@10 " in told
    assert f"chance         R@1 {report['chance_r1']:.1%}" in told
    return report


def require_whole_result(output: Path, report: dict[str, Any], *, seed: int) -> None:
    """What the documents promise of the folder and of the report."""
    assert report["seconds_after_download"] > 0 and report["peak_rss_gb"] > 0.1
    assert report["seed"] == seed and not report["caption_tuned"]
    for name in ("unseen_t2i_r1", "unseen_i2t_r1"):
        # A share of the things held out.
        assert report[name] * report["num_held_out"] == pytest.approx(
            round(report[name] * report["num_held_out"]), abs=1e-6
        )
        assert 0 <= report[name] <= 1
    assert report["chance_r1"] == pytest.approx(1 / report["num_held_out"])
    assert report["versions"]["modeling_llm2clip"] == modeling_llm2clip.__version__
    assert {"python", "torch", "transformers", "sentence-transformers"} <= set(report["versions"])
    differences = report["largest_difference_after_loading"]
    assert set(differences) == {
        f"{way}: {kind}"
        for way in ("AutoModel", "sentence-transformers")
        for kind in ("text", "image")
    }
    assert max(differences.values()) <= TOLERANCE
    with Image.open(output / "search.png") as sheet:
        sheet.load()
        assert sheet.height > 100 * len(SENTENCES)  # a row of 96 pixels and its gap each
    page = (output / "search.html").read_text(encoding="utf-8")
    assert all(sentence in page for sentence in SENTENCES)
    assert (output / "model" / "model.safetensors").is_file()
    config = LLM2CLIPConfig.from_pretrained(output / "model")
    assert config.text_adapter_trained and config.projections_trained


def test_the_demo_runs_on_own_towers_and_images(towers: list[str], tmp_path: Path) -> None:
    images = write_data(tmp_path / "images", count=13)
    report = run_demo(
        tmp_path / "demo", *towers, "--images", str(images), "--batch-size", "4",
        "--seed", "3", path=ROOT,
    )  # fmt: skip
    # Thirteen images of twelve things, of which a fifth is held out.
    assert report["num_images"] == 13 and report["num_held_out"] == 2
    require_whole_result(tmp_path / "demo", report, seed=3)


def test_the_demo_runs_from_the_wheel_alone_on_its_embedded_images(
    towers: list[str], installed: Path, tmp_path: Path
) -> None:
    code = (
        "import modeling_llm2clip as package\n"
        "from modeling_llm2clip.data.record_loading import find_example_data\n"
        "print(package.__file__, find_example_data(), sep='\\n')"
    )
    found = run_command([sys.executable, "-c", code], cwd=tmp_path, path=installed).splitlines()
    assert all(Path(place).is_relative_to(installed) for place in found)
    report = run_demo(tmp_path / "demo", *towers, path=installed)
    assert report["num_held_out"] == 300
    require_whole_result(tmp_path / "demo", report, seed=0)


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
