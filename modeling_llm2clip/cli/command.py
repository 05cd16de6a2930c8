"""A command is a typed function: its parameters are arguments and flags.

Positional-only parameters are the arguments, keyword-only ones the flags; a parameter whose type is
a config gives a flag for every field of it. cyclopts reads types, defaults and help off annotations
and docstrings, and splits the command line. Values are checked as those of Python and YAML are.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from cyclopts import App, Argument, CycloptsError, Group, MissingArgumentError, Parameter
from cyclopts.help import HelpPanel
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

from .._suggestions import did_you_mean
from ..configs.config_fields import Config, DeviceConfig, check_values, read_yaml

_FLAGS_OF_PROGRAM = ("--help", "-h", "--version")
_FILE = "options_file"
_FILE_HELP = (
    "YAML file of options, named like the flags but with underscores; flags override it. "
    "Default: none."
)
# In a flag's annotation: one value each time it is given, so that arguments may follow.
Repeated = Parameter(consume_multiple=False)


class UsageError(ValueError):
    """A command line that cannot be run; the message is one line."""


class LineSplit(CycloptsError):  # noqa: N818  # it is no error
    """Ends cyclopts' work once each argument has its words, before they are converted."""

    arguments: Iterable[Argument] = ()


@dataclass(frozen=True, kw_only=True)
class Changes:
    """In the annotation of a dict: the fields of a config that were given, without its defaults.

    The help says `default` of the others. Those in `without` become no flags.
    """

    config_type: type[Config]
    default: str
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class Command:
    """A function that can be called from the command line; it returns its exit code, or None for 0.

    `llm2clip --help` lists it under `group`; its own help ends with `examples` of command lines.
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
    def app(self) -> App:
        """The parser, which raises `LineSplit` or prints the help."""

        def shell(*_: Any, **__: Any) -> None:
            """Never called."""

        parameters = [*self._list_parameters()]
        shell.__name__, shell.__doc__ = self.function.__name__, self.function.__doc__
        shell.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        shell.__annotations__ = {p.name: p.annotation for p in parameters}
        app = App(
            name=self.name,
            config=_raise_split,
            default_parameter=_ALL_FLAGS,
            group_parameters=Group("Options", sort_key=0),
            version_flags=(),
        )
        app.default(shell)
        return app

    @cached_property
    def arguments(self) -> list[Argument]:
        arguments = _list_leaves(self.app.assemble_argument_collection())
        names = [argument.name for argument in arguments]
        if twice := {name for name in names if names.count(name) > 1}:
            raise TypeError(f"{self.name} has two flags {', '.join(twice)}.")
        return arguments

    @cached_property
    def flags(self) -> dict[str, Argument]:
        """All flags but `--config`, by the names that YAML and Python have for them."""
        return {
            flag.field_info.name: flag
            for flag in self.arguments
            if not flag.field_info.is_positional_only and flag.field_info.name != _FILE
        }

    def name_flags(self, message: str) -> str:
        """Put flags where a message of the package names fields: `x=1` becomes `--x 1`.

        What is in quotes, paths and longer words stays.
        """
        for name, on, off in self._spellings:
            if name in message:
                message = message.replace(f"`{name}`", on)
                word = rf"(?<![\w./\\'\"=-]){name}"  # not within a path, a quotation, a word
                if off:
                    message = re.sub(rf"{word}=True\b", on, message)
                    message = re.sub(rf"{word}=False\b", off, message)
                message = re.sub(rf"{word}=(?=\S)", f"{on} ", message)
                if "_" in name:  # else it may be a plain word
                    message = re.sub(rf"{word}(?![\w/\\'\"(=-]|\.\w)", on, message)
        return message

    @cached_property
    def _spellings(self) -> list[tuple[str, str, str]]:
        """Names, flags and the flags that turn switches off; longer names come first."""
        found = [(name, f.name, "".join(f.negatives)) for name, f in self.flags.items()]
        return sorted(found, key=lambda spelling: -len(spelling[0]))

    def bind(self, split: Iterable[Argument]) -> partial[int | None]:
        """Make the call of the function out of the words that each argument got."""
        given = [argument for argument in _list_leaves(split) if argument.has_tokens]
        positional, values, errors = _convert_all(given)
        hints = {name: flag.field_info.annotation for name, flag in self.flags.items()}
        if (file := values.pop(_FILE, None)) is not None:
            try:
                values = check_values(hints, read_yaml(file)) | values
            except (OSError, ValueError) as error:
                raise UsageError(f"--config {file}: {error}") from None
        names = {*values, *(argument.field_info.name for argument in given)}
        errors += [f"{argument.name} is missing." for argument in self.arguments
                   if argument.required and argument.field_info.name not in names]  # fmt: skip
        keywords: dict[str, Any] = {}
        try:
            values = check_values(hints, values)
            keywords = {} if errors else self._fill_configs(values)
        except ValueError as error:
            errors.append(str(error))
        if errors:
            raise UsageError(self.name_flags(" ".join(errors)))
        return partial(self.function, *positional, **keywords)

    def _fill_configs(self, values: dict[str, Any]) -> dict[str, Any]:
        """Put the values of flags into the configs and changes that they are of."""
        keywords, errors = dict(values), []
        for name, hint, config_type in self._list_configs():
            names = [field.name for field in fields(config_type)]
            own = {field: keywords.pop(field) for field in names if field in values}
            try:
                keywords[name] = config_type(**own) if hint is config_type else own
            except ValueError as error:  # fields that contradict each other
                errors.append(str(error))
        if errors:
            raise ValueError(" ".join(errors))
        return keywords

    def _list_configs(self) -> Iterator[tuple[str, Any, type[Config]]]:
        """Yield name, annotation and config of each parameter that gives several flags."""
        for name, hint in get_type_hints(self.function, include_extras=True).items():
            if _is_config(hint):
                yield name, hint, hint
            elif changes := _find_changes(hint):
                yield name, hint, changes.config_type

    def _list_parameters(self) -> Iterator[inspect.Parameter]:
        """Yield the function's parameters as cyclopts wants them, and that of `--config`."""
        hints = get_type_hints(self.function, include_extras=True)
        flattened = {name: _flatten(hint) for name, hint, _ in self._list_configs()}
        for name, parameter in inspect.signature(self.function).parameters.items():
            if name in flattened:
                yield parameter.replace(annotation=flattened[name], default=None)
            else:
                yield parameter.replace(annotation=hints[name])
        if any(map(_is_config, hints.values())):
            hint = Annotated[Path | None, Parameter(name="--config", help=_FILE_HELP)]
            kind = inspect.Parameter.KEYWORD_ONLY
            yield inspect.Parameter(_FILE, kind, default=None, annotation=hint)


def command(*, group: str, examples: Sequence[str]) -> Callable[[Callable[..., Any]], Command]:
    """Make a command of a function; each of the examples begins with `llm2clip`."""
    return lambda function: Command(function, group, tuple(examples))


def _describe_error(error: CycloptsError) -> str:
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        name = error.keyword or error.argument.name
        return f"{name} needs a value; one that begins with a hyphen is given as {name}=VALUE."
    error.verbose = False
    return " ".join(str(error).split())


def _is_config(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Config)


def _find_changes(hint: Any) -> Changes | None:
    metadata = getattr(hint, "__metadata__", ())
    return next((item for item in metadata if isinstance(item, Changes)), None)


def _flatten(hint: Any) -> Any:
    """Annotate a config so that each of its fields is a flag, in a group of the help."""
    changes = _find_changes(hint)
    config_type = changes.config_type if changes else hint
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", config_type.__name__.removesuffix("Config"))
    options: dict[str, Any] = {"name": "*"}
    if config_type is not DeviceConfig:
        options["group"] = Group(f"{words.capitalize()} options")
    if changes:
        options["parse"] = re.compile(rf"^(?!({'|'.join(changes.without)})$)")
        options["show_default"] = lambda _: changes.default
    return Annotated[config_type, Parameter(**options)]


def _list_leaves(arguments: Iterable[Argument]) -> list[Argument]:
    """List what takes words: not the configs themselves, and not what has no flag."""
    return [argument for argument in arguments if argument.parse and not argument.children]


def _convert_all(given: Iterable[Argument]) -> tuple[list[Any], dict[str, Any], list[str]]:
    """Return the values of arguments, those of flags, and a sentence for each invalid one."""
    positional: list[Any] = []
    values: dict[str, Any] = {}
    errors: list[str] = []
    for argument in given:
        word = argument.tokens[0].value
        if argument.resolved_hint is int and not re.fullmatch(r"[-+]?[\d_]+", word):
            errors.append(f"{argument.name} {word!r} must be an integer.")  # cyclopts rounds 3.5
            continue
        try:
            value = argument.convert()
        except CycloptsError as error:
            errors.append(_describe_error(error))
            continue
        if argument.is_var_positional():
            positional += value
        elif argument.is_positional_only():
            positional.append(value)
        else:
            values[argument.field_info.name] = value
    return positional, values, errors


def _raise_split(app: App, commands: tuple[str, ...], arguments: Iterable[Argument]) -> None:  # noqa: ARG001
    split = LineSplit()
    split.arguments = arguments
    raise split


def _show_default(value: Any) -> str | None:
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or None
    return None if value is None else str(value)


_ALL_FLAGS = Parameter(
    consume_multiple=True,
    json_dict=False,
    json_list=False,
    negative_iterable=(),
    negative_none=(),
    show_default=_show_default,
)


@dataclass(frozen=True)
class CommandLine:
    """A program of several commands.

    Its help lists the commands in their order, between `description` and `examples` of command
    lines.
    """

    program: str
    listed: Sequence[Command]
    description: str
    version: str
    examples: Sequence[str]

    @cached_property
    def commands(self) -> dict[str, Command]:
        return {command.name: command for command in self.listed}

    def parse(self, words: Sequence[str]) -> partial[int | None]:
        """Read a command line, without the name of the program."""
        chosen = self.find_command(words)
        try:
            return self._parse_with(chosen, words)
        except (UsageError, CycloptsError) as error:
            message = _describe_error(error) if isinstance(error, CycloptsError) else str(error)
            example = (chosen or self).examples[0]
            raise UsageError(f"{message} For example: {example}") from None

    def find_command(self, words: Sequence[str]) -> Command | None:
        """Return the command that a command line is for; None for `--help` and the like."""
        return self.commands.get(words[0]) if words else None

    def _parse_with(self, chosen: Command | None, words: Sequence[str]) -> partial[int | None]:
        if chosen:
            words = _prepare(chosen, words)
        elif not words:
            raise UsageError(f"Name a command, one of {', '.join(self.commands)}.")
        elif words[0].startswith("-") and words[0] not in _FLAGS_OF_PROGRAM:
            raise UsageError(f"Unknown flag {words[0]}.{did_you_mean(words[0], _FLAGS_OF_PROGRAM)}")
        try:
            # A console keeps the width that the terminal has when it is made.
            run, bound, _ = self._make_app(chosen).parse_args(
                words, console=Console(), exit_on_error=False, print_error=False
            )
        except LineSplit as split:
            assert chosen is not None
            if split.unused_tokens:
                unused = " ".join(split.unused_tokens)
                raise UsageError(f"Unexpected arguments: {unused}.") from None
            return chosen.bind(split.arguments)
        return partial(run, *bound.args, **bound.kwargs)  # prints the help

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
        root["--help"].group = root["--version"].group = Group("Options", sort_key=99)
        names = dict.fromkeys(command.group for command in self.commands.values())
        groups = {name: Group(name, sort_key=number) for number, name in enumerate(names)}
        for number, command in enumerate(self.commands.values()):
            app = command.app if command is chosen else App(name=command.name)
            app.help = command.summary if command is not chosen else None
            app.help_epilogue = _show_examples(command.examples)
            app.help_formatter = _HelpFormatter(command)
            app.group = groups[command.group]
            app.sort_key = number
            root.command(app)
        return root


def _prepare(command: Command, words: Sequence[str]) -> list[str]:
    """Refuse unknown flags, and join a value that begins with a hyphen to its flag.

    It is done before the parser could miss an argument because of a misspelled flag.
    """
    names = (name for argument in command.arguments for name in argument.names)
    known = {*_FLAGS_OF_PROGRAM[:2], *(name for name in names if name.startswith("-"))}
    prepared: list[str] = []
    for number, word in enumerate(words):
        name = word.partition("=")[0].replace("_", "-")
        if word == "--":
            return [*prepared, *words[number:]]
        if word.startswith("-") and " " in name and prepared and prepared[-1] in known:
            prepared[-1] += f"={word}"
            continue
        if name.startswith("--") and " " not in name and name not in known:
            raise UsageError(f"Unknown flag {name}.{did_you_mean(name, sorted(known))}")
        prepared.append(word)
    return prepared


def _show_examples(examples: Sequence[str]) -> str:
    return "\n  ".join(("Examples:" if len(examples) > 1 else "Example:", *examples))


class _HelpFormatter:
    """Prints each group of the help as a title, then names and descriptions in two columns."""

    def __init__(self, command: Command | None = None) -> None:
        self.command = command

    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        if not panel.entries:
            return
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for entry in panel.entries:
            names = [*entry.positive_names, *entry.positive_shorts, entry.metavar]
            if entry.negative_names:
                names = [f"--[no-]{name[2:]}" for name in entry.positive_names]
            label = entry.positional_label or " ".join(filter(None, names))
            shown = console.render(entry.description or "", options.update(width=100_000))
            words = "".join(segment.text for segment in shown).split()
            words += [f"[default: {entry.default}]"] if entry.default is not None else []
            words += [f"[choices: {', '.join(entry.choices)}]"] if entry.choices else []
            text = " ".join(words)
            text = self.command.name_flags(text) if self.command else text
            table.add_row(Text(f"  {label}", style="cyclopts.name"), Text(text))
        console.print(Text(f"{panel.title}:", style="bold"))
        console.print(table)
        console.print()

    def render_usage(
        self,
        console: Console,
        options: ConsoleOptions,  # noqa: ARG002
        usage: Any,
    ) -> None:
        """Print the line that shows how the command is called."""
        if usage:
            shown = str(usage)
            if self.command:
                for argument in self.command.arguments:
                    if argument.is_var_positional():
                        shown = shown.replace("[ARGS...]", f"[{argument.name.upper()}...]")
            console.print(Text(f"Usage: {shown}"))
