"""Laws of generated command lines: what is refused and how, help, and files of options."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Interval

from modeling_llm2clip.cli.command import Repeated, UsageError, command, make_line, parse
from modeling_llm2clip.configs.config_fields import DeviceConfig


@dataclass(frozen=True, kw_only=True)
class StageConfig(DeviceConfig):
    """Options of a stage."""

    max_steps: Annotated[int, Interval(ge=1)] | None = None
    """Number of steps. Default: what `learning_rate`
    allows."""
    learning_rate: Annotated[float, Interval(gt=0)] = 1e-3
    """Peak learning rate."""
    is_merged: bool = True
    """Merge."""
    prompt_prefix: str | None = None
    """Text in front. Default: none."""
    text_pairs: tuple[tuple[Path, Annotated[float, Interval(gt=0)]], ...] = ()
    """FILE and WEIGHT. Default: none."""
    names: tuple[str, ...] = ("all",)
    """Names."""
    mode: Literal["frozen", "lora"] = "frozen"
    """Mode."""
    sizes: tuple[Annotated[int, Interval(ge=1)], ...] = ()
    """Sizes. Default: none."""
    find_images: str | None = None
    """An option with the name of a command. Default: none."""


CALLS: list[Any] = []


@command(
    group="Train",
    examples=("llm2clip stage model output --max-steps 3",),
    sections={"Duration": ("max_steps",), "Names": ("names", "mode")},
)
def stage(
    model: str,
    output: Path = Path("out"),
    /,
    *,
    config: StageConfig,
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
    CALLS.append((model, output, config, labels, top_k))
    return 7


@command(group="Use", examples=('llm2clip find-images folder "a dog"', "llm2clip find-images f"))
def find_images(
    folder: str,
    /,
    *queries: str,
    image: Annotated[tuple[Path, ...], Repeated] = (),
    combine: bool = False,
) -> None:
    """Finds images.

    Args:
        folder: Folder of images.
        queries: What to find.
        image: Query image; repeatable. Default: none.
        combine: Join the queries.
    """
    CALLS.append((folder, queries, image, combine))


LINE = make_line(
    [stage, find_images], description="About.", version="1.2.3", examples=("llm2clip stage",)
)


def run(*words: str) -> Any:
    CALLS.clear()
    parse(LINE, words)()
    [call] = CALLS
    return call


def refuse(*words: str) -> str:
    with pytest.raises(UsageError) as refused:
        parse(LINE, words)
    message = str(refused.value)
    assert "\n" not in message
    return message


def show(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    parse(LINE, words)()
    return capsys.readouterr().out


def test_a_command_gets_its_arguments_configs_and_flags() -> None:
    model, output, config, labels, top_k = run(
        "stage", "m", "o", "--labels", "l", "--learning-rate=2e-4", "--no-is-merged",
        "--text-pairs", "a", "1", "--text-pairs", "b", "2", "--names", "x", "y",
    )  # fmt: skip
    assert (model, output, labels, top_k) == ("m", Path("o"), Path("l"), 6)
    assert config == StageConfig(
        learning_rate=2e-4, is_merged=False, names=("x", "y"),
        text_pairs=((Path("a"), 1.0), (Path("b"), 2.0)),
    )  # fmt: skip
    _, output, config, _, top_k = run("stage", "m", "--labels", "l")
    assert (output, config, top_k) == (Path("out"), StageConfig(), 6)


def test_words_are_taken_as_they_are() -> None:
    words = ("stage", "m", "--labels", "none", "--prompt-prefix", "none", "--names", "null")
    _, _, config, labels, _ = run(*words)
    assert config == StageConfig(prompt_prefix="none", names=("null",))
    assert labels == Path("none")
    # A flag that is given once each leaves arguments after it.
    words = ("find-images", "f", "--image", "a", "a dog", "--image", "b")
    assert run(*words) == ("f", ("a dog",), (Path("a"), Path("b")), False)
    # A text that is true or false is an argument where no switch precedes it.
    assert run("find-images", "f", "false", "--combine") == ("f", ("false",), (), True)
    assert run("find-images", "f", "--combine", "--", "true") == ("f", ("true",), (), True)
    words = ("stage", "m", "--labels", "l", "--prompt-prefix=--query: ")
    assert run(*words)[2].prompt_prefix == "--query: "


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("stge", 'Did you mean "stage"?'),
        ("stage --label l", "Unknown option: --label. Did you mean --labels?"),
        ("stage m --num-steps 3", "Unknown option: --num-steps. Did you mean --max-steps?"),
        ("stage m --labels l --mode Lora", 'Did you mean "lora"?'),
        ("stage m --labels l --device gpu", "--device 'gpu': must be one of auto, cpu, "),
        ("stage m --labels l --max-steps 3.5", "--max-steps: 3.5 is not an integer."),
        ("stage m --labels l --sizes 3 3.5", "3.5 is not an integer."),
        ("stage m --labels l --max-steps 0", "--max-steps 0: Input should be greater than or "),
        ("stage m --labels l --learning-rate x", 'unable to convert "x" into float'),
        ("stage m --labels l --learning-rate nan", "--learning-rate nan: Input should be "),
        ("stage m --labels l --text-pairs a -1", "Input should be greater than 0."),
        ("stage m --labels l --top-k 0", "--top-k 0: Input should be greater than or equal to 1."),
        ("stage m", "--labels requires an argument."),
        ("stage --labels l", "MODEL requires an argument."),
        ("stage m o x --labels l", "Unused Tokens: ['x']."),
        ("stage m --labels", "--labels requires an argument."),
        (
            "stage m --labels l --prompt-prefix --device",
            "begins with a hyphen, use --prompt-prefix=VALUE",
        ),
        ("stage m --labels l -x", "Unknown option: -x."),
        ("find-images f --combine false", "--combine takes no value, so false would be an arg"),
        ("stage m --labels l --is-merged false", "--is-merged takes no value, so false would be"),
        ("find-images f --image=", "the path is empty. Use a dot for the working directory."),
        ("stage m --labels=", "the path is empty."),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line_with_an_example(
    words: str, message: str
) -> None:
    shown = refuse(*words.split())
    assert message in shown
    assert re.search(r" For example: llm2clip (stage|find-images)[^\n]*$", shown), shown


def test_no_flag_can_be_abbreviated() -> None:
    for flag in LINE["stage"].assemble_argument_collection():
        if flag.name.startswith("--"):
            assert f"Unknown option: {flag.name[:-1]}." in refuse("stage", flag.name[:-1], "x")


def test_flags_win_over_the_file_of_options(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(
        "max_steps: 3\nlearning_rate: 1e-5\nlabels: l\nis_merged: false\nprompt_prefix: null\n"
        "text_pairs: [[a, 1]]\nnames: [no, 010]\n"
    )
    _, _, config, labels, _ = run(
        "stage", "m", "--config", str(file), "--learning-rate", "2", "--is-merged"
    )
    assert config == StageConfig(
        max_steps=3, learning_rate=2.0, text_pairs=((Path("a"), 1.0),), names=("no", "010")
    )
    assert labels == Path("l")
    file.write_text("find-images: f")  # an option with the name of a command
    _, _, config, _, _ = run("stage", "m", "--labels", "l", "--config", str(file))
    assert config == StageConfig(find_images="f")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_step: 3", '"[max_step]"'),
        ("config: other.yaml", "config is not an option."),
        ("max_steps: 3.5", "3.5 is not an integer."),
        ("sizes: [3, 3.5]", "3.5 is not an integer."),
        ("no_is_merged: true", "no_is_merged is not an option. Use is_merged: false."),
        ("stage: m", '"[stage]"'),
        ("~: 3", "must contain `option: value` lines."),
        ("learning_rate: 1\nlearning_rate: 2", "duplicate key"),
        ("top_k: 0", "Input should be greater than or equal to 1."),
    ],
)
def test_a_wrong_file_of_options_is_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(text)
    refused = refuse("stage", "m", "--labels", "l", "--config", str(file))
    assert message in refused and str(file) in refused.replace("\n", "")
    assert "/nowhere.yaml" in refuse("stage", "m", "--labels", "l", "--config", "/nowhere.yaml")


def test_the_help_has_groups_defaults_choices_and_examples(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = " ".join(show(capsys, "stage", "--help").split())
    for part in (
        "Usage: llm2clip stage", "Runs a stage.", "MODEL Model folder.", "Stage options:",
        "Default: what `learning_rate` allows.", "[default: 0.001]", "--[no-]is-merged",
        "[default: frozen] [choices: frozen, lora]", "[default: all]", "[default: auto]",
        "Duration: --max-steps INT", "Names: --names STR...", "[default: 6]",
    ):  # fmt: skip
        assert part in shown
    assert shown.endswith("Example: llm2clip stage model output --max-steps 3")


def test_the_help_of_the_program_lists_commands_in_groups(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = " ".join(show(capsys, "--help").split())
    assert "Use: find-images Finds images. Train: stage Runs a stage." in shown
    assert show(capsys, "--version").strip() == "1.2.3"
