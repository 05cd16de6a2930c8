"""Rules for all options: refused values, YAML, and documentation of every field."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Interval
from docstring_parser import parse_from_object

from modeling_llm2clip import configs
from modeling_llm2clip.configs.config_fields import (
    Config,
    Device,
    make_config,
    read_config,
    read_yaml,
)

MODULES = [
    importlib.import_module(f"{configs.__name__}.{module.name}")
    for module in pkgutil.iter_modules(configs.__path__)
]
KINDS = {kind for module in MODULES for kind in vars(module).values() if isinstance(kind, type)}
CONFIGS = sorted((k for k in KINDS if issubclass(k, Config)), key=lambda kind: kind.__name__)


@dataclass(frozen=True, kw_only=True)
class Inner(Config):
    """A section."""

    rate: Annotated[float, Interval(gt=0)] = 1e-3
    """Rate of learning."""
    size: int = 1
    """Size."""


@dataclass(frozen=True, kw_only=True)
class Example(Config):
    """One field of every kind."""

    name: str
    """A name
    over two lines."""
    steps: Annotated[int, Interval(ge=1)] | None = None
    """Steps."""
    share: Annotated[float, Interval(ge=0, lt=1)] = 0.5
    """Share."""
    kind: Literal["first", "second"] = "first"
    """Kind."""
    device: Device = "auto"
    """Device."""
    folder: Path | None = None
    """Folder."""
    place: str | Path | None = None
    """Place."""
    words: tuple[str, ...] = ()
    """Words."""
    pairs: tuple[tuple[Path, float], ...] = ()
    """Pairs."""
    is_on: bool = False
    """Switch."""
    inner: Inner = field(default_factory=Inner)
    """Section."""


def read_docs(kind: type[Config]) -> dict[str, str]:
    """Read the strings below the fields, like the command line's parser."""
    return {
        found.arg_name: " ".join((found.description or "").split())
        for owner in reversed(kind.__mro__[:-1])
        for found in parse_from_object(owner).params
    }


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_every_option_is_frozen_and_documents_its_default(
    kind: type[Config],
) -> None:
    docs = read_docs(kind)
    assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    for info in dataclasses.fields(kind):
        assert info.kw_only
        help = docs.get(info.name, "")
        assert help.endswith("."), f"{kind.__name__}.{info.name} has no sentence under it."
        if info.default is None or info.default == ():
            assert "default" in help.lower() or "null" in help or info.name in (
                "prompt_prefix", "prompt_suffix", "preprocessing",
            ), f"{kind.__name__}.{info.name}: document the default."  # fmt: skip


def test_options_import_nothing_costly_and_no_other_folder() -> None:
    code = (
        "import sys, importlib\n"
        f"for name in {[module.__name__ for module in MODULES]!r}: importlib.import_module(name)\n"
        "ours = {m.split('.')[1] for m in sys.modules if m.startswith('modeling_llm2clip.')}\n"
        "print({'torch', 'transformers', 'numpy'} & set(sys.modules), sorted(ours))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "set() ['_registration', '_suggestions', 'configs']"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps=0: Input should be greater than or equal to 1."),
        ({"steps": 2.5}, "steps=2.5: Input should be a valid integer"),
        ({"share": 1}, "share=1: Input should be less than 1."),
        ({"share": -1.5}, "share=-1.5: Input should be greater than or equal to 0."),
        ({"share": float("nan")}, "share=nan: Input should be "),
        ({"share": float("inf")}, "share=inf: Input should be "),
        ({"share": "x"}, "share='x': Input should be a valid number"),
        ({"kind": "secnd"}, "kind='secnd': Input should be 'first' or 'second'."),
        ({"device": "gpu"}, "device='gpu': must be one of auto, cpu, cuda, cuda:N, mps."),
        ({"folder": 3}, "folder=3: Input is not a valid path"),
        ({"words": "one"}, "words='one': Input should be a valid tuple."),
        ({"words": ["one", 2]}, "words.1=2: Input should be a valid string."),
        ({"words": {"one"}}, "words must be a list: the order of a set differs between processes."),
        ({"pairs": [["file"]]}, "pairs.0.1 is missing."),
        ({"is_on": "x"}, "is_on='x': Input should be a valid boolean"),
        ({"inner": {"rate": 0}}, "inner: rate=0: Input should be greater than 0."),
        ({"inner": 3}, "3 must be a section with its own options."),
        ({"steps": 0, "share": -1}, "equal to 1. share=-1: Input should be "),  # all at once
    ],
)
def test_an_invalid_value_is_refused_with_the_valid_ones(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as refused:
        Example(name="x", **values)
    assert message in str(refused.value)


def test_lists_numbers_and_paths_are_converted_to_the_fields_type() -> None:
    made = Example(name="x", share=0, folder="a", words=["b"], pairs=[["c", 1]])  # type: ignore[arg-type]
    assert (made.share, made.folder, made.words) == (0.0, Path("a"), ("b",))
    assert made.pairs == ((Path("c"), 1.0),)
    assert isinstance(made.share, float) and isinstance(made.folder, Path)


def test_yaml_and_python_create_equal_options(tmp_path: Path) -> None:
    (tmp_path / "options.yaml").write_text(
        "name: no\nsteps: 3\nshare: 5e-1\nfolder: data\nwords: [on, 'off']\n"
        "pairs:\n- [a, 1e-4]\nis_on: true\ninner:\n  rate: 1e-4\n",
        encoding="utf-8",
    )
    assert read_config(tmp_path / "options.yaml", Example) == Example(
        name="no", steps=3, share=0.5, folder=Path("data"), words=("on", "off"),
        pairs=((Path("a"), 1e-4),), is_on=True, inner=Inner(rate=1e-4),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nsahre: 1", "sahre is not an option. Did you mean share?"),
        ("name: x\ninner: {raet: 1}", "inner: raet is not an option. Did you mean rate?"),
        ("name: x\ninner: {rate: -1}", "inner: rate='-1': Input should be greater than 0."),
        ("steps: 3", "name is missing."),
        ("name: x\nname: y", "duplicate key 'name'"),
        ("name: x\ninner: {rate: 1, rate: 2}", "duplicate key 'rate'"),
        ("- name", "must contain `option: value` lines"),
        ("name: [x", "cannot be read as YAML"),
        ("name: " + "[" * 5000, "cannot be read as YAML"),
        ("name: x\nsteps: 1.5", "steps='1.5': Input should be a valid integer"),
        ("name: x\nis_on: 7", "is_on='7': Input should be a valid boolean"),
    ],
)
def test_an_invalid_file_is_refused_by_name(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as refused:
        read_config(file, Example)
    assert message in str(refused.value) and str(file) in str(refused.value)


def test_an_unreadable_file_is_refused_with_a_remedy(tmp_path: Path) -> None:
    for file in (tmp_path / "nothing.yaml", tmp_path):
        with pytest.raises(ValueError, match=f"{file} cannot be read: .*Pass a YAML file"):
            read_yaml(file)


def test_a_yaml_scalar_gets_the_type_of_its_field(tmp_path: Path) -> None:
    file = tmp_path / "scalars.yaml"
    file.write_text("a: 1e-4\nb: no\nc: 010\nd: 1:30\ne: ~\nf: null\ng: 'null'\nh:\ni: [yes, 3]\n")
    assert read_yaml(file) == {
        "a": "1e-4", "b": "no", "c": "010", "d": "1:30", "e": None, "f": None, "g": "null",
        "h": None, "i": ["yes", "3"],
    }  # fmt: skip
    file.write_text("name: no\nsteps: 010\nshare: 5e-1\nplace: 2026-01-01\nis_on: true")
    assert read_config(file, Example) == Example(
        name="no", steps=10, share=0.5, place="2026-01-01", is_on=True
    )


def write_based(folder: Path, own: str, base: str) -> Path:
    """Write options that inherit from `shared/base.yaml`; return their file."""
    (folder / "shared").mkdir()
    (folder / "shared" / "base.yaml").write_text(base, encoding="utf-8")
    (folder / "own.yaml").write_text(own, encoding="utf-8")
    return folder / "own.yaml"


def test_a_file_takes_what_it_leaves_out_from_its_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = "name: x\nsteps: 3\nshare: 0.1\nwords: [a, b]\ninner: {rate: 2, size: 7}"
    own = "base: shared/base.yaml\nname: y\nsteps: null\nwords: [c]\ninner: {size: 8}"
    file = write_based(tmp_path, own, base)
    # The base is next to the file, wherever the command runs.
    monkeypatch.chdir(tmp_path / "shared")
    found = read_config(file, Example)
    assert found == Example(
        name="y", steps=None, share=0.1, words=("c",), inner=Inner(rate=2, size=8)
    )


def test_a_section_of_a_file_replaces_what_is_no_section_in_its_base(tmp_path: Path) -> None:
    file = write_based(tmp_path, "base: shared/base.yaml\ninner: {size: 8}", "name: x\ninner:")
    assert read_config(file, Example) == Example(name="x", inner=Inner(size=8))


@pytest.mark.parametrize(
    ("own", "base", "message"),
    [
        ("base: shared/base.yaml", "base: other.yaml", "base.yaml has a base as well. Only one"),
        ("base: nothing.yaml", "", "nothing.yaml cannot be read: No such file or directory."),
        ("base: [a.yaml]", "", "base must be the path of one YAML file, not ['a.yaml']."),
        ("base:", "", "base must be the path of one YAML file, not None."),
        ("base: shared/base.yaml", "name: x\nsahre: 1", "sahre is not an option. Did you mean"),
        ("base: shared/base.yaml", "- name", "base.yaml must contain `option: value` lines"),
    ],
)
def test_an_invalid_base_is_refused_by_name(
    own: str, base: str, message: str, tmp_path: Path
) -> None:
    file = write_based(tmp_path, own, base)
    with pytest.raises(ValueError) as refused:
        read_config(file, Example)
    assert message in str(refused.value) and str(file) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_options_can_be_recreated_from_their_values_and_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert read_config(tmp_path / "empty.yaml", Inner) == Inner()
    made = Example(name="x", words=("a",), inner=Inner(rate=2.0))
    assert make_config(Example, dataclasses.asdict(made)) == made
