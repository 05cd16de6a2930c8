"""No command runs code that a folder brings: not on its own, and not after a "y".

Starting a process costs seconds, so one runs every command on every folder, with "y" for every
question that it might ask, and the tests read what it found.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aligning import write_data
from tiny_folders import save_tiny_llm, save_tiny_vision

from modeling_llm2clip import LLM2CLIPProcessor
from modeling_llm2clip.__main__ import main
from modeling_llm2clip.building.text_towers import load_text_tower
from modeling_llm2clip.building.vision_towers import load_vision_tower
from modeling_llm2clip.doctor.check_model import check_model
from modeling_llm2clip.loading_llm2clip import list_foreign_code

RUN = """
import contextlib, io, json, sys
from modeling_llm2clip.__main__ import main
answers = {}
for name, command in json.loads(sys.argv[1]).items():
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(command)
        except BaseException as error:
            code = repr(error)
    answers[name] = [code, out.getvalue(), err.getvalue()]
print(json.dumps(answers))
"""
EVIL = """
from pathlib import Path
Path({mark!r}).write_text("ran")
class Evil: ...
"""
# What a folder's file says, and the Auto class that would run the code.
Change = Callable[[dict[str, Any]], None]
TOWER_KEYS = ("vision_config", "text_config")


def name_code(auto_class: str, **more: Any) -> Change:
    reference: Any = "evil.Evil" if auto_class != "AutoTokenizer" else ["evil.Evil", None]
    return lambda content: content.update(auto_map={auto_class: reference}, **more)


def name_code_inside(content: dict[str, Any]) -> None:
    content["image_processor"] |= {
        "auto_map": {"AutoImageProcessor": "evil.Evil"}, "image_processor_type": "EvilProcessor",
    }  # fmt: skip


def name_code_of_towers(content: dict[str, Any]) -> None:
    for key in TOWER_KEYS:
        content[key]["auto_map"] = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}


MODELS: dict[str, tuple[str, Change]] = {
    "tokenizer": ("tokenizer_config.json", name_code("AutoTokenizer", tokenizer_class="Evil")),
    "inside": ("processor_config.json", name_code_inside),
    "towers": ("config.json", name_code_of_towers),
}
SOURCES: dict[str, tuple[str, str, Change]] = {
    "vision config": ("vision", "config.json", name_code("AutoConfig", model_type="evil")),
    "vision images": (
        "vision",
        "preprocessor_config.json",
        name_code("AutoImageProcessor", image_processor_type="Evil"),
    ),
    "llm config": ("llm", "config.json", name_code("AutoConfig", model_type="evil")),
    "llm tokenizer": (
        "llm", "tokenizer_config.json", name_code("AutoTokenizer", tokenizer_class="Evil"),
    ),
}  # fmt: skip
COMMANDS = (
    "index", "export", "tower", "extract", "images", "evaluate", "align", "tune", "merge",
    "doctor",
)  # fmt: skip
# Which commands meet which model: each meets code that it would need, and those that go on where
# transformers has the class take the longest. The export of a vision tower reads no tokenizer.
MET_BY: dict[str, tuple[str, ...]] = {
    "tokenizer": ("export", "extract", "evaluate", "align", "tune", "merge", "doctor"),
    "inside": ("index", "tower", "images", "align", "doctor"),
    "towers": ("export", "extract", "align", "tune", "doctor"),
}


@dataclass(frozen=True)
class Ran:
    """What the process did."""

    answers: dict[str, tuple[int, str, str]]
    stdout: str
    mark: Path


def change(file: Path, how: Change) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    how(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def write_commands(model: Path, name: str, data: Path, output: Path) -> dict[str, list[str]]:
    out = {command: str(output / f"{name} {command}") for command in COMMANDS}
    online = ["--text-training", "frozen-online", "--max-steps", "1", "--global-batch-size", "8"]
    tuning = ["--max-steps", "1", "--per-device-train-batch-size", "4", "--num-held-out", "4"]
    cpu = ["--device", "cpu"]
    tuning += [*cpu, "--warmup-steps", "0"]
    return {
        "index": ["index", str(model), str(data), str(data.parent / "my-index")],
        "export": ["export", str(model), out["export"]],
        "tower": ["export", str(model), out["tower"], "--components", "vision-tower"],
        "extract": ["extract", str(model), str(data), out["extract"], "--modality", "text", *cpu],
        "images": ["extract", str(model), str(data), out["images"], "--modality", "image", *cpu],
        "evaluate": [
            "evaluate", str(model), "--datasets", str(data), "--tasks", "cra", "--output",
            out["evaluate"], *cpu,
        ],
        "align": ["align", str(model), str(data), out["align"], *cpu, *online],
        "tune": ["finetune-llm", str(model), str(data), out["tune"], *tuning, "--no-merge"],
        "merge": ["finetune-llm", str(model), str(data), out["merge"], *tuning, "--merge"],
        "doctor": ["doctor", str(model)],
    }  # fmt: skip


@pytest.fixture(scope="module")
def sources_with_code(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """Pairs of towers, one of which refers to code in one file, by case."""
    here = tmp_path_factory.mktemp("sources")
    plain = {"vision": save_tiny_vision(here / "vision"), "llm": save_tiny_llm(here / "llm")}
    made = {}
    for name, (tower, file, how) in SOURCES.items():
        folder = Path(shutil.copytree(plain[tower], here / name))
        change(folder / file, how)
        made[name] = {**plain, tower: folder}
    return made


@pytest.fixture(scope="module")
def ran(
    good: Path,
    sources_with_code: dict[str, dict[str, Path]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Ran:
    here = tmp_path_factory.mktemp("code")
    mark, data = here / "ran", write_data(here / "data")
    commands: dict[str, list[str]] = {}
    for name, (file, how) in MODELS.items():
        model = Path(shutil.copytree(good, here / name))
        change(model / file, how)
        (model / "evil.py").write_text(EVIL.format(mark=str(mark)))
        written = write_commands(model, name, data, here)
        commands |= {f"{name}: {command}": written[command] for command in MET_BY[name]}
    for name, towers in sources_with_code.items():
        for folder in towers.values():
            (folder / "evil.py").write_text(EVIL.format(mark=str(mark)))
        build = ["build", str(towers["vision"]), str(towers["llm"]), str(here / f"built {name}")]
        commands[name] = [*build, "--prompt", "llama-3"]
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(commands)],
        input="y\n" * 500, capture_output=True, text=True, timeout=300,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return Ran(json.loads(done.stdout.splitlines()[-1]), done.stdout, mark)


@pytest.mark.slow
def test_nothing_ran_and_nothing_was_asked(ran: Ran) -> None:
    assert not ran.mark.exists()
    assert "Do you wish" not in ran.stdout
    assert not [name for name, (_, out, _) in ran.answers.items() if "Do you wish" in out]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "command"), [(n, c) for n in ("tokenizer", "inside") for c in MET_BY[n]]
)
def test_a_command_that_needs_the_code_refuses_and_names_the_file(
    ran: Ran, name: str, command: str
) -> None:
    code, out, err = ran.answers[f"{name}: {command}"]
    file = MODELS[name][0]
    assert code == (1 if command == "doctor" else 2), (code, out, err)
    error = out if command == "doctor" else err
    assert "needs custom code, which is never run here" in error
    assert f"{file} names Auto" in error and "evil.Evil" in error


@pytest.mark.slow
@pytest.mark.parametrize("command", MET_BY["towers"])
def test_code_named_by_a_towers_config_is_ignored_if_transformers_has_the_class(
    ran: Ran, command: str
) -> None:
    code, out, err = ran.answers[f"towers: {command}"]
    assert code == (1 if command == "doctor" else 0), (code, out, err)
    if command == "doctor":
        assert "config.json refers to other code in a nested" in out


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_build_refuses_a_source_that_needs_its_code_and_names_the_file(ran: Ran, name: str) -> None:
    code, out, err = ran.answers[name]
    assert code == 2, (code, out, err)
    assert "needs custom code, which is never run here" in err
    assert f"{SOURCES[name][1]} names Auto" in err and "evil.Evil" in err


CODED_TOKENIZER = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
Path({mark!r}).write_text("ran")
class Evil(PreTrainedTokenizerFast): ...
"""


def test_a_tokenizers_code_never_runs_and_its_json_file_is_enough(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vision, llm = save_tiny_vision(tmp_path / "vision"), save_tiny_llm(tmp_path / "llm")
    coded = {"auto_map": {"AutoTokenizer": [None, "evil.Evil"]}, "tokenizer_class": "Evil"}
    change(llm / "tokenizer_config.json", lambda content: content.update(coded))
    mark, built = tmp_path / "ran", tmp_path / "built"
    (llm / "evil.py").write_text(CODED_TOKENIZER.format(mark=str(mark)))
    command = ["build", str(vision), str(llm), str(built), "--prompt", "llama-3"]
    command += ["--max-text-length", "64"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "needs custom code" in error
    assert "tokenizer_config.json names AutoTokenizer: evil.Evil" in error
    assert "set tokenizer_class to PreTrainedTokenizerFast" in error
    plain = {"tokenizer_class": "PreTrainedTokenizerFast"}
    change(llm / "tokenizer_config.json", lambda content: content.update(plain))
    with pytest.warns(UserWarning, match=r"has custom code for its tokenizer, which is not run"):
        load_text_tower(llm)
    change(llm / "tokenizer_config.json", lambda content: content.pop("auto_map"))
    assert main(command) == 0
    assert not mark.exists() and not (built / "evil.py").exists()
    assert check_model(built).healthy


def test_a_tower_that_names_unneeded_code_is_built_without_the_reference(tmp_path: Path) -> None:
    vision, llm = save_tiny_vision(tmp_path / "vision"), save_tiny_llm(tmp_path / "llm")
    change(vision / "config.json", name_code("AutoModel"))
    change(vision / "preprocessor_config.json", name_code("AutoImageProcessor"))
    change(llm / "config.json", name_code("AutoModel"))
    vision_model, image_processor, _ = load_vision_tower(vision)
    text_model, _ = load_text_tower(llm)
    for part in (vision_model.config, image_processor, text_model.config):
        assert list_foreign_code(part.to_dict()) == []


def test_a_damaged_file_keeps_the_error_of_its_loader(good: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "damaged"))
    (folder / "processor_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(OSError, match=r"processor_config\.json' is not a valid JSON file"):
        LLM2CLIPProcessor.from_pretrained(folder)


def test_references_to_code_are_found_at_any_depth_and_in_the_old_format() -> None:
    own = {"auto_map": {"AutoModel": "modeling_llm2clip.LLM2CLIPModel"}}
    content = {**own, "a": [{"b": {"auto_map": ["x.Slow", None]}}, {"auto_map": {"C": "o/r--y.Z"}}]}
    assert list_foreign_code(content) == ["AutoTokenizer: x.Slow", "C: o/r--y.Z"]
