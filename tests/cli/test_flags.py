"""Laws of generated command lines: what is refused and how, help, and files of options."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Interval

from modeling_llm2clip.cli.command import (
    Changes,
    Command,
    CommandLine,
    Repeated,
    UsageError,
    command,
)
from modeling_llm2clip.configs.config_fields import Config, DeviceConfig


@dataclass(frozen=True, kw_only=True)
class StageConfig(DeviceConfig):
    """Options of a stage."""

    max_steps: Annotated[int, Interval(ge=1)] | None = None
    """Number of steps. Default: what `learning_rate` allows."""
    learning_rate: Annotated[float, Interval(gt=0)] = 1e-3
    """Peak learning rate."""
    is_merged: bool = True
    """Merge."""
    prompt_prefix: str | None = None
    """Text in front. Default: none."""
    text_pairs: tuple[tuple[Path, float], ...] = ()
    """FILE and WEIGHT. Default: none."""
    names: tuple[str, ...] = ("all",)
    """Names."""
    mode: Literal["frozen", "lora"] = "frozen"
    """Mode."""


@dataclass(frozen=True, kw_only=True)
class CardConfig(Config):
    """Options of a card."""

    width: Annotated[int, Interval(ge=1)] = 64
    """Width."""
    hidden: int = 0
    """Not a flag."""


CALLS: list[Any] = []


@command(group="Train", examples=("llm2clip stage model output --max-steps 3",))
def stage(
    model: str,
    output: Path = Path("out"),
    /,
    *,
    config: StageConfig,
    changes: Annotated[
        dict[str, Any], Changes(config_type=CardConfig, default="the source's", without=("hidden",))
    ],
    labels: Path,
    top_k: Annotated[int, Interval(ge=1)] = 6,
) -> int:
    """Runs a stage.

    Args:
        model: Model folder.
        output: Folder to write.
        labels: File of labels. Required.
        top_k: Number of hits.
    """
    CALLS.append((model, output, config, changes, labels, top_k))
    return 7


@command(group="Use", examples=('llm2clip find-images folder "a dog"', "llm2clip find-images f"))
def find_images(
    folder: str, /, *queries: str, image: Annotated[tuple[Path, ...], Repeated] = ()
) -> None:
    """Finds images.

    Args:
        folder: Folder of images.
        queries: What to find.
        image: Query image; repeatable. Default: none.
    """
    CALLS.append((folder, queries, image))


LINE = CommandLine(
    "llm2clip", [stage, find_images], description="About.", version="1.2.3",
    examples=("llm2clip stage",),
)  # fmt: skip


def run(*words: str) -> Any:
    CALLS.clear()
    LINE.parse(words)()
    [call] = CALLS
    return call


def refuse(*words: str) -> str:
    with pytest.raises(UsageError) as refused:
        LINE.parse(words)
    message = str(refused.value)
    assert "\n" not in message
    return message


def show(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    LINE.parse(words)()
    return capsys.readouterr().out


def test_a_command_gets_its_arguments_configs_and_flags() -> None:
    model, output, config, changes, labels, top_k = run(
        "stage", "m", "o", "--labels", "l", "--learning-rate=2e-4", "--no-is-merged",
        "--text-pairs", "a", "1", "--text-pairs", "b", "2", "--names", "x", "y", "--width", "8",
    )  # fmt: skip
    assert (model, output, labels, top_k) == ("m", Path("o"), Path("l"), 6)
    assert config == StageConfig(
        learning_rate=2e-4, is_merged=False, names=("x", "y"),
        text_pairs=((Path("a"), 1.0), (Path("b"), 2.0)),
    )  # fmt: skip
    assert changes == {"width": 8}


def test_what_is_not_given_has_the_default_of_the_dataclass() -> None:
    _, output, config, changes, _, top_k = run("stage", "m", "--labels", "l")
    assert (output, config, changes, top_k) == (Path("out"), StageConfig(), {}, 6)


def test_a_library_that_is_imported_besides_changes_nothing() -> None:
    """The parser validates by pydantic where another package has imported it."""
    pytest.importorskip("pydantic")
    words = ("stage", "m", "--labels", "none", "--prompt-prefix", "none", "--names", "null")
    _, _, config, changes, labels, _ = run(*words)
    assert config == StageConfig(prompt_prefix="none", names=("null",))
    assert (changes, labels) == ({}, Path("none"))


def test_the_exit_code_is_the_commands() -> None:
    assert LINE.parse(["stage", "m", "--labels", "l"])() == 7


def test_a_flag_that_is_given_once_each_leaves_arguments_after_it() -> None:
    words = ("find-images", "f", "--image", "a", "a dog", "--image", "b")
    assert run(*words) == ("f", ("a dog",), (Path("a"), Path("b")))


def test_a_value_may_begin_with_hyphens() -> None:
    words = ("stage", "m", "--labels", "l")
    assert run(*words, "--prompt-prefix=--query: ")[2].prompt_prefix == "--query: "
    assert run(*words, "--prompt-prefix", "-- end")[2].prompt_prefix == "-- end"


def test_underscores_are_hyphens() -> None:
    assert run("stage", "m", "--labels", "l", "--max_steps", "3")[2].max_steps == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "Name a command, one of stage, find-images."),
        ("stge", 'Did you mean "stage"?'),
        ("--versoin", "Unknown flag --versoin. Did you mean --version?"),
        ("stage --label l", "Unknown flag --label. Did you mean --labels?"),
        ("stage m --num-steps 3", "Unknown flag --num-steps. Did you mean --max-steps?"),
        ("stage m --max-step 3", "Unknown flag --max-step. Did you mean --max-steps?"),
        ("stage m --hidden 3", "Unknown flag --hidden."),
        ("stage --model m", "Unknown flag --model. Did you mean --mode?"),  # MODEL is not a flag
        ("stage m --labels l --mode Lora", 'Did you mean "lora"?'),
        ("stage m --labels l --device gpu", "one of auto, cpu, cuda, cuda:N, mps. Did you mean cu"),
        ("stage m --labels l --max-steps 3.5", "--max-steps '3.5' must be an integer."),
        ("stage m --labels l --max-steps 0", "--max-steps 0 must be at least 1."),
        ("stage m --labels l --learning-rate x", 'unable to convert "x" into float'),
        ("stage m --labels l --learning-rate nan", "--learning-rate nan must be a finite number"),
        ("stage m --labels l --top-k 0", "--top-k 0 must be at least 1."),
        ("stage m --labels l --width 0", "--width 0 must be at least 1."),
        ("stage m", "--labels is missing."),
        ("stage --labels l", "MODEL is missing."),
        ("stage m o x --labels l", "Unexpected arguments: x."),
        ("stage m --labels", "--labels needs a value"),
        ("stage m --labels l --prompt-prefix --device cpu", "--prompt-prefix needs a value"),
        ("stage m --labels l -x", "Unknown option: -x."),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line_with_what_was_meant(
    words: str, message: str
) -> None:
    shown = refuse(*words.split())
    assert message in shown
    assert re.search(r" For example: llm2clip stage[^\n]*$", shown), shown


def test_every_wrong_value_is_named_at_once() -> None:
    shown = refuse("stage", "m", "--max-steps", "0", "--learning-rate", "-1", "--top-k", "0")
    for part in (
        "--max-steps 0 must",
        "--learning-rate -1.0 must",
        "--top-k 0 must",
        "--labels is missing",
    ):
        assert part in shown


@pytest.mark.parametrize("name", LINE.commands)
def test_no_flag_can_be_abbreviated(name: str) -> None:
    for flag in LINE.commands[name].flags.values():
        assert f"Unknown flag {flag.name[:-1]}." in refuse(name, flag.name[:-1], "x")


def test_flags_win_over_the_file_of_options(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(
        "max_steps: 3\nlearning_rate: 1e-5\nlabels: l\nis_merged: false\nwidth: 9\n"
        "text_pairs: [[a, 1]]\n"
    )
    _, _, config, changes, labels, _ = run(
        "stage", "m", "--config", str(file), "--learning-rate", "2", "--is-merged"
    )
    assert config == StageConfig(max_steps=3, learning_rate=2.0, text_pairs=((Path("a"), 1.0),))
    assert (changes, labels) == ({"width": 9}, Path("l"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_step: 3", "max_step is not an option. Did you mean max_steps?"),
        ("config: other.yaml", "config is not an option."),
        ("hidden: 3", "hidden is not an option."),
        ("max_steps: 3.5", "max_steps=3.5 must be an integer."),
        ("learning_rate: 1\nlearning_rate: 2", "given twice"),
        ("top_k: 0", "top_k=0 must be at least 1."),
    ],
)
def test_a_wrong_file_of_options_is_refused_by_its_name(
    text: str, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(text)
    shown = refuse("stage", "m", "--labels", "l", "--config", str(file))
    assert message in shown and str(file) in shown


def test_a_file_of_options_that_is_not_there_is_named() -> None:
    assert "/nowhere.yaml" in refuse("stage", "m", "--labels", "l", "--config", "/nowhere.yaml")


def test_the_help_has_groups_defaults_choices_and_examples(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = " ".join(show(capsys, "stage", "--help").split())
    for part in (
        "Usage: llm2clip stage", "Runs a stage.", "MODEL Model folder.", "Stage options:",
        "Default: what --learning-rate allows.", "[default: 0.001]", "--[no-]is-merged",
        "[default: frozen] [choices: frozen, lora]", "[default: all]", "[default: auto]",
        "Card options: --width INT Width. [default: the source's]", "[default: 6]",
    ):  # fmt: skip
        assert part in shown
    assert shown.endswith("Example: llm2clip stage model output --max-steps 3")
    assert "[default: 64]" not in shown and "--hidden" not in shown


def test_the_help_of_the_program_lists_commands_in_groups(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = " ".join(show(capsys, "--help").split())
    assert "Train: stage Runs a stage. Use: find-images Finds images." in shown
    assert show(capsys, "--version").strip() == "1.2.3"


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ("max_steps=5 cannot be", "--max-steps 5 cannot be"),
        ("Set max_steps to 4.", "Set --max-steps to 4."),
        ("mode='lora' runs", "--mode 'lora' runs"),
        ("mode is a plain word", "mode is a plain word"),
        ("is_merged=False keeps", "--no-is-merged keeps"),
        ("`prompt_prefix` is", "--prompt-prefix is"),
        ("/data/max_steps/x: gone", "/data/max_steps/x: gone"),
        ("/data/max_steps=5/x: gone", "/data/max_steps=5/x: gone"),
        ("'max_steps' is a column", "'max_steps' is a column"),
        ("config.max_steps differs", "config.max_steps differs"),
    ],
)
def test_an_error_names_the_flag_and_not_the_field(message: str, named: str) -> None:
    assert stage.name_flags(message) == named


def test_two_parameters_cannot_give_one_flag() -> None:
    def twice(*, config: StageConfig, max_steps: int = 1) -> None:
        """Twice."""

    twice.__annotations__ = {"config": StageConfig, "max_steps": int}
    with pytest.raises(TypeError, match="twice has two flags --max-steps"):
        _ = Command(twice, "Use", ()).arguments


def test_the_parser_imports_nothing_costly() -> None:
    code = (
        "import sys, modeling_llm2clip.cli.command\n"
        "print({'torch', 'transformers', 'numpy', 'huggingface_hub'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "set()"
