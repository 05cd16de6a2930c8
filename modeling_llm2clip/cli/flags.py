"""Commands made of typed functions; the only file that knows the parser library (cyclopts).

A command is a function. Its positional-only parameters are the arguments, its keyword-only ones
the flags; a parameter whose type is a config gives a flag for every field of it. Types, defaults
and help come from annotations and docstrings, and are not said again.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import UnionType
from typing import (
    Annotated,
    Any,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from cyclopts import App, CycloptsError, Group, Parameter
from cyclopts.exceptions import MissingArgumentError, UnusedCliTokensError
from cyclopts.help import DescriptionRenderer, HelpPanel
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

from .._suggestions import did_you_mean
from ..configs.config_fields import (
    Config,
    DeviceConfig,
    convert_value,
    list_fields,
    read_yaml,
)

REPEATED = Parameter(consume_multiple=False)
"""In the annotation of a flag: one value each time it is given, so that arguments may follow."""
_MISSING = dataclasses.MISSING
_CONFIG_FLAG = "config"
_FLAGS_OF_PROGRAM = ("--help", "-h", "--version")
_OPTIONS = "Options"


class UsageError(ValueError):
    """A command line that cannot be run; the message is one line."""


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
        default: Its default value; `dataclasses.MISSING` where it is required.
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
        """Whether it has no value but a form with `--no-`."""
        return _simplify(self.hint) is bool


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

    @cached_property
    def flags(self) -> dict[str, Flag]:
        """All flags by their names; those of configs stand for their fields."""
        found: dict[str, Flag] = {}
        for flag in self._list_flags():
            if flag.name in found:
                raise TypeError(f"{self.name} has two flags {flag.spelling}.")
            found[flag.name] = flag
        return found

    @cached_property
    def shell(self) -> Callable[..., None]:
        """What the parser looks at: the function's arguments, and one keyword for each flag."""

        def shell(*_: Any, **__: Any) -> None:
            """Not called."""

        hints = get_type_hints(self.function)
        parameters = [
            parameter.replace(annotation=hints[name])
            for name, parameter in inspect.signature(self.function).parameters.items()
            if parameter.kind is not parameter.KEYWORD_ONLY
        ]
        order = dict.fromkeys(flag.group for flag in self.flags.values())
        groups = {name: Group(name, sort_key=number) for number, name in enumerate(order)}
        for flag in self.flags.values():
            parameters.append(self._make_parameter(flag, groups[flag.group]))
        shell.__name__, shell.__doc__ = self.function.__name__, self.function.__doc__
        shell.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        shell.__annotations__ = {p.name: p.annotation for p in parameters}
        return shell

    def prepare(self, words: Sequence[str]) -> list[str]:
        """Refuse unknown flags, and join a value that begins with a hyphen to its flag.

        Args:
            words: What follows the command's name.

        Raises:
            UsageError: A flag is unknown; before the parser could miss something because of it.
        """
        known = {*_FLAGS_OF_PROGRAM[:2]}
        for flag in self.flags.values():
            known |= {flag.spelling, *([f"--no-{flag.spelling[2:]}"] if flag.is_switch else [])}
        prepared: list[str] = []
        for number, word in enumerate(words):
            name = word.partition("=")[0].replace("_", "-")
            if word == "--":
                return [*prepared, *words[number:]]
            if word.startswith("-") and " " in name and prepared and prepared[-1] in known:
                prepared[-1] += f"={word}"
                continue
            if name.startswith("--") and " " not in name and name not in known:
                raise UsageError(f"Unknown flag {name}.{did_you_mean(name, known)}")
            prepared.append(word)
        return prepared

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
                message = re.sub(rf"{word}=False\b", f"--no-{flag.spelling[2:]}", message)
            message = re.sub(rf"{word}=(?=\S)", f"{flag.spelling} ", message)
            if "_" in flag.name:  # else it may be a plain word
                message = re.sub(rf"{word}(?![\w/\\'\"(=-]|\.\w)", flag.spelling, message)
        return message

    def bind(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Make what the function takes by keyword of the given values of flags.

        Args:
            given: Name of a flag to its value; with `config`, a YAML file that has others'.

        Raises:
            UsageError: A value is not what it may be, or is missing; all are named.
        """
        values = dict(given)
        if (file := values.pop(_CONFIG_FLAG, None)) is not None:
            values = {**self._read_file(file), **values}
        arguments: dict[str, Any] = {}
        errors = []
        for name, hint in _list_keywords(self.function):
            own = {f.name: values[f.name] for f in self.flags.values()
                   if f.parameter == name and f.name in values}  # fmt: skip
            try:
                arguments |= self._bind_one(name, hint, own)
            except ValueError as error:
                errors.append(str(error))
        if errors:
            raise UsageError(self.name_flags(" ".join(errors)))
        return arguments

    def _make_parameter(self, flag: Flag, group: Group) -> inspect.Parameter:
        hint, default = _simplify(flag.hint), flag.default
        shows_default = default is not _MISSING and default is not None and default != ()
        options: dict[str, Any] = {
            "group": group,
            "negative": None if flag.is_switch else (),
            "consume_multiple": get_origin(hint) is tuple,
            "show_default": _show_default if shows_default else False,
        }
        if flag.help:
            options["help"] = self.name_flags(flag.help)
        if hint is int:
            options["converter"] = _to_int
        own = [item for item in getattr(flag.hint, "__metadata__", ())
               if isinstance(item, Parameter)]  # fmt: skip
        return inspect.Parameter(
            flag.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None if default is _MISSING else default,
            annotation=Annotated[(hint, Parameter(**options), *own)],  # type: ignore[misc]
        )

    def _bind_one(self, name: str, hint: Any, own: dict[str, Any]) -> dict[str, Any]:
        if _is_config(hint):
            return {name: hint(**own)}
        if _find_changes(hint):
            hints = {key: self.flags[key].hint for key in own}
            return {name: {key: convert_value(key, v, hints[key]) for key, v in own.items()}}
        if name in own:
            return {name: convert_value(name, own[name], hint)}
        if self.flags[name].default is _MISSING:
            raise ValueError(f"{self.flags[name].spelling} is required.")
        return {}

    def _read_file(self, file: Path) -> dict[str, Any]:
        values, errors = {}, []
        try:
            content = read_yaml(file)
        except (OSError, ValueError) as error:
            raise UsageError(f"--config {file} cannot be read: {error}.") from None
        for name, value in content.items():
            if name not in self.flags or name == _CONFIG_FLAG:
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
        if any(_is_config(hint) for _, hint in _list_keywords(self.function)):
            yield Flag(
                name=_CONFIG_FLAG,
                parameter="",
                hint=Path | None,
                default=None,
                help="YAML file of options, named as the flags with underscores; a flag that is "
                "given too wins. Default: none.",
                group=_OPTIONS,
            )
        for name, hint in _list_keywords(self.function):
            changes = _find_changes(hint)
            if changes is None and not _is_config(hint):
                default = signature.parameters[name].default
                default = _MISSING if default is inspect.Parameter.empty else default
                yield Flag(name=name, parameter=name, hint=hint, default=default,
                           help="", group=_OPTIONS)  # fmt: skip
                continue
            for field in list_fields(changes.config_type if changes else hint).values():
                if changes and field.name in changes.without:
                    continue
                yield Flag(
                    name=field.name,
                    parameter=name,
                    hint=field.hint,
                    default=None if changes else field.default,
                    help=f"{field.help} Default: {changes.default}." if changes else field.help,
                    group=_name_group(field.owner),
                )


def command(*, group: str, examples: Sequence[str]) -> Callable[[Callable[..., Any]], Command]:
    """Make a command of a function.

    Args:
        group: Heading under which `llm2clip --help` lists it.
        examples: Command lines for the end of its help; each begins with `llm2clip`.
    """
    return lambda function: Command(function, group, tuple(examples))


class CommandLine:
    """A program of several commands.

    Args:
        program: Its name.
        commands: In the order in which the help lists them.
        description: First line of its help.
        version: What `--version` prints.
        examples: Command lines for the end of its help.
    """

    def __init__(
        self,
        program: str,
        commands: Sequence[Command],
        *,
        description: str,
        version: str,
        examples: Sequence[str],
    ) -> None:
        self.program = program
        self.commands = {command.name: command for command in commands}
        self.description = description
        self.version = version
        self.examples = tuple(examples)

    def parse(self, words: Sequence[str]) -> Callable[[], int | None]:
        """Read a command line.

        Args:
            words: Without the name of the program.

        Returns:
            What runs it: the command, or the printing of help or version.

        Raises:
            UsageError: There is no such command or flag, or a value is not what it may be.
        """
        words = list(words)
        chosen = self.find_command(words)
        try:
            if not words:
                raise UsageError(f"Name a command, one of {', '.join(self.commands)}.")
            if words[0].startswith("-") and words[0] not in _FLAGS_OF_PROGRAM:
                raise UsageError(
                    f"Unknown flag {words[0]}.{did_you_mean(words[0], _FLAGS_OF_PROGRAM)}"
                )
            if chosen is not None:
                words[1:] = chosen.prepare(words[1:])
            run, bound, _ = self._make_app(chosen).parse_args(
                words, exit_on_error=False, print_error=False
            )
            if chosen is None or run is not chosen.shell:  # prints help or version
                return lambda: run(*bound.args, **bound.kwargs)
            arguments = chosen.bind(bound.kwargs)
        except (CycloptsError, UsageError) as error:
            name = " ".join([self.program, *([chosen.name] if chosen else [])])
            raise UsageError(f"{_describe(error)} See `{name} --help`.") from None
        return lambda: chosen.function(*bound.args, **arguments)

    def find_command(self, words: Sequence[str]) -> Command | None:
        """Return the command that a command line is for; None for `--help` and the like.

        Args:
            words: Without the name of the program.
        """
        return self.commands.get(words[0]) if words else None

    def _make_app(self, chosen: Command | None) -> App:
        """Make the parser; of all commands but one nothing but the summary is looked at."""
        root = App(
            name=self.program,
            help=self.description,
            help_epilogue=_show_examples(self.examples),
            help_format="plaintext",
            help_formatter=_HelpFormatter(),
            help_flags=_FLAGS_OF_PROGRAM[:2],
            version=self.version,
            version_flags=_FLAGS_OF_PROGRAM[2:],
        )
        root["--help"].group = root["--version"].group = Group(_OPTIONS, sort_key=99)
        groups = {c.group: Group(c.group, sort_key=n)
                  for n, c in reversed([*enumerate(self.commands.values())])}  # fmt: skip
        for item in self.commands.values():
            app = App(
                name=item.name,
                help=item.summary,
                help_epilogue=_show_examples(item.examples),
                group=groups[item.group],
                version_flags=(),
            )
            if item is chosen:
                app.default(item.shell)
            root.command(app)
        return root


class _HelpFormatter:
    """Prints each group of the help as a title, then names and descriptions in two columns."""

    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        if not panel.entries:
            return
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(max_width=max(24, options.max_width * 2 // 5))
        table.add_column(overflow="fold")
        describe = DescriptionRenderer()
        for entry in panel.entries:
            names = [*entry.positive_names, *entry.positive_shorts, entry.metavar]
            if entry.negative_names:
                names = [f"--[no-]{name[2:]}" for name in entry.positive_names]
            label = entry.positional_label or " ".join(filter(None, names))
            table.add_row(Text(f"  {label}", style="cyclopts.name"), describe(entry))
        console.print(Text(f"{panel.title}:", style="bold"))
        console.print(table)
        console.print()

    def render_usage(self, console: Console, options: ConsoleOptions, usage: Any) -> None:
        """Print the line that shows how the command is called."""
        if usage:
            console.print(Text(f"Usage: {usage}"))


def _list_keywords(function: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    """Yield name and annotation of each parameter that gives flags."""
    hints = get_type_hints(function, include_extras=True)
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            yield parameter.name, hints[parameter.name]


def _is_config(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Config)


def _find_changes(hint: Any) -> Changes | None:
    found = [item for item in getattr(hint, "__metadata__", ()) if isinstance(item, Changes)]
    return found[0] if found else None


def _simplify(hint: Any) -> Any:
    """Reduce an annotation to what the parser has to know; limits are checked afterwards.

    Of several types a flag has the first, which is a single word.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _simplify(arguments[0])
    if origin in (Union, UnionType):
        return _simplify(next(item for item in arguments if item is not type(None)))
    if origin is tuple:
        return tuple[tuple(item if item is Ellipsis else _simplify(item) for item in arguments)]  # type: ignore[misc]
    return hint


def _to_int(_: Any, tokens: Sequence[Any]) -> int:
    try:
        return int(tokens[0].value)
    except ValueError:  # the library would round 3.5
        raise ValueError(f"{tokens[0].value!r} is not an integer.") from None


def _name_group(owner: type[Config]) -> str:
    if owner is DeviceConfig:
        return _OPTIONS
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", owner.__name__.removesuffix("Config"))
    return f"{words.capitalize()} options"


def _show_default(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _show_examples(examples: Sequence[str]) -> str:
    return "\n  ".join(("Examples:" if len(examples) > 1 else "Example:", *examples))


def _describe(error: Exception) -> str:
    """One line for an error of the parser."""
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        name = error.keyword or error.argument.name
        if name.startswith("-"):
            return f"{name} needs a value; one that begins with a hyphen is given as {name}=VALUE."
        return f"{name} is missing."
    if isinstance(error, UnusedCliTokensError):
        return f"Unexpected arguments: {' '.join(error.unused_tokens or ())}."
    return " ".join(str(error).split())
