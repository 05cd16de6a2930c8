"""Laws of the command line that hold for every command: help, defaults, examples, suggestions."""

from __future__ import annotations

import ast
import errno
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
from modeling_llm2clip.cli.command import UsageError, parse
from modeling_llm2clip.cli.options import bound_spinning
from modeling_llm2clip.configs.align_config import AlignConfig
from modeling_llm2clip.configs.build_config import BuildConfig
from modeling_llm2clip.configs.finetune_config import FinetuneConfig
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
        optional = ("[default: ", "Default: ", "No default") * (not flag.required)
        missing = f"llm2clip {name} {flag.name}: say what happens if it is left out."
        assert any(part in line for part in ("Required", *optional)), missing
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
    assert "--[no-]lock-text" in shown and "[choices: frozen, lora, full]" in " ".join(
        shown.split()
    )
    names = [name for section in SECTIONS.values() for name in section]
    shown_fields = {field.name for field in fields(AlignConfig)} - {*AlignConfig.without_flags}
    assert sorted(names) == sorted(shown_fields)
    for command, most in (("align", 40), ("finetune-llm", 29)):
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


def read(*words: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    call = parse(LINE, words)
    return call.args, call.keywords


TUNE = ("finetune-llm", "m", "d", "o")
PAIRS = ((Path("a"), 1.0), (Path("b"), 2.0))


def test_a_command_gets_its_arguments_configs_and_flags() -> None:
    arguments, flags = read(
        *TUNE, "--learning-rate=2e-4", "--no-merge", "--text-pairs", "a", "1", "--text-pairs", "b",
        "2", "--lora-target-modules", "x", "y", "--resume",
    )  # fmt: skip
    assert arguments == ("m", "d", Path("o")) and flags["resume"] is True
    assert flags["config"] == FinetuneConfig(
        learning_rate=2e-4, merge=False, text_pairs=PAIRS, lora_target_modules=("x", "y")
    )
    _, flags = read(*TUNE)
    assert (flags["config"], flags["resume"]) == (FinetuneConfig(), False)


def test_words_are_taken_as_they_are() -> None:
    for word in ("none", "--query: "):
        _, flags = read("build", "v", "l", "o", f"--prompt-prefix={word}")
        assert flags["config"] == BuildConfig(prompt_prefix=word)
    # A flag that is given once each leaves arguments after it.
    arguments, flags = read("search", "f", "--image", "a", "a dog", "--image", "b")
    assert (arguments, flags["image"]) == (("f", "a dog"), (Path("a"), Path("b")))
    # A text that is true or false is an argument if no switch precedes it.
    for words in (("true", "--combine"), ("--combine", "--", "true")):
        arguments, flags = read("search", "f", *words)
        assert (arguments, flags["combine"]) == (("f", "true"), True)


def test_no_flag_can_be_abbreviated() -> None:
    for flag in list_arguments("finetune-llm", flags=True).values():
        with pytest.raises(UsageError, match=f"Unknown option: {flag.name[:-1]}."):
            read(*TUNE, flag.name[:-1], "x")


def test_flags_win_over_the_file_of_options(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(
        "max_steps: 3\nlearning_rate: 1e-5\nresume: true\nmerge: false\ninit_lora: null\n"
        "text_pairs: [[a, 1], [b, 2]]\nlora_target_modules: [no, 010]\n"
    )
    _, flags = read(*TUNE, "--config", str(file), "--learning-rate", "2", "--merge")
    modules = ("no", "010")
    assert flags["resume"] is True and flags["config"] == FinetuneConfig(
        max_steps=3, learning_rate=2.0, text_pairs=PAIRS, lora_target_modules=modules
    )
    file.write_text("index: f")  # an option with the name of a command
    assert read("serve", "m", "--config", str(file))[1]["index"] == "f"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_step: 3", '"[max_step]"'),
        ("config: other.yaml", "config is not an option."),
        ("max_steps: 3.5", "3.5 is not an integer."),
        ("no_merge: true", "no_merge is not an option. Use merge: false."),
        ("finetune-llm: m", '"[finetune-llm]"'),
        ("~: 3", "must contain `option: value` lines."),
        ("learning_rate: 1\nlearning_rate: 2", "duplicate key"),
        ("lora_rank: 0", "Input should be greater than or equal to 1."),
        (None, "options.yaml"),
    ],
)
def test_a_wrong_file_of_options_is_refused_in_one_line_with_an_example(
    text: str | None, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "options.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UsageError) as refused:
        read(*TUNE, "--config", str(file))
    assert message in str(refused.value) and str(file) in str(refused.value)
    assert re.search(r"^.* For example: llm2clip finetune-llm .*$", str(refused.value))


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
