"""A command is a typed function: its parameters are arguments and flags.

Positional-only parameters are the arguments, keyword-only ones the flags; a parameter whose type is
a config gives a flag for every field of it. Types, defaults and help come from annotations and
docstrings, and are not said again.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard, get_type_hints

from .._suggestions import did_you_mean
from ..configs.config_fields import Config, DeviceConfig, convert_value, list_fields, read_yaml

MISSING = dataclasses.MISSING
CONFIG_FLAG = "config"
_OPTIONS = "Options"


class UsageError(ValueError):
    """A command line that cannot be run; the message is one line."""


class Repeated:
    """In a flag's annotation: one value each time it is given, so that arguments may follow."""


@dataclass(frozen=True, kw_only=True)
class Changes:
    """In the annotation of a dict: the fields of a config that were given, without its defaults.

    Args:
        config_type: The config whose fields become flags.
        default: What holds where a flag is not given, for the help.
        without: Fields that become no flags.
    """

    config_type: type[Config]
    default: str
    without: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One flag of a command.

    Args:
        name: Name of the field or parameter; the flag has hyphens for its underscores.
        parameter: The function's parameter that it is for.
        hint: Its annotation.
        default: Its default value; `MISSING` where it is required.
        help: One paragraph; empty where the function's docstring has it.
        group: Heading under which the help shows it.
    """

    name: str
    parameter: str
    hint: Any
    default: Any
    help: str
    group: str

    @property
    def spelling(self) -> str:
        """As it is written, e.g. `--batch-size`."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def is_switch(self) -> bool:
        """Whether it has no value, but a second form that begins with `--no-`."""
        return self.hint in (bool, bool | None)

    @property
    def spellings(self) -> tuple[str, ...]:
        """Every form of it."""
        off = (f"--no-{self.spelling[2:]}",) if self.is_switch else ()
        return (self.spelling, *off)


@dataclass(frozen=True)
class Command:
    """A function that can be called from the command line.

    Args:
        function: Runs the command and returns its exit code, or None for 0.
        group: Heading under which `llm2clip --help` lists it.
        examples: Command lines for the end of the help.
    """

    function: Callable[..., int | None]
    group: str
    examples: tuple[str, ...]

    @property
    def name(self) -> str:
        """As it is written, e.g. `finetune-llm`."""
        return self.function.__name__.replace("_", "-")

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    @property
    def rest(self) -> str | None:
        """Name of the arguments of which there may be any number, if it takes such."""
        parameters = inspect.signature(self.function).parameters.values()
        return next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)

    @cached_property
    def flags(self) -> dict[str, Flag]:
        """All flags by their names; a config is replaced by the flags of its fields.

        Raises:
            TypeError: Two parameters give one flag.
        """
        found: dict[str, Flag] = {}
        for flag in self._list_flags():
            if flag.name in found:
                raise TypeError(f"{self.name} has two flags {flag.spelling}.")
            found[flag.name] = flag
        return found

    def name_flags(self, message: str) -> str:
        """Put flags where a message of the package names fields: `x=1` becomes `--x 1`.

        Args:
            message: Of an error; what is in quotes, paths and longer words stays.
        """
        for flag in sorted(self.flags.values(), key=lambda flag: -len(flag.name)):
            message = message.replace(f"`{flag.name}`", flag.spelling)
            word = rf"(?<![\w./\\'\"=-]){flag.name}"  # not within a path, a quotation, a word
            if flag.is_switch:
                message = re.sub(rf"{word}=True\b", flag.spelling, message)
                message = re.sub(rf"{word}=False\b", flag.spellings[1], message)
            message = re.sub(rf"{word}=(?=\S)", f"{flag.spelling} ", message)
            if "_" in flag.name:  # else it may be a plain word
                message = re.sub(rf"{word}(?![\w/\\'\"(=-]|\.\w)", flag.spelling, message)
        return message

    def bind(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Make what the function takes by keyword of the values of flags.

        Args:
            given: Name of a flag to its value; `config` is a YAML file with values of others.

        Raises:
            UsageError: A value is not what it may be, or is missing; all of them are named.
        """
        values = dict(given)
        if (file := values.pop(CONFIG_FLAG, None)) is not None:
            values = {**self._read_file(file), **values}
        arguments: dict[str, Any] = {}
        errors = []
        for name, hint in list_keywords(self.function):
            own = {f.name: values[f.name] for f in self.flags.values()
                   if f.parameter == name and f.name in values}  # fmt: skip
            try:
                arguments |= self._bind_parameter(name, hint, own)
            except ValueError as error:
                errors.append(str(error))
        if errors:
            raise UsageError(self.name_flags(" ".join(errors)))
        return arguments

    def _bind_parameter(self, name: str, hint: Any, own: dict[str, Any]) -> dict[str, Any]:
        if _is_config(hint):
            return {name: hint(**own)}
        if _find_changes(hint):
            hints = {key: self.flags[key].hint for key in own}
            return {name: {key: convert_value(key, v, hints[key]) for key, v in own.items()}}
        if name in own:
            return {name: convert_value(name, own[name], hint)}
        if self.flags[name].default is MISSING:
            raise ValueError(f"{self.flags[name].spelling} is required.")
        return {}

    def _read_file(self, file: Path) -> dict[str, Any]:
        try:
            content = read_yaml(file)
        except (OSError, ValueError) as error:
            raise UsageError(f"--config {file} cannot be read: {error}.") from None
        values, errors = {}, []
        for name, value in content.items():
            if name not in self.flags or name == CONFIG_FLAG:
                errors.append(f"{name} is not an option.{did_you_mean(name, self.flags)}")
                continue
            try:
                values[name] = convert_value(name, value, self.flags[name].hint)
            except ValueError as error:
                errors.append(str(error))
        if errors:
            raise UsageError(f"--config {file}: {' '.join(errors)}")
        return values

    def _list_flags(self) -> Iterator[Flag]:
        signature = inspect.signature(self.function)
        if any(_is_config(hint) for _, hint in list_keywords(self.function)):
            yield Flag(
                name=CONFIG_FLAG,
                parameter="",
                hint=Path | None,
                default=None,
                help="YAML file of options, named as the flags with underscores; a flag that is "
                "given too wins. Default: none.",
                group=_OPTIONS,
            )
        for name, hint in list_keywords(self.function):
            if _is_config(hint):
                yield from _list_config_flags(name, hint, changes=None)
            elif changes := _find_changes(hint):
                yield from _list_config_flags(name, changes.config_type, changes=changes)
            else:
                default = signature.parameters[name].default
                default = MISSING if default is inspect.Parameter.empty else default
                yield Flag(name=name, parameter=name, hint=hint, default=default,
                           help="", group=_OPTIONS)  # fmt: skip


def command(*, group: str, examples: Sequence[str]) -> Callable[[Callable[..., Any]], Command]:
    """Make a command of a function.

    Args:
        group: Heading under which `llm2clip --help` lists it.
        examples: Command lines for the end of its help; each begins with `llm2clip`.
    """
    return lambda function: Command(function, group, tuple(examples))


def list_keywords(function: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    """Yield name and annotation of each parameter that gives flags.

    Args:
        function: Of a command.
    """
    hints = get_type_hints(function, include_extras=True)
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            yield parameter.name, hints[parameter.name]


def _list_config_flags(
    parameter: str, config_type: type[Config], *, changes: Changes | None
) -> Iterator[Flag]:
    for field in list_fields(config_type).values():
        if changes and field.name in changes.without:
            continue
        yield Flag(
            name=field.name,
            parameter=parameter,
            hint=field.hint,
            default=None if changes else field.default,
            help=f"{field.help} Default: {changes.default}." if changes else field.help,
            group=_name_group(field.owner),
        )


def _is_config(hint: Any) -> TypeGuard[type[Config]]:
    return isinstance(hint, type) and issubclass(hint, Config)


def _find_changes(hint: Any) -> Changes | None:
    found = [item for item in getattr(hint, "__metadata__", ()) if isinstance(item, Changes)]
    return found[0] if found else None


def _name_group(owner: type[Config]) -> str:
    if owner is DeviceConfig:
        return _OPTIONS
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", owner.__name__.removesuffix("Config"))
    return f"{words.capitalize()} options"
