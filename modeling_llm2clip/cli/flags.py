"""From command lines to calls of commands, and their help."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from cyclopts import App, CycloptsError, Group
from cyclopts.help import HelpPanel
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

from .._suggestions import did_you_mean
from .command import Command, LineSplit, UsageError, describe_error

_FLAGS_OF_PROGRAM = ("--help", "-h", "--version")


class CommandLine:
    """A program of several commands.

    Its help lists the commands in their order, between `description` and `examples` of command
    lines.
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
        """Read a command line, without the name of the program."""
        chosen = self.find_command(words)
        try:
            return self._parse_with(chosen, words)
        except (UsageError, CycloptsError) as error:
            message = describe_error(error) if isinstance(error, CycloptsError) else str(error)
            example = (chosen or self).examples[0]
            raise UsageError(f"{message} For example: {example}") from None

    def find_command(self, words: Sequence[str]) -> Command | None:
        """Return the command that a command line is for; None for `--help` and the like."""
        return self.commands.get(words[0]) if words else None

    def _parse_with(self, chosen: Command | None, words: Sequence[str]) -> partial[int | None]:
        words = _prepare(chosen, words) if chosen else self._require_words(words)
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

    def _require_words(self, words: Sequence[str]) -> Sequence[str]:
        """Return the words, unless there are none or they begin with an unknown flag."""
        if not words:
            raise UsageError(f"Name a command, one of {', '.join(self.commands)}.")
        if words[0].startswith("-") and words[0] not in _FLAGS_OF_PROGRAM:
            raise UsageError(f"Unknown flag {words[0]}.{did_you_mean(words[0], _FLAGS_OF_PROGRAM)}")
        return words

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
    known = {*_FLAGS_OF_PROGRAM[:2], *(name for a in command.arguments for name in a.names)}
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
