"""What all options share: checks read off the annotations, reading from YAML, documented fields.

A field's annotation says what it may be (`Annotated[int, Range(min=1)]`, `Literal["a", "b"]`), and
the string under it documents it. Nothing is said again in code, flags or help.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import re
import textwrap
from collections import abc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from .._suggestions import did_you_mean

_HINTS: dict[type, dict[str, Any]] = {}  # found once: every construction looks at them


@dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers that a field may have.

    Args:
        min: The smallest number.
        max: The largest number.
        above: All numbers are larger than this.
        below: All numbers are smaller than this.
    """

    min: float | None = None
    max: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, number: float) -> bool:
        return (
            (self.min is None or number >= self.min)
            and (self.max is None or number <= self.max)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        named = (("at least", self.min), ("above", self.above),
                 ("at most", self.max), ("below", self.below))  # fmt: skip
        return " and ".join(f"{name} {limit:g}" for name, limit in named if limit is not None)


# What all of torch, NumPy and transformers take.
Seed = Annotated[int, Range(min=0, max=2**32 - 1)]


@dataclass(frozen=True, kw_only=True)
class Matches:
    """The strings that a field may have.

    Args:
        pattern: Regular expression for the whole string.
        wanted: What the pattern means, for errors.
        meant: What users write instead, with the string that they mean.
    """

    pattern: str
    wanted: str
    meant: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)

    def __contains__(self, text: str) -> bool:
        return re.fullmatch(self.pattern, text) is not None

    def suggest(self, text: str) -> str:
        """Return "Did you mean …?", or nothing.

        Args:
            text: What the user wrote.
        """
        known = dict.fromkeys(self.meant.values())
        return did_you_mean(self.meant.get(text.lower(), text), known)


Device = Annotated[
    str,
    Matches(
        pattern=r"auto|cpu|cuda(:\d+)?|mps",
        wanted="one of auto, cpu, cuda, cuda:N, mps",
        meant={"gpu": "cuda", "nvidia": "cuda", "metal": "mps", "cuda0": "cuda:0"},
    ),
]
ShardSize = Annotated[
    str, Matches(pattern=r"[1-9]\d*(KB|MB|GB|KiB|MiB|GiB)", wanted="a size, like 5GB or 500MB")
]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of all options: checks every field by its annotation when it is made.

    Lists become tuples, and strings become paths where a path is wanted, so that Python, YAML and
    flags make the same object.

    Raises:
        ValueError: One or several fields cannot be what they are; all of them are named at once.
    """

    def __post_init__(self) -> None:
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values, errors = _convert_all(type(self), given)
        for name, value in values.items():
            object.__setattr__(self, name, value)
        errors = errors or list(self.find_conflicts())
        if errors:
            raise ValueError(" ".join(errors))

    def find_conflicts(self) -> Iterator[str]:
        """Yield a sentence for each contradiction between fields that are fine by themselves."""
        yield from ()


@dataclass(frozen=True, kw_only=True)
class DeviceConfig(Config):
    """Where a model runs."""

    device: Device = "auto"
    """Where the model runs: auto, cpu, cuda, cuda:N or mps; auto is cuda, else mps, else cpu."""


ConfigT = TypeVar("ConfigT", bound=Config)


@dataclass(frozen=True, kw_only=True)
class FieldInfo:
    """One option as flags, help and documents show it.

    Args:
        name: The field's name; the flag has hyphens for its underscores.
        hint: Its annotation, with `Annotated` and what it holds.
        default: Its default value; `dataclasses.MISSING` where it has to be given.
        help: Its documentation in one paragraph.
        owner: The dataclass that declares it, which groups the help.
    """

    name: str
    hint: Any
    default: Any
    help: str
    owner: type[Config]


def read_config(file: str | Path, config_type: type[ConfigT]) -> ConfigT:
    """Read options from a YAML file: a mapping of fields, in which a section is a mapping too.

    Args:
        file: The YAML file (version 1.2: `1e-4` is a number, `no` is a string).
        config_type: The dataclass to make.

    Returns:
        The options; a field that the file does not name has its default.

    Raises:
        ValueError: The file is not YAML with one mapping, a key is unknown or given twice, or a
            value is not what its field may be. Every error is named at once.
        OSError: The file cannot be read.
    """
    values = read_yaml(file)
    try:
        return make_config(config_type, values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def read_yaml(file: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping, and no key of it twice.

    Args:
        file: The YAML file.

    Raises:
        ValueError: The file is not YAML, not UTF-8, not a mapping, or has a key twice.
        OSError: The file cannot be read.
    """
    try:
        values = yaml.load(Path(file).read_text(encoding="utf-8"), Loader=_YamlLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        shown = " ".join(str(error).split())
        raise ValueError(f"{file} cannot be read as YAML: {shown}") from None
    if values is None:  # an empty file
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{file} must hold `option: value` lines.")
    return values


def make_config(
    config_type: type[ConfigT], values: Mapping[str, Any], *, section: str = ""
) -> ConfigT:
    """Make options from plain values, as YAML and JSON hold them.

    Args:
        config_type: The dataclass to make.
        values: Field to value; sections are mappings.
        section: Name of the section that these values are in, with a dot at its end, for errors.

    Raises:
        ValueError: A key is unknown, a value is missing or not what its field may be.
    """
    found, errors = _convert_all(config_type, values, section=section)
    if errors:
        raise ValueError(" ".join(errors))
    try:
        return config_type(**found)
    except ValueError as error:  # a conflict between fields
        raise ValueError(f"{section[:-1]}: {error}" if section else str(error)) from None


def convert_value(name: str, value: Any, hint: Any) -> Any:
    """Return a value as its annotation wants it.

    Args:
        name: What the value is called in an error.
        value: As Python, YAML or a flag gives it.
        hint: An annotation that a field of a config can have.

    Raises:
        ValueError: The value is not what the annotation says.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _convert_annotated(name, value, arguments[0], arguments[1:])
    if origin in (Union, UnionType):
        return _convert_union(name, value, arguments)
    if origin is Literal:
        if value in arguments and type(value) in map(type, arguments):
            return value
        known = ", ".join(map(str, arguments))
        raise ValueError(
            f"{name}={value!r} must be one of {known}.{did_you_mean(str(value), arguments)}"
        )
    if origin is tuple:
        return _convert_tuple(name, value, arguments)
    if origin is abc.Mapping:
        if not isinstance(value, abc.Mapping):
            raise ValueError(f"{name}={value!r} must be a mapping.")
        return {key: convert_value(f"{name}.{key}", v, arguments[1]) for key, v in value.items()}
    if isinstance(hint, type) and issubclass(hint, Config):
        if isinstance(value, hint):
            return value
        if isinstance(value, Mapping):
            return make_config(hint, value, section=f"{name}.")
        raise ValueError(f"{name}={value!r} must be a section with options of its own.")
    return _convert_plain(name, value, hint)


def list_fields(config_type: type[Config]) -> dict[str, FieldInfo]:
    """List the options of a dataclass in their order, by name.

    Args:
        config_type: The dataclass.
    """
    owners = {
        name: owner
        for owner in config_type.__mro__  # the first to declare a field is its owner
        for name in vars(owner).get("__annotations__", {})
    }
    docs = {name: text for owner in reversed(config_type.__mro__) if dataclasses.is_dataclass(owner)
            for name, text in _read_docs(owner).items()}  # fmt: skip
    hints = _find_hints(config_type)
    return {
        field.name: FieldInfo(
            name=field.name,
            hint=hints[field.name],
            default=_find_default(field),
            help=docs.get(field.name, ""),
            owner=owners[field.name],
        )
        for field in dataclasses.fields(config_type)
    }


def _find_default(field: dataclasses.Field[Any]) -> Any:
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


def _find_hints(config_type: type[Config]) -> dict[str, Any]:
    if config_type not in _HINTS:
        _HINTS[config_type] = get_type_hints(config_type, include_extras=True)
    return _HINTS[config_type]


@cache
def _read_docs(owner: type) -> dict[str, str]:
    """Read the strings under the fields that a class itself declares; none without its source."""
    try:
        source = textwrap.dedent(inspect.getsource(owner))
    except OSError:
        return {}
    [declared] = ast.parse(source).body
    assert isinstance(declared, ast.ClassDef)
    docs: dict[str, str] = {}
    for field, below in zip(declared.body, declared.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            text = below.value if isinstance(below, ast.Expr) else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                docs[field.target.id] = " ".join(text.value.split())
    return docs


def _convert_all(
    config_type: type[Config], values: Mapping[str, Any], *, section: str = ""
) -> tuple[dict[str, Any], list[str]]:
    """Convert every value by its field, and collect a sentence for each that cannot be."""
    hints = _find_hints(config_type)
    fields = {field.name: field for field in dataclasses.fields(config_type)}
    found, errors = {}, []
    for name, value in values.items():
        if name not in fields:
            errors.append(f"{section}{name} is not an option.{did_you_mean(name, fields)}")
            continue
        try:
            found[name] = convert_value(f"{section}{name}", value, hints[name])
        except ValueError as error:
            errors.append(str(error))
    errors += [
        f"{section}{name} is missing."
        for name, field in fields.items()
        if name not in values and _find_default(field) is dataclasses.MISSING
    ]
    return found, errors


def _convert_annotated(name: str, value: Any, hint: Any, limits: tuple[Any, ...]) -> Any:
    value = convert_value(name, value, hint)
    for limit in limits:
        if isinstance(limit, Range) and value not in limit:
            raise ValueError(f"{name}={value} must be {limit}.")
        if isinstance(limit, Matches) and value not in limit:
            raise ValueError(f"{name}={value!r} must be {limit.wanted}.{limit.suggest(value)}")
    return value


def _convert_union(name: str, value: Any, hints: tuple[Any, ...]) -> Any:
    if value is None and NoneType in hints:
        return None
    is_list, is_mapping = isinstance(value, list | tuple), isinstance(value, abc.Mapping)
    wanted = tuple if is_list else abc.Mapping if is_mapping else None
    others = [hint for hint in hints if hint is not NoneType]
    fitting = [hint for hint in others if get_origin(hint) in (wanted, Annotated)] or others
    for hint in fitting[:-1]:
        try:
            return convert_value(name, value, hint)
        except ValueError:
            continue
    return convert_value(name, value, fitting[-1])


def _convert_tuple(name: str, value: Any, hints: tuple[Any, ...]) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name}={value!r} must be a list.")
    if len(hints) == 2 and hints[1] is Ellipsis:
        hints = (hints[0],) * len(value)
    elif len(hints) != len(value):
        raise ValueError(f"{name}={value!r} must be a list of {len(hints)}.")
    return tuple(
        convert_value(f"{name}[{number}]", item, hint)
        for number, (item, hint) in enumerate(zip(value, hints, strict=True))
    )


def _convert_plain(name: str, value: Any, hint: Any) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float and is_number:
        if not math.isfinite(value):
            raise ValueError(f"{name}={value} must be a finite number.")
        return float(value)
    if hint is int and is_number and isinstance(value, int):
        return value
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    if hint in (bool, str) and isinstance(value, hint):
        return value
    wanted = {float: "a number", int: "an integer", bool: "true or false",
              str: "a string", Path: "a path"}  # fmt: skip
    if hint not in wanted:
        raise TypeError(f"{name} has the annotation {hint}, which no option can have.")
    raise ValueError(f"{name}={value!r} must be {wanted[hint]}.")


class _YamlLoader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
    """YAML 1.2's scalars, where PyYAML's are those of 1.1; a key that is given twice is an error.

    In YAML 1.1 `1e-4` is a string, and `no` (Norwegian, or an answer) is false.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # as in the base class

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct it, unless a key is there twice."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} is given twice", node.value[number][0].start_mark
                )
        return super().construct_mapping(node, deep=deep)  # type: ignore[no-any-return]


# Not octal after a leading zero, as in YAML 1.1.
_YamlLoader.add_constructor(
    "tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node))
)
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
):
    _YamlLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first)
    )
