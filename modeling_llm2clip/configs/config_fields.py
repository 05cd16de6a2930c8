"""The base of all options: checks by pydantic, which reads the annotations, and YAML.

A field's annotation says what it may be (`Annotated[int, Interval(ge=1)]`, `Literal["a", "b"]`),
and the string under it documents it. pydantic is imported when the first config is made.
"""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import yaml
from annotated_types import Interval

from .._suggestions import did_you_mean

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from pydantic_core import CoreSchema, ErrorDetails

# What all of torch, NumPy and transformers take.
Seed = Annotated[int, Interval(ge=0, le=2**32 - 1)]
# One alias, because Python takes unions of one set of choices in another order for the same.
WeightDtype = Literal["float32", "bfloat16", "float16"]

_ADAPTERS: dict[type, TypeAdapter[Any]] = {}  # made once: every construction asks for one
# pydantic's types of errors → what is wanted.
_WANTED = {
    "finite_number": "a finite number",
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "is_instance_of": "a path",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}  # as in `operator`


@dataclass(frozen=True, kw_only=True)
class Matches:
    """The strings that a field may have: those that match all of `pattern`.

    `wanted` says in an error what the pattern means. `meant` has what users write instead, in lower
    case, and the string that they mean.
    """

    pattern: str
    wanted: str
    meant: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)

    def __get_pydantic_core_schema__(
        self, source: Any, handler: Callable[[Any], CoreSchema]
    ) -> CoreSchema:
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(self._require, handler(source))

    def _require(self, text: str) -> str:
        if re.fullmatch(self.pattern, text):
            return text
        meant = did_you_mean(self.meant.get(text.lower(), text), self.meant.values())
        raise ValueError(f"must be {self.wanted}.{meant}")


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
        for name, value in check_fields(type(self), given).items():
            object.__setattr__(self, name, value)
        if conflicts := list(self._find_conflicts()):
            raise ValueError(" ".join(conflicts))

    def _find_conflicts(self) -> Iterator[str]:
        """Yield a sentence for each contradiction between fields that are fine by themselves."""
        yield from ()

    def list_given(self) -> list[str]:
        """List the options that differ from their defaults."""
        return [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: object) -> CoreSchema:
        """Let a section of another config be a mapping."""
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(cls._from_section)

    @classmethod
    def _from_section(cls, value: Any) -> Any:
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise ValueError("must be a section with options of its own.")
        return cls(**_find_adapter(cls).validate_python(dict(value)))


@dataclass(frozen=True, kw_only=True)
class DeviceConfig(Config):
    """Where a model runs."""

    device: Device = "auto"
    """Device of the model: auto, cpu, cuda, cuda:N or mps; auto is cuda, else mps, else cpu."""


ConfigT = TypeVar("ConfigT", bound=Config)


def read_config(file: str | Path, config_type: type[ConfigT]) -> ConfigT:
    """Read options from a YAML file: a mapping of fields, in which a section is a mapping too."""
    values = read_yaml(file)
    try:
        return make_config(config_type, values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def read_yaml(file: str | Path) -> dict[str, Any]:
    """Read a YAML file (version 1.2: `1e-4` is a number, `no` is a string) with one mapping."""
    try:
        values = yaml.load(Path(file).read_text(encoding="utf-8"), Loader=_YamlLoader)
    except OSError as error:
        shown = f"{file} cannot be read: {error.strerror}. Give a YAML file of options."
        raise ValueError(shown) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        shown = " ".join(str(error).split())
        raise ValueError(f"{file} cannot be read as YAML: {shown}") from None
    if values is None:  # an empty file
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{file} must hold `option: value` lines.")
    return values


def make_config(config_type: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """Make options from plain values, as YAML and JSON hold them; sections are mappings."""
    return config_type(**check_fields(config_type, values))


def check_fields(config_type: type[Config], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values as the fields want them; a field without a default has to be there."""
    return _check(_find_adapter(config_type), values, config_type)


def check_values(hints: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return some values as their annotations want them."""
    return _check(_make_adapter("values", hints, hints), values, hints)


def _check(
    adapter: TypeAdapter[Any],
    values: Mapping[str, Any],
    known: type[Config] | Mapping[str, Any],
) -> dict[str, Any]:
    from pydantic import ValidationError

    try:
        return adapter.validate_python(dict(values))  # type: ignore[no-any-return]
    except ValidationError as error:
        errors = _choose_branches(error.errors())
        raise ValueError(" ".join(_describe(one, known) for one in errors)) from None


def _find_adapter(config_type: type[Config]) -> TypeAdapter[Any]:
    if config_type not in _ADAPTERS:
        hints = get_type_hints(config_type, include_extras=True)
        none = dataclasses.MISSING
        optional = [field.name for field in dataclasses.fields(config_type)
                    if (field.default, field.default_factory) != (none, none)]  # fmt: skip
        _ADAPTERS[config_type] = _make_adapter(config_type.__name__, hints, optional)
    return _ADAPTERS[config_type]


def _make_adapter(
    name: str, hints: Mapping[str, Any], optional: Collection[str]
) -> TypeAdapter[Any]:
    from pydantic import ConfigDict, TypeAdapter, with_config
    from typing_extensions import NotRequired, TypedDict

    loose = {key: _allow_yaml(hint) for key, hint in hints.items()}
    fields = {key: NotRequired[hint] if key in optional else hint for key, hint in loose.items()}
    config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    return TypeAdapter(with_config(config)(TypedDict(name, fields)))  # type: ignore[operator]


def _allow_yaml(hint: Any) -> Any:
    """Let strings be paths, and lists be tuples; all else in an annotation is strict."""
    from pydantic import AfterValidator, BeforeValidator, Strict

    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        bounds = [partial(_require_within, interval=one) for one in arguments
                  if isinstance(one, Interval)]  # fmt: skip
        checks = (*map(AfterValidator, bounds), *arguments[1:])  # ours refuse before pydantic's
        return Annotated[(_allow_yaml(arguments[0]), *checks)]
    if origin in (Union, UnionType):
        return Union[tuple(map(_allow_yaml, arguments))]  # noqa: UP007
    if origin is tuple:
        several: Any = tuple[tuple(map(_allow_yaml, arguments))]  # type: ignore[misc]
        length = None if arguments[-1] is ... else len(arguments)
        is_list = BeforeValidator(partial(_require_list, length=length))
        return Annotated[several, Strict(False), is_list]
    return Annotated[Path, BeforeValidator(_to_path)] if hint is Path else hint


def _to_path(value: Any) -> Any:
    return Path(value) if isinstance(value, str) else value


def _require_within(value: Any, *, interval: Interval) -> Any:
    """Name both bounds, where pydantic names the one that is broken."""
    limits = {name: limit for name in _BOUNDS if (limit := getattr(interval, name)) is not None}
    if not all(getattr(operator, name)(value, limit) for name, limit in limits.items()):
        wanted = " and ".join(f"{_BOUNDS[name]} {limit}" for name, limit in limits.items())
        raise ValueError(f"must be {wanted}.")
    return value


def _require_list(value: Any, *, length: int | None) -> Any:
    """Refuse what pydantic would take, too: a set has another order in each process."""
    from pydantic_core import PydanticKnownError

    if not isinstance(value, list | tuple):
        raise PydanticKnownError("tuple_type")
    if length not in (None, len(value)):
        raise ValueError(f"must be a list of {length}.")
    return value


def _is_branch(part: int | str) -> bool:
    """Recognize the branch of a union in a path, as `str` or `tuple[str, ...]`."""
    return part == "str" or "[" in str(part)


def _choose_branches(errors: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """Leave out branches of unions for other types, where one is for the type that was given."""

    def is_of_branch(error: ErrorDetails) -> bool:
        kind = error["type"]
        return _is_branch(error["loc"][-1]) and kind.endswith(("_type", "is_instance_of"))

    entered = {one["loc"][:end] for one in errors if not is_of_branch(one)
               for end in range(len(one["loc"]))}  # fmt: skip
    return [one for one in errors if not (is_of_branch(one) and one["loc"][:-1] in entered)]


def _describe(error: ErrorDetails, known: type[Config] | Mapping[str, Any]) -> str:
    """One sentence for an error of pydantic: what came, and what was wanted."""
    path, value, kind = error["loc"], error["input"], error["type"]
    fields = (p for p in path if not _is_branch(p))
    name = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in fields).removeprefix(".")
    if kind == "missing":
        return f"{name} is missing."
    if kind == "extra_forbidden":
        return f"{name} is not an option.{did_you_mean(str(path[-1]), _list_names(known, path))}"
    if kind == "literal_error":
        choices = error["ctx"]["expected"].split("'")[1::2]  # 'first', 'second' or 'third'
        meant = did_you_mean(str(value), choices)
        return f"{name}={value!r} must be one of {', '.join(choices)}.{meant}"
    if kind == "value_error":  # of `Matches` or of a section
        message = str(error["ctx"]["error"])
        return f"{name}: {message}" if isinstance(value, Mapping) else f"{name}={value!r} {message}"
    if kind not in _WANTED:
        return f"{name}={value!r}: {error['msg']}."
    return f"{name}={value!r} must be {_WANTED[kind]}."


def _list_names(known: type[Config] | Mapping[str, Any], path: tuple[int | str, ...]) -> list[str]:
    """List the options beside the one at `path`, whose first parts are sections."""
    for part in path[:-1]:
        hint = (known if isinstance(known, Mapping) else get_type_hints(known))[str(part)]
        known = next(kind for kind in (hint, *get_args(hint)) if isinstance(kind, type))
    return (
        list(known) if isinstance(known, Mapping) else [f.name for f in dataclasses.fields(known)]
    )


class _YamlLoader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
    """YAML 1.2's scalars, where PyYAML's are those of 1.1; a key that is given twice is an error.

    In YAML 1.1 `1e-4` is a string, and `no` (Norwegian, or an answer) is false.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # as in the base class

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
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
