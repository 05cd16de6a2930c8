"""Laws of the command line that hold for every command: help, defaults, examples, suggestions."""

from __future__ import annotations

import argparse
import ast
import json
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from modeling_llm2clip import cli as command_modules
from modeling_llm2clip.__main__ import _build_parser, main
from modeling_llm2clip.cli.parser import name_flags, takes_value
from modeling_llm2clip.configs.build_config import BuildConfig
from modeling_llm2clip.configs.export_config import ConvertConfig
from modeling_llm2clip.demo.run_demo import DemoArguments
from modeling_llm2clip.evaluation.encoders.encoder import EncoderSettings
from modeling_llm2clip.training.alignment.align_arguments import AlignArguments
from modeling_llm2clip.training.extraction.extract import ExtractionArguments
from modeling_llm2clip.training.finetuning.finetune_llm import TuneArguments

ROOT = Path(__file__).parents[2]
COMMANDS = _build_parser().commands
# The dataclass that each command fills from its flags.
SETTINGS = {
    "align": AlignArguments,
    "build": BuildConfig,
    "convert": ConvertConfig,
    "demo": DemoArguments,
    "evaluate": EncoderSettings,
    "extract": ExtractionArguments,
    "finetune-llm": TuneArguments,
}
COSTLY = ("torch", "transformers", "datasets", "peft", "sentence_transformers", "accelerate")

every_command = pytest.mark.parametrize("name", COMMANDS)


def list_actions(name: str) -> list[argparse.Action]:
    return [a for a in COMMANDS[name]._actions if not isinstance(a, argparse._HelpAction)]


def call(action: argparse.Action) -> str:
    return max(action.option_strings, key=len, default=action.dest)


@every_command
def test_every_flag_has_help(name: str) -> None:
    without = [call(action) for action in list_actions(name) if not (action.help or "").strip()]
    assert not without, (
        f'llm2clip {name}: add help="…" to the add_argument of {", ".join(without)}.'
    )


@every_command
def test_every_flag_with_a_value_shows_its_default(name: str) -> None:
    formatter = COMMANDS[name]._get_formatter()
    without = [
        call(action)
        for action in list_actions(name)
        if takes_value(action)
        and not action.required
        and "default" not in formatter._get_help_string(action)  # type: ignore[operator]
    ]
    assert not without, (
        f"llm2clip {name}: the help of {', '.join(without)} shows no default. A default that is "
        "not None is shown by itself. Where it is None, end the help with what happens then, as "
        'in help="number of steps; default: what --epochs comes to"; where a value is needed, '
        'with "no default".'
    )


@every_command
def test_the_default_of_a_flag_is_that_of_the_python_function(name: str) -> None:
    given = {action.dest: action.default for action in list_actions(name)}
    different = {
        field.name: (given[field.name], field.default)
        for field in fields(SETTINGS[name])
        if field.name in given and given[field.name] not in (field.default, argparse.SUPPRESS)
    } if name in SETTINGS else {}  # fmt: skip
    # Commands run where they are fastest, functions where they are told to.
    different.pop("device", None)
    assert not different, f"llm2clip {name}: flag and dataclass differ: {different}."


@every_command
def test_the_help_ends_with_an_example_that_parses(name: str) -> None:
    examples = COMMANDS[name].examples
    assert examples, f'llm2clip {name}: give add_parser(…, examples=("llm2clip {name} …",)).'
    for example in examples:
        assert example.startswith(f"llm2clip {name} "), example
        assert callable(_build_parser().parse_args(shlex.split(example)[1:]).run)
    assert COMMANDS[name].format_help().rstrip().endswith(examples[-1])


@every_command
def test_every_command_has_the_same_device_flag(name: str) -> None:
    [device] = [action for action in list_actions(name) if action.dest == "device"]
    [reference] = [action for action in list_actions("doctor") if action.dest == "device"]
    assert device.default == "auto", f"llm2clip {name}: add the flag with add_device_flag(parser)."
    assert (device.help, device.type) == (reference.help, reference.type)


def refuse(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    return capsys.readouterr().err


@every_command
def test_no_flag_can_be_abbreviated(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = refuse([name, "--devic", "cpu"], capsys)
    assert "unknown flag --devic. Did you mean --device?" in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["serach"], "invalid choice: 'serach', choose from"),
        (["serach"], "Did you mean search?"),
        (["--versoin"], "unknown flag --versoin. Did you mean --version?"),
        (["align", "m", "d", "o", "--batch", "4"], "Did you mean --batch-size?"),
        (["align", "m", "d", "o", "--learning-rate", "1"], "unknown flag --learning-rate."),
        # Without the pre-check argparse would only say that --recipe is required.
        (["convert", "a", "b", "--recipie", "openai"], "Did you mean --recipe?"),
        (["align", "m", "d", "o", "--vision-training", "Lora"], "Did you mean lora?"),
        (["build", "v", "l", "o", "--prompt", "lama-3"], "Did you mean llama-3?"),
        (["demo", "--llm", "x", "--prompt", "chat-ml"], "Did you mean chatml?"),
        (["doctor", "m", "--device", "gpu"], "'gpu' is no device, choose from auto, cpu, cuda, "),
        (["doctor", "m", "--device", "gpu"], "Did you mean cuda?"),
        (["doctor", "m", "--device", "cuda:x"], "argument --device: 'cuda:x' is no device"),
        (["doctor", "m", "extra"], "unrecognized arguments: extra"),
    ],
)
def test_a_misspelt_word_is_answered_with_the_one_that_was_meant(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refuse(words, capsys)


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:11", "mps"])
def test_these_devices_can_be_named(device: str) -> None:
    parsed = _build_parser().parse_args(["doctor", "model", "--device", device])
    assert parsed.device == device


def test_a_value_that_looks_like_a_flag_can_be_given() -> None:
    words = ["build", "v", "l", "o", "--prefix=--query: ", "--suffix", "-- end"]
    parsed = _build_parser().parse_args(words)
    assert (parsed.prefix, parsed.suffix) == ("--query: ", "-- end")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["m", "--data", "emojis"], "Did you mean emoji?"),
        (["m", "--data", "emoji", "--tasks", "retreival"], "Did you mean retrieval?"),
        (["m", "--data", "emoji", "--kind", "openclip"], "Did you mean open_clip?"),
    ],
)
def test_misspelt_names_of_the_evaluation_are_answered_too(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", f"owner/{words[0]}", *words[1:]]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message", "named"),
    [
        ("align", "batch_size=5 cannot be shared", "--batch-size 5 cannot be shared"),
        ("align", "num_workers=-1, wanted at least 0", "--workers -1, wanted at least 0"),
        ("align", "Set batch_size to at most 4.", "Set --batch-size to at most 4."),
        ("align", "text_training='lora' runs", "--text-training 'lora' runs"),
        ("align", "/data/batch_size/x: gone", "/data/batch_size/x: gone"),
        ("align", "/data/steps=5/x: gone", "/data/steps=5/x: gone"),
        ("align", "'batch_size' is a column", "'batch_size' is a column"),
        ("align", "config.batch_size differs", "config.batch_size differs"),
        ("extract", "ExtractionArguments: dtype='x' must", "--dtype 'x' must"),
        ("evaluate", "['class_names', 'templates'] is for", "--class-names, --templates is for"),
        ("evaluate", "['folder', 'templates'] is for", "['folder', 'templates'] is for"),
        ("finetune-llm", "alpha=0 positive, dropout=2", "--alpha 0 positive, --lora-dropout 2"),
        ("align", "check_images is off", "--check-images is off"),
        ("export", "repo_id='x' must be", "--push 'x' must be"),
        ("doctor", "text_pooling=1 in config.json", "text_pooling=1 in config.json"),
        # It turns off what the name says, so the name stays.
        ("build", "bidirectional=False keeps", "bidirectional=False keeps"),
    ],
)
def test_an_error_names_the_flag_and_not_the_python_argument(
    command: str, message: str, named: str
) -> None:
    assert name_flags(message, COMMANDS[command]) == named


def test_the_command_prints_such_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["build", "owner/vision", "owner/llm", "new", "--prompt", "none"]
    assert main([*words, "--projection-dim", "0"]) == 2
    assert "--projection-dim 0 must be at least 1" in capsys.readouterr().err


class OutOfMemoryError(RuntimeError):
    """As torch calls it."""


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (OutOfMemoryError("CUDA out of memory."), "--device cpu"),
        (TypeError("Cannot convert a MPS Tensor to float64 dtype"), "--device cpu"),
        (NotImplementedError("'aten::x' is not implemented for the MPS device."), "--device cpu"),
    ],
)
def test_what_a_device_cannot_do_is_an_error_with_a_remedy(
    error: Exception,
    remedy: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(_: Any) -> int:
        raise error

    monkeypatch.setattr(command_modules.doctor, "run", fail)
    assert main(["doctor", "model"]) == 2
    told = capsys.readouterr().err
    assert str(error) in told and remedy in told


def test_a_type_error_of_our_own_is_no_error_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_modules.doctor, "run", lambda _: len(3))  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        main(["doctor", "model"])


def write_config(folder: Path, **config: Any) -> str:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


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
    "search": ["search", "MODEL", "FULL", "a dog"],
    "tag": ["tag", "MODEL", "FULL", "--labels", "LABELS"],
    "extract": ["extract", "MODEL", "FULL", "NEW"],
    "align": ["align", "MODEL", "FULL", "NEW", "--text-training", "lora"],
    "finetune-llm": ["finetune-llm", "MODEL", "FULL", "NEW"],
    "export": ["export", "MODEL", "NEW"],
}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("CLIP", "`llm2clip build {} LLM OUTPUT`"),
        ("LLM", "`llm2clip build VISION {} OUTPUT`"),
        ("VISION", "`llm2clip build {} LLM OUTPUT`"),
        ("BERT", "{} is a 'vits', which no command takes"),
        ("ABOVE", "it is the parent folder of {}/model. Give that one."),
        ("LORA", "--lora {}`"),
        ("STORE", "--caption-store {}`"),
    ],
)
@pytest.mark.parametrize("command", OF_A_MODEL)
def test_a_folder_of_another_kind_is_answered_with_the_command_that_takes_it(
    command: str,
    kind: str,
    message: str,
    places: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [places.get(kind if w == "MODEL" else w, w) for w in OF_A_MODEL[command]]
    assert main(words) == 2
    assert message.format(places[kind]) in capsys.readouterr().err
    assert not Path(places["NEW"]).exists()


# Commands that cannot run, and what is told; CHEAP_CHECKS runs all in one fresh process.
REFUSED_AT_ONCE = [
    (["build", "a/b", "c/d", "FULL", "--prompt", "none"], "is not empty"),
    (["build", "a/b", "c/d", "NEW"], "A prompt is never guessed"),
    (["build", "/nowhere", "c/d", "NEW", "--prompt", "none"], "/nowhere: no such vision tower"),
    (["build", "LLM", "VISION", "NEW", "--prompt", "none"], "in the place of VISION. The order is"),
    (["build", "VISION", "ABOVE", "NEW", "--prompt", "none"], "It cannot be LLM."),
    (["convert", "a/b", "FULL", "--recipe", "openai", "--llm", "c/d"], "is not empty"),
    (["convert", "a/b", "NEW", "--recipe", "openai"], "give --llm"),
    (["convert", "a/b", "NEW", "--recipe", "openai", "--llm", "c/d", "--head-width", "8",
      "--rope-reference-size", "2"], "--rope-reference-size goes with"),
    (["convert", "a/b", "NEW", "--recipe", "llm2vec"], "give --vision"),
    (["finetune-llm", "OWN", "FULL", "FULL"], "holds no run.json"),
    (["finetune-llm", "OWN", "/nowhere", "NEW"], "/nowhere: no such data"),
    (["finetune-llm", "no-model", "FULL", "NEW"], "no-model: no such folder"),
    (["finetune-llm", "OWN", "FULL", "NEW", "--other-pairs", "f", "0"], "weight above 0"),
    (["extract", "OWN", "/nowhere", "NEW"], "/nowhere: no such data"),
    (["extract", "CLIP", "FULL", "NEW"], "This command takes an LLM2CLIP model."),
    (["extract", "OWN", "FULL", "NEW", "--batch-size", "2"], "of the extraction of images only"),
    (["align", "OWN", "FULL", "NEW"], "needs a caption store"),
    (["align", "OWN", "FULL", "NEW", "--lr", "0", "--device", "mps"], "--lr 0.0, wanted more"),
    (["align", "OWN", "FULL", "NEW", "--caption-store", "/nowhere"], "--caption-store /nowhere"),
    (["align", "OWN", "FULL", "FULL", "--caption-store", "STORE"], "holds no run.json"),
    (["align", "OWN", "/nowhere", "NEW", "--caption-store", "STORE"], "no such data"),
    (["evaluate", "OWN"], "at least one model and one set"),
    (["evaluate", "no-model", "--data", "emoji"], "no-model: no such folder"),
    (["evaluate", "ours=ABOVE", "--data", "emoji"], "is the folder above"),
    (["evaluate", "LLM", "--data", "emoji"], "is a language model"),
    (["search", "OWN", "/nowhere", "a dog"], "/nowhere: no such folder"),
    (["search", "OWN", "FULL", "a dog", "--output", "FULL"], "is not empty"),
    (["search", "OWN", "FULL"], "There is nothing to search for"),
    (["search", "OWN", "FULL", "a dog", "--count", "0"], "--count 0 finds nothing"),
    (["search", "OWN", "FULL", "--image", "/nowhere"], "--image /nowhere: no such image"),
    (["search", "no-model", "FULL", "a dog"], "no-model: no such folder"),
    (["search", "CLIP", "FULL", "a dog"], "This command takes an LLM2CLIP model."),
    (["tag", "OWN", "FULL", "--labels", "/nowhere"], "/nowhere: "),
    (["tag", "OWN", "/nowhere", "--labels", "LABELS"], "/nowhere: no such folder"),
    (["tag", "OWN", "FULL", "--labels", "LABELS", "--top-k", "0"], "--top-k 0 gives no label"),
    (["tag", "OWN", "FULL", "--labels", "LABELS", "--output", "NEW"], "must end in .csv or"),
    (["tag", "OWN", "FULL", "--labels", "LABELS", "--output", "LABELS"], "Name a new file"),
    (["tag", "no-model", "FULL", "--labels", "LABELS"], "no-model: no such folder"),
    (["tag", "CLIP", "FULL", "--labels", "LABELS", "--output", "new/tags.csv"], "takes an LLM2CL"),
    (["export", "OWN", "FULL"], "is not empty"),
    (["export", "OWN"], "Name a FOLDER to write"),
    (["export", "OWN", "NEW", "--public"], "go with --push"),
    (["export", "OWN", "NEW", "--components", "tower", "--dtype", "float16"], "--dtype"),
    (["doctor", "CLIP"], "is a 'clip'"),
    (["doctor", "/nowhere"], "/nowhere: no such folder"),
    (["demo", "--output", "FULL"], "is not empty"),
    (["demo", "--llm", "a/b"], "--llm needs --prompt"),
    (["demo", "--vision", "/nowhere", "--output", "NEW"], "/nowhere: no such vision tower"),
]  # fmt: skip
CHEAP_CHECKS = f"""
import contextlib, io, json, sys
from modeling_llm2clip.__main__ import main
answers = []
for words in json.load(sys.stdin):
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
        code = main(words)
    costly = [name for name in {COSTLY!r} if name in sys.modules]
    answers.append([code, told.getvalue(), costly])
    if costly:
        break
print(json.dumps(answers))
"""


def test_what_cannot_run_is_told_before_anything_costly_is_imported(
    places: dict[str, str],
) -> None:
    given = [
        [places.get(word, word).replace("ours=ABOVE", f"ours={places['ABOVE']}") for word in words]
        for words, _ in REFUSED_AT_ONCE
    ]
    done = subprocess.run(
        [sys.executable, "-c", CHEAP_CHECKS],
        input=json.dumps(given),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    for (words, message), (code, told, costly) in zip(REFUSED_AT_ONCE, answers, strict=False):
        assert code == 2 and message in told, f"{words}: wanted {message!r}, got {code}: {told}"
        assert not costly, f"{words}: {costly} were imported first. Check before the imports."
    assert len(answers) == len(REFUSED_AT_ONCE)
    assert not Path(places["NEW"]).exists()


def test_no_parser_of_the_repository_takes_abbreviated_flags() -> None:
    lax = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for folder in ("modeling_llm2clip", "examples", "benchmarks", "tests", "conversion")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and getattr(node.func, "attr", "") == "ArgumentParser"
        and not any(k.arg == "allow_abbrev" and k.value.value is False for k in node.keywords)
    ]
    assert not lax, f"Give these ArgumentParsers allow_abbrev=False: {lax}."


def test_the_help_of_every_command_imports_nothing_costly() -> None:
    code = f"""
import contextlib, io, sys
from modeling_llm2clip.__main__ import _build_parser
parser = _build_parser()
texts = [parser.format_help(), *(p.format_help() for p in parser.commands.values())]
print([name for name in {COSTLY!r} if name in sys.modules], min(map(len, texts)) > 100)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[] True", done.stderr
