"""Laws of the command line that hold for every command: help, defaults, examples, suggestions."""

from __future__ import annotations

import ast
import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
from cyclopts import Argument

from modeling_llm2clip.__main__ import LINE, main
from modeling_llm2clip.cli.align import SECTIONS
from modeling_llm2clip.cli.command import parse
from modeling_llm2clip.cli.options import bound_spinning
from modeling_llm2clip.configs.align_config import AlignConfig
from modeling_llm2clip.conversion.layouts import LAYOUTS
from modeling_llm2clip.scheduling.graceful_stop import StageInterrupt
from modeling_llm2clip.search.search_results import ResultFormat

ROOT = Path(__file__).parents[2]
COMMANDS = {name: LINE[name] for name in LINE if not name.startswith("-")}
COSTLY = ("torch", "transformers", "datasets", "peft", "sentence_transformers", "accelerate")


@cache
def assemble(name: str) -> list[Argument]:
    return list(COMMANDS[name].assemble_argument_collection(parse_docstring=True))


def list_arguments(name: str, *, flags: bool) -> dict[str, Argument]:
    """Return what a command takes, by its names in Python: its flags, or its positional words."""
    return {
        argument.field_info.name: argument
        for argument in assemble(name)
        if argument.parse and not argument.children
        if argument.name.startswith("--") == flags
    }


def show_help(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main([name, "--help"]) == 0
    return capsys.readouterr().out


def test_every_module_of_a_command_is_on_the_command_line() -> None:
    modules = {path.stem for path in (ROOT / "modeling_llm2clip" / "cli").glob("*.py")}
    assert {name.replace("-", "_") for name in COMMANDS} <= modules
    for name, app in COMMANDS.items():
        assert app.default_command.__module__.endswith(f".cli.{name.replace('-', '_')}")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_has_a_summary_arguments_flags_with_defaults_and_examples(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "2000")
    command = COMMANDS[name].default_command
    summary = (command.__doc__ or "").partition("\n")[0]
    assert summary.endswith(".") and len(summary) < 100
    shown = show_help(name, capsys)
    assert all(f"  {argument.upper()} " in shown for argument in list_arguments(name, flags=False))
    lines = {words[0]: line for line in shown.splitlines()
             if line.startswith("  ") and len(words := line.split()) > 1}  # fmt: skip
    for flag in list_arguments(name, flags=True).values():
        line = lines[f"--[no-]{flag.name[2:]}" if flag.negatives else flag.name]
        assert "." in line, f"llm2clip {name}: document {flag.name} in the docstring."
        says = ("No default",) if flag.required else ("[default: ", "Default: ", "No default")
        missing = f"llm2clip {name} {flag.name}: say what happens where it is not given."
        assert any(part in line for part in says), missing
    _, *examples = str(COMMANDS[name].help_epilogue).splitlines()
    assert examples and shown.rstrip().endswith(examples[-1])
    for example in examples:
        assert shlex.split(example)[:2] == ["llm2clip", name], example
        assert parse(LINE, shlex.split(example)[1:]).func is command


def test_bare_llm2clip_shows_the_commands_of_the_readme_in_their_order(
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = (ROOT / "README.md").read_text("utf-8").split("<!-- recipe -->\n```bash\n")[1]
    commands = recipe.partition("```")[0].splitlines()
    assert main([]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    places = [lines.index(command) for command in commands]
    assert len(commands) == 4 and places == sorted(places)
    for command, place in zip(commands, places, strict=True):
        output = parse(LINE, shlex.split(command)[1:]).args[2]
        assert re.match(rf"writes {output}\b", lines[place + 1])
    documents = re.findall(r"[\w/-]+\.md", lines[-1])
    assert documents and all((ROOT / document).is_file() for document in documents)


def test_the_help_of_align_begins_with_what_matters_first(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = show_help("align", capsys)
    first = ("DATA", "--caption-store", "--image-store", "What is trained:", "--vision-training",
             "Held-out images:", "--held-out-ratio", "Optimizer:", "Data options:")  # fmt: skip
    places = [shown.index(f"  {word} " if word[0] in "-D" else word) for word in first[:-1]]
    assert places == sorted(places) and places[-1] < shown.index(first[-1])
    names = [name for section in SECTIONS.values() for name in section]
    shown_fields = {field.name for field in fields(AlignConfig)} - {*AlignConfig.without_flags}
    assert sorted(names) == sorted(shown_fields)
    for command, most in (("align", 40), ("finetune-llm", 28)):
        assert len(list_arguments(command, flags=True)) <= most


def test_every_command_has_the_same_device_flag() -> None:
    reference = list_arguments("doctor", flags=True)["device"]
    assert reference.field_info.default == "auto"
    # The recipe of `train` names the device.
    for name in COMMANDS.keys() - {"env", "train"}:
        device = list_arguments(name, flags=True)["device"]
        assert device.field_info == reference.field_info, name
        assert device.parameter.help == reference.parameter.help, name


def test_a_name_takes_values_of_one_type_in_all_commands() -> None:
    types: dict[str, set[str]] = {}
    for command in COMMANDS:
        for flag in list_arguments(command, flags=True).values():
            found = re.sub(r"Annotated\[(\w+), [^]]*\]", r"\1", str(flag.field_info.annotation))
            found = re.sub(r"typing\.|Optional|[][]| \| None|<class '|pathlib\.|'>", "", found)
            types.setdefault(flag.name, set()).add(re.sub(r"Literal.*", "Literal", found))
    several = {name for name, found in types.items() if len(found) > 1}
    assert several == {"--image-dir"}  # evaluate has several datasets: NAME=FOLDER


def write_config(folder: Path, **config: Any) -> str:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


EVALUATE = ["evaluate", "OWN", "--datasets", "emoji"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["serach"], 'Did you mean "search"?'),
        (["--versoin"], 'Unknown command "--versoin".'),
        (["align", "m", "d", "o", "--batch-size", "4"], "Did you mean --global-batch-size?"),
        (["align", "m", "d", "o", "--rate", "1"], "Unknown option: --rate."),
        (["convert", "a", "b", "--source-formt", "openai"], "Did you mean --source-format"),
        (["align", "m", "d", "o", "--vision-training", "Lora"], 'Did you mean "lora"?'),
        (["build", "v", "l", "o", "--prompt", "lama-3"], 'Did you mean "llama-3"?'),
        (["build", "v", "l", "o", "--prompt", "chat-ml"], 'Did you mean "chatml"?'),
        (["doctor", "m", "--device", "gpu"], "--device 'gpu': must be one of auto, cpu, cuda"),
        (["doctor", "m", "--device", "cuda:x"], "--device 'cuda:x': must be one of"),
        (["doctor", "m", "extra"], "Unused Tokens: ['extra']"),
        (["evaluate", "OWN", "--datasets", "emojis"], "Did you mean emoji?"),
        ([*EVALUATE, "--tasks", "retreival"], "Did you mean retrieval?"),
        ([*EVALUATE, "--model-type", "openclip"], 'Did you mean "open_clip"?'),
    ],
)
def test_a_misspelt_word_is_answered_with_the_one_that_was_meant(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_config(tmp_path / "own", model_type="llm2clip") if "OWN" in words else ""
    assert main([word.replace("OWN", model) for word in words]) == 2
    assert message in capsys.readouterr().err


def test_these_devices_can_be_named() -> None:
    for device in ("auto", "cpu", "cuda", "cuda:0", "cuda:11", "mps"):
        call = parse(LINE, ["doctor", "model", "--device", device])
        assert call.keywords["config"].device == device


def test_choices_that_a_command_repeats_are_those_of_their_owner() -> None:
    source_format = list_arguments("convert", flags=True)["source_format"]
    assert get_args(source_format.hint) == (*LAYOUTS,)
    result_format = list_arguments("search", flags=True)["format"]
    assert get_args(result_format.hint) == get_args(ResultFormat)


class OutOfMemoryError(RuntimeError):
    """As torch calls it."""


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (OutOfMemoryError("CUDA out of memory."), 2, "CUDA out of memory.*--device cpu"),
        (OSError(errno.ENOSPC, "No space left"), 2, r"left\. Free .*/dev/shm.*--num-workers 0"),
        (TypeError("Cannot convert a MPS Tensor to float64 dtype"), 2, "float64.*--device cpu"),
        (NotImplementedError("not implemented for the MPS device."), 2, "not im.*--device cpu"),
        (ImportError("No module named 'other'"), 2, r'pip install "modeling_llm2clip\[all\]"'),
        (TypeError("object of type 'int' has no len()"), None, ""),  # does not blame the user
        (KeyboardInterrupt(), 130, "^llm2clip: Interrupted. No partially written folder will load"),
        (StageInterrupt("Saved.", signal.SIGTERM, resume=True), 143, "^llm2clip: Saved. Continue"),
        (StageInterrupt("", signal.SIGINT, resume=True), 130, "^$"),  # not the main process
    ],
)
def test_an_error_or_a_signal_ends_a_command_with_its_code_and_a_remedy(
    error: BaseException, code: int | None, shown: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def stop(_: str, /) -> int:
        """Stops."""
        raise error

    monkeypatch.setattr(LINE["doctor"], "default_command", stop)
    if code is None:
        with pytest.raises(type(error)):
            main(["doctor", "model"])
    else:
        assert main(["doctor", "model"]) == code
        assert re.search(f"(?s){shown}", capsys.readouterr().err)


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    """Folders of every kind, by small files alone: nothing that loads them would succeed."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "labels.csv").write_text("label\na dog\n", encoding="utf-8")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "manifest.json").write_text("{}", encoding="utf-8")
    llama = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 9}
    dino = {"model_type": "dinov2", "image_size": 224}
    return {
        "OWN": write_config(tmp_path / "own", model_type="llm2clip"),
        "CLIP": write_config(tmp_path / "clip", model_type="clip"),
        "LLM": write_config(tmp_path / "llm", **llama),
        "VISION": write_config(tmp_path / "vision", **dino),
        "BERT": write_config(tmp_path / "bert", model_type="vits"),
        "ABOVE": str(Path(write_config(tmp_path / "above" / "model", model_type="x")).parent),
        "LORA": str(tmp_path / "lora"),
        "STORE": str(tmp_path / "store"),
        "FULL": str(tmp_path / "full"),
        "LABELS": str(tmp_path / "labels.csv"),
        "NEW": str(tmp_path / "new"),
    }


# What each command of an LLM2CLIP model is called with.
OF_A_MODEL = {
    "doctor": ["doctor", "MODEL"],
    "index": ["index", "MODEL", "FULL", "NEW"],
    "tag": ["tag", "MODEL", "FULL", "--labels", "LABELS"],
    "serve": ["serve", "MODEL", "--port", "0"],
    "extract": ["extract", "MODEL", "FULL", "NEW", "--modality", "image"],
    "align": ["align", "MODEL", "FULL", "NEW", "--text-training", "lora"],
    "finetune-llm": ["finetune-llm", "MODEL", "FULL", "NEW"],
    "export": ["export", "MODEL", "NEW"],
    "push": ["push", "MODEL", "owner/name"],
}


KINDS = {
    "CLIP": "`llm2clip build {} TEXT_MODEL OUTPUT`",
    "LLM": "`llm2clip build VISION_MODEL {} OUTPUT`",
    "VISION": "`llm2clip build {} TEXT_MODEL OUTPUT`",
    "BERT": "{} is a 'vits', which no command accepts",
    "ABOVE": "has no config.json, but its subfolder {}/model does.",
    "LORA": "--lora {}`",
    "STORE": "--caption-store {}`",
}


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        *((command, "CLIP") for command in OF_A_MODEL),
        *(("doctor", kind) for kind in KINDS if kind != "CLIP"),
    ],
)
def test_a_folder_of_another_kind_is_answered_with_the_command_that_takes_it(
    command: str, kind: str, places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [places.get(kind if w == "MODEL" else w, w) for w in OF_A_MODEL[command]]
    assert main(words) == 2
    assert KINDS[kind].format(places[kind]) in capsys.readouterr().err
    assert not Path(places["NEW"]).exists()


CONVERT = ["convert", "a/b", "NEW", "--source-format", "openai"]
ALIGN = ["align", "OWN", "FULL", "NEW"]
STORED = [*ALIGN, "--caption-store", "STORE"]
TAG = ["tag", "OWN", "FULL", "--labels", "LABELS"]
TEXT, IMAGE = ["--modality", "text"], ["--modality", "image"]
# Commands that cannot run, and the message; CHEAP_CHECKS runs all in one fresh process.
REFUSED_AT_ONCE = [
    (["build", "a/b", "c/d", "FULL", "--prompt", "none"], "is not empty"),
    (["build", "a/b", "c/d", "NEW"], "A prompt is never guessed"),
    (["build", "/nowhere", "c/d", "NEW", "--prompt", "none"], "/nowhere: no such vision tower"),
    (["build", "LLM", "VISION", "NEW", "--prompt", "none"], "is a language model. The order is"),
    (["build", "VISION", "ABOVE", "NEW", "--prompt", "none"], "It cannot be used as TEXT_MODEL."),
    (["convert", "a/b", "FULL", "--source-format", "openai", "--text-model", "c"], "is not empty"),
    (["convert", "a/b", "NEW"], "--source-format requires an argument"),
    (CONVERT, "--text-model requires an argument"),
    ([*CONVERT, "--text-model", "c/d", "--image-size", "8"], "`image_size` only applies to"),
    (["finetune-llm", "OWN", "FULL", "FULL"], "has no run.json"),
    (["finetune-llm", "OWN", "/nowhere", "NEW"], "/nowhere: no such data"),
    (["finetune-llm", "no-model", "FULL", "NEW"], "no-model: no such folder"),
    (["finetune-llm", "OWN", "FULL", "NEW", "--text-pairs", "f", "0"], "should be greater than 0"),
    (["extract", "OWN", "FULL", "NEW"], "--modality requires an argument"),
    (["extract", "OWN", "/nowhere", "NEW", *TEXT], "/nowhere: no such data"),
    (["extract", "CLIP", "FULL", "NEW", *IMAGE], "An LLM2CLIP model is needed here."),
    (["extract", "OWN", "FULL", "FULL", *TEXT], "is not empty and holds no"),
    (["extract", "OWN", "FULL", "NEW", *TEXT, "--image-dir", "/no"], "image_dir=/no: no such fo"),
    (["embed", "OWN", "FULL", "NEW"], "--modality requires an argument"),
    (["embed", "OWN", "/nowhere", "NEW", *TEXT], "/nowhere: no such data"),
    (["embed", "CLIP", "FULL", "NEW", *TEXT], "An LLM2CLIP model is needed here."),
    (["embed", "OWN", "FULL", "FULL", *TEXT], "is not empty, but has no embeddings"),
    (["embed", "OWN", "FULL", "NEW", *TEXT, "--skip-invalid"], "only for --modality image"),
    (["embed", "OWN", "FULL", "NEW", *TEXT, "--columns", "price"], "price"),
    (ALIGN, "needs a caption_store"),
    ([*ALIGN, "--learning-rate", "0", "--device", "mps"], "--learning-rate 0.0: Input should"),
    ([*ALIGN, "--caption-store", "/nowhere"], "--caption-store /nowhere"),
    (["align", "OWN", "FULL", "FULL", "--caption-store", "STORE"], "has no run.json"),
    (["align", "OWN", "/nowhere", "NEW", "--caption-store", "STORE"], "no such data"),
    (["evaluate", "OWN"], "at least one model and one dataset"),
    (["evaluate", "no-model", "--datasets", "emoji"], "no-model: no such folder"),
    (["evaluate", "ours=ABOVE", "--datasets", "emoji"], "but its subfolder"),
    (["evaluate", "LLM", "--datasets", "emoji"], "is a language model"),
    (["index", "OWN", "/nowhere", "NEW"], "/nowhere: no such folder"),
    (["index", "no-model", "FULL", "NEW"], "no-model: no such folder"),
    (["index", "CLIP", "FULL", "NEW"], "An LLM2CLIP model is needed here."),
    (["search", "/nowhere", "a dog"], "/nowhere: no such database"),
    (["search", "FULL", "a dog"], "is not an index"),
    (["search", "LABELS", "a dog"], "is not an index"),
    (["search", "OWN", "FULL", "a dog"], "is not an index"),
    (["search", "FULL", "a dog", "--output", "FULL"], "is not empty"),
    (["search", "FULL"], "There is nothing to search for"),
    (["search", "FULL", "a dog", "--top-k", "0"], "--top-k 0: Input should be greater"),
    (["search", "FULL", "--image", "/nowhere"], "--image /nowhere: no such image"),
    (["tag", "OWN", "FULL", "--labels", "/nowhere"], "/nowhere: "),
    (["tag", "OWN", "/nowhere", "--labels", "LABELS"], "/nowhere: no such folder"),
    ([*TAG, "--top-k", "0"], "--top-k 0: Input should be greater"),
    ([*TAG, "--output", "NEW"], "must end in .csv or"),
    ([*TAG, "--output", "LABELS"], "Choose a new file"),
    (["tag", "no-model", "FULL", "--labels", "LABELS"], "no-model: no such folder"),
    (["tag", "CLIP", "FULL", "--labels", "LABELS", "--output", "new/tags.csv"], "An LLM2CLIP"),
    (["serve", "no-model"], "no-model: no such folder"),
    (["serve", "OWN", "--index", "FULL"], "is not an index"),
    (["serve", "OWN", "--host", "192.0.2.1"], "Cannot listen on host='192.0.2.1', port=8000"),
    (["export", "OWN", "FULL"], "is not empty"),
    (["export", "OWN"], "OUTPUT requires an argument"),
    (["export", "OWN", "NEW", "--components", "vision-tower", "--dtype", "float16"], "`dtype`"),
    (["push", "FULL"], "REPO_ID requires an argument"),
    (["push", "CLIP", "owner/name"], "An LLM2CLIP model is needed here."),
    (["doctor", "CLIP"], "is a 'clip'"),
    (["doctor", "/nowhere"], "/nowhere: no such folder"),
    (["demo", "--output", "FULL"], "is not empty"),
    (["demo", "--max-steps", "0"], "--max-steps 0: Input should be greater"),
]  # fmt: skip
CHEAP_CHECKS = f"""
import contextlib, io, json, sys
from modeling_llm2clip.__main__ import main
answers = []
for words in json.load(sys.stdin):
    shown = io.StringIO()
    with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(shown):
        code = main(words)
    costly = [name for name in {COSTLY!r} if name in sys.modules]
    answers.append([code, shown.getvalue(), costly])
    if costly:
        break
print(json.dumps(answers))
"""


@pytest.mark.slow
def test_what_cannot_run_is_refused_before_anything_costly_is_imported(
    places: dict[str, str],
) -> None:
    calls = [
        [places.get(word, word).replace("ours=ABOVE", f"ours={places['ABOVE']}") for word in words]
        for words, _ in REFUSED_AT_ONCE
    ]
    done = subprocess.run(
        [sys.executable, "-c", CHEAP_CHECKS], input=json.dumps(calls), cwd=ROOT,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    for (words, message), (code, shown, costly) in zip(REFUSED_AT_ONCE, answers, strict=False):
        assert code == 2 and message in shown, f"{words}: wanted {message!r}, got {code}: {shown}"
        assert shown.startswith(f"llm2clip {words[0]}: "), shown
        assert not costly, f"{words}: {costly} were imported first. Check before the imports."
    assert len(answers) == len(REFUSED_AT_ONCE)
    assert not Path(places["NEW"]).exists()


def test_no_parser_of_the_repository_takes_abbreviated_flags() -> None:
    lax = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for folder in ("modeling_llm2clip", "examples", "benchmarks", "tests", "conversion")
        for path in (ROOT / folder).rglob("*.py")
        if "ArgumentParser" in (text := path.read_text(encoding="utf-8"))
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
        and getattr(node.func, "attr", "") == "ArgumentParser"
        and not any(k.arg == "allow_abbrev" and k.value.value is False for k in node.keywords)
    ]
    assert not lax, f"Give these ArgumentParsers allow_abbrev=False: {lax}."


def test_the_help_imports_nothing_costly_and_a_command_bounds_spinning_before_torch() -> None:
    code = f"""
import contextlib, io, os, sys
from modeling_llm2clip.__main__ import LINE, main
texts = []
for words in (["--help"], *([name, "--help"] for name in LINE if name[0] != "-")):
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        assert main(words) == 0
    texts.append(shown.getvalue())
costly = {(*COSTLY, "numpy", "PIL", "huggingface_hub", "pydantic")!r}
print([name for name in costly if name in sys.modules], min(map(len, texts)) > 50)
main(["search", "/nowhere", "a dog"])
print("torch" in sys.modules, os.environ["GOMP_SPINCOUNT"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60,
        env=environment_without("OMP_WAIT", "GOMP", "KMP"),
    )  # fmt: skip
    assert done.stdout.split() == ["[]", "True", "False", "10000"], done.stderr


def environment_without(*beginnings: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(beginnings)}
    return {**kept, "PYTHONPATH": str(ROOT)}


def test_what_the_user_chose_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate sets variables of another OpenMP, and torch reads its own only once."""

    def bound(**environment: str) -> dict[str, str]:
        bound_spinning(environment)
        return environment

    assert "torch" in sys.modules or __import__("torch")
    assert bound() == {}
    monkeypatch.delitem(sys.modules, "torch")
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        assert bound(**{name: "7"}) == {name: "7"}
    of_accelerate = {"KMP_BLOCKTIME": "1", "KMP_AFFINITY": "granularity=fine,compact,1,0"}
    assert bound(**of_accelerate)["GOMP_SPINCOUNT"] == "10000"


LAUNCHERS = {
    "python": ["-m", "modeling_llm2clip"],
    "accelerate": ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1",
                   "--module", "modeling_llm2clip"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="torch has another OpenMP elsewhere")
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_openmp_itself_has_the_bound_however_a_command_is_launched(launcher: str) -> None:
    done = subprocess.run(
        [sys.executable, *LAUNCHERS[launcher], "env"], cwd=ROOT, capture_output=True, text=True,
        timeout=900,
        env={**environment_without("OMP_", "GOMP", "KMP"), "OMP_DISPLAY_ENV": "VERBOSE"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    counts = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    assert "10000" in counts
    if launcher == "python":  # the launcher of accelerate loads torch too, and only waits
        assert set(counts) == {"10000"}
