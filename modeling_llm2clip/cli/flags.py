"""From command lines to calls of commands; the only file that knows the parser library, cyclopts.

The library sees each command as a function with one keyword per flag: it splits the words,
converts them, and prints the help. Limits, files of options and defaults are `command`'s.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from functools import partial
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from cyclopts import App, CycloptsError, Group, Parameter
from cyclopts.exceptions import MissingArgumentError, UnusedCliTokensError
from cyclopts.help import DescriptionRenderer, HelpPanel
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

from .._suggestions import did_you_mean
from .command import MISSING, Command, Flag, Repeated, UsageError

_FLAGS_OF_PROGRAM = ("--help", "-h", "--version")


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

    def parse(self, words: Sequence[str]) -> partial[int | None]:
        """Read a command line.

        Args:
            words: Without the name of the program.

        Returns:
            The call that runs it, of the command or of what prints help or version.

        Raises:
            UsageError: There is no such command or flag, or a value is not what it may be.
        """
        chosen = self.find_command(words)
        try:
            if chosen is None:
                run, bound, _ = self._parse_with(self._make_app(), _require_words(words, self))
                return partial(run, *bound.args, **bound.kwargs)
            shell = _make_shell(chosen)
            words = [words[0], *_prepare(chosen, words[1:])]
            run, bound, _ = self._parse_with(self._make_app(chosen, shell), words)
            if run is not shell:  # prints the help
                return partial(run, *bound.args, **bound.kwargs)
            arguments = chosen.bind(bound.kwargs)
            return partial(chosen.function, *bound.args, **arguments)
        except UsageError as error:
            example = (chosen or self).examples[0]
            raise UsageError(f"{error} For example: {example}") from None

    def find_command(self, words: Sequence[str]) -> Command | None:
        """Return the command that a command line is for; None for `--help` and the like.

        Args:
            words: Without the name of the program.
        """
        return self.commands.get(words[0]) if words else None

    @staticmethod
    def _parse_with(app: App, words: Sequence[str]) -> tuple[Any, inspect.BoundArguments, Any]:
        try:
            return app.parse_args(words, exit_on_error=False, print_error=False)
        except CycloptsError as error:
            raise UsageError(_describe(error)) from None

    def _make_app(
        self, chosen: Command | None = None, shell: Callable[..., None] | None = None
    ) -> App:
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
            app = App(
                name=command.name,
                help=command.summary,
                help_epilogue=_show_examples(command.examples),
                help_formatter=_HelpFormatter(command.rest),
                group=groups[command.group],
                sort_key=number,
                version_flags=(),
            )
            if command is chosen and shell is not None:
                app.default(shell)
            root.command(app)
        return root


def _require_words(words: Sequence[str], line: CommandLine) -> Sequence[str]:
    """Return the words, unless there are none or they begin with an unknown flag."""
    if not words:
        raise UsageError(f"Name a command, one of {', '.join(line.commands)}.")
    if words[0].startswith("-") and words[0] not in _FLAGS_OF_PROGRAM:
        raise UsageError(f"Unknown flag {words[0]}.{did_you_mean(words[0], _FLAGS_OF_PROGRAM)}")
    return words


def _prepare(command: Command, words: Sequence[str]) -> list[str]:
    """Refuse unknown flags, and join a value that begins with a hyphen to its flag.

    It is done before the parser could miss an argument because of a misspelled flag.
    """
    known = {*_FLAGS_OF_PROGRAM[:2]}.union(*(f.spellings for f in command.flags.values()))
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


def _make_shell(command: Command) -> Callable[..., None]:
    """Make what the parser looks at: the function's arguments, and one keyword for each flag."""

    def shell(*_: Any, **__: Any) -> None:
        """Never called."""

    hints = get_type_hints(command.function)
    parameters = [
        parameter.replace(annotation=hints[name])
        for name, parameter in inspect.signature(command.function).parameters.items()
        if parameter.kind is not parameter.KEYWORD_ONLY
    ]
    names = dict.fromkeys(flag.group for flag in command.flags.values())
    groups = {name: Group(name, sort_key=number) for number, name in enumerate(names)}
    documented = dict(re.findall(r"^ {4}(\w+): (.*)$", _join_lines(command.function), re.MULTILINE))
    for flag in command.flags.values():
        help = command.name_flags(flag.help) or documented.get(flag.name, "")
        parameters.append(_make_parameter(flag, help, groups[flag.group]))
    shell.__name__, shell.__doc__ = command.function.__name__, _join_lines(command.function)
    shell.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    shell.__annotations__ = {p.name: p.annotation for p in parameters}
    return shell


def _join_lines(function: Callable[..., Any]) -> str:
    """Return a docstring with every paragraph and every entry of `Args:` in one line."""
    doc = inspect.getdoc(function) or ""
    return re.sub(r"(?<=\S)\n(?! {4}\w+: )(?! *Args:) *(?=\S)", " ", doc)


def _make_parameter(flag: Flag, help: str, group: Group) -> inspect.Parameter:
    """Make the keyword of a flag; None is its default here, and `bind` knows the real one."""
    hint = _simplify(flag.hint)
    if flag.default is not MISSING and flag.default is not None and flag.default != ():
        help += f" [default: {_show_default(flag.default)}]"
    options: dict[str, Any] = {
        "group": group,
        "negative": None if flag.is_switch else (),
        "consume_multiple": Repeated not in getattr(flag.hint, "__metadata__", ()),
        "show_default": False,
        "help": help,
    }
    if hint is int:
        options["converter"] = _to_int
    return inspect.Parameter(
        flag.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        # Where pydantic is imported, the library checks the default too.
        annotation=Annotated[hint | None, Parameter(**options)],
    )


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


def _show_default(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _show_examples(examples: Sequence[str]) -> str:
    return "\n  ".join(("Examples:" if len(examples) > 1 else "Example:", *examples))


def _describe(error: CycloptsError) -> str:
    """One line for an error of the parser."""
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        name = error.keyword or error.argument.name
        if name.startswith("-"):
            return f"{name} needs a value; one that begins with a hyphen is given as {name}=VALUE."
        return f"{name} is missing."
    if isinstance(error, UnusedCliTokensError):
        return f"Unexpected arguments: {' '.join(error.unused_tokens or ())}."
    return " ".join(str(error).split())


class _HelpFormatter:
    """Prints each group of the help as a title, then names and descriptions in two columns.

    Args:
        rest: Name of the arguments of which there may be any number.
    """

    def __init__(self, rest: str | None = None) -> None:
        self.rest = rest

    def __call__(
        self,
        console: Console,
        options: ConsoleOptions,  # noqa: ARG002
        panel: HelpPanel,
    ) -> None:
        if not panel.entries:
            return
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
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

    def render_usage(
        self,
        console: Console,
        options: ConsoleOptions,  # noqa: ARG002
        usage: Any,
    ) -> None:
        """Print the line that shows how the command is called."""
        if usage:
            shown = str(usage)
            if self.rest is not None:
                shown = shown.replace("[ARGS...]", f"[{self.rest.upper()}...]")
            console.print(Text(f"Usage: {shown}"))
