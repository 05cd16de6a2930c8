"""Turns typed functions into commands with cyclopts: arguments, flags, help and suggestions.

Positional-only parameters are the arguments, keyword-only ones the flags. A parameter whose type is
a config becomes one flag per field. Every flag has the name of its field: `--max-steps` is
`max_steps` in Python, in YAML and in messages.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import cyclopts
from cyclopts import (
    App,
    ArgumentCollection,
    CycloptsError,
    Group,
    MissingArgumentError,
    Parameter,
    ValidationError,
)
from rich.console import Console, ConsoleOptions
from rich.table import Column, Table
from rich.text import Text

from .._suggestions import is_unicode
from ..configs.config_fields import Config, DeviceConfig, get_reason, read_yaml

if TYPE_CHECKING:
    from cyclopts.help import HelpPanel

# Annotates a flag that takes one value per use, so arguments can follow it.
Repeated = Parameter(consume_multiple=False)
_FILE_HELP = (
    "YAML file with options, named like the flags but with underscores. Flags on the command line "
    "override it. Default: none."
)
_OptionsFile = Annotated[Path | None, Parameter(name="--config", help=_FILE_HELP)]


_GROUPS = {
    name: Group(name, sort_key=number)
    for number, name in enumerate(("Use", "Train", "Publish", "Other"))
}


class UsageError(ValueError):
    """An invalid command line; the message is one line."""


class HelpFormatter:
    """Prints the groups of a help text: a title, then names and descriptions in two columns.

    `sections` splits the flags of a config into groups: title → fields.
    """

    def __init__(self, sections: Mapping[str, Sequence[str]] | None = None) -> None:
        self.sections = sections or {}

    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        """Print a group, split into sections if there are any."""
        titles = {f"--{name.replace('_', '-')}": title
                  for title, names in self.sections.items() for name in names}  # fmt: skip
        rows: dict[str, list[tuple[str, str]]] = {title: [] for title in self.sections}
        ranks = {flag: rank for rank, flag in enumerate(titles)}
        for entry in sorted(
            panel.entries, key=lambda entry: ranks.get("".join(entry.positive_names), len(ranks))
        ):
            names = [*entry.positive_names, *entry.positive_shorts, entry.metavar]
            if entry.negative_names:
                names = [f"--[no-]{name[2:]}" for name in entry.positive_names]
            label = entry.positional_label or " ".join(filter(None, names))
            description = console.render(entry.description or "", options.update(width=100_000))
            words = "".join(segment.text for segment in description).split()
            words += [f"[default: {entry.default}]"] if entry.default is not None else []
            words += [f"[choices: {', '.join(entry.choices)}]"] if entry.choices else []
            title = titles.get("".join(entry.positive_names), str(panel.title))
            rows.setdefault(title, []).append((f"  {label}", " ".join(words)))
        for title, pairs in rows.items():
            table = Table.grid(Column(no_wrap=True), Column(overflow="fold"), padding=(0, 2, 0, 0))
            for label, text in pairs:
                table.add_row(Text(label, style="cyclopts.name"), Text(text))
            console.print(Text(f"{title}:", style="bold"), table, Text(), sep="\n")

    def render_usage(self, console: Console, options: ConsoleOptions, usage: Any) -> None:  # noqa: ARG002
        console.print(Text(f"Usage: {usage}\n"))


def command(
    *, group: str, examples: Sequence[str], sections: Mapping[str, Sequence[str]] | None = None
) -> Callable[[Callable[..., int | None]], App]:
    """Turn a function into a command. The function returns the exit code, or None for 0.

    Args:
        group: Title under which the program's help lists the command: Use, Train, Publish or Other.
        examples: Command lines, starting with `llm2clip`, shown at the end of the command's help.
        sections: Titles under which the help lists the fields of the parameter `config`; None for
            a single title.
    """

    def make(function: Callable[..., int | None]) -> App:
        app = App(
            name=function.__name__.replace("_", "-"),
            group=_GROUPS[group],
            help_epilogue=_show_examples(examples),
            default_parameter=_ALL_FLAGS,
            group_parameters=Group("Options", sort_key=0),
            version_flags=(),
        )
        app.default(_spread_configs(function, HelpFormatter(sections)))
        return app

    return make


def make_line(
    commands: Sequence[App], *, description: str, version: str, examples: Sequence[str]
) -> App:
    """Combine commands into one program, whose help lists them in this order."""
    line = App(
        name="llm2clip",
        help=description,
        help_epilogue=_show_examples(examples),
        help_format="plaintext",
        help_formatter=HelpFormatter(),
        version=version,
        config=_prepare,
    )
    line["--help"].group = line["--version"].group = Group("Options", sort_key=99)
    for number, app in enumerate(commands):
        app.sort_key = number
        line.command(app)
    return line


def parse(line: App, words: Sequence[str]) -> partial[int | None]:
    """Parse a command line, without the program name, into a call of its command."""
    for name in line:  # cyclopts would parse every docstring to list the commands
        summary = str(line[name].default_command.__doc__).partition("\n")[0]
        if not name.startswith("-"):
            line[name].help = None if name in words[:1] else summary
    try:
        if foreign := [word for word in words if not is_unicode(word)]:
            raise ValueError(
                f"{foreign[0]!a} is not UTF-8. Rename the file, or pass a link with a UTF-8 name."
            )
        function, bound, _ = line.parse_args(
            words,
            console=Console(),  # reads the terminal's width when it is created
            exit_on_error=False,
            print_error=False,
        )
        for flag, word in pairwise(words):
            is_value = flag[:2] == "--" != flag and word.lower() in ("true", "false")
            if is_value and word in map(str, bound.args):  # str, because it may be a Path
                raise ValueError(f"{flag} takes no value, so {word} would be read as an argument.")
    except (CycloptsError, OSError, ValueError) as error:
        app = line[words[0]] if words and words[0] in line else line
        example = str(app.help_epilogue).splitlines()[1].strip()
        raise UsageError(
            f"{_name_file(error)}{_describe_error(error)} For example: {example}"
        ) from None
    bound.apply_defaults()
    return partial(function, *bound.args, **bound.kwargs)


def _show_examples(examples: Sequence[str]) -> str:
    return "\n  ".join(("Examples:" if len(examples) > 1 else "Example:", *examples))


def _name_file(error: Exception) -> str:
    """Return the `--config` file that contains the wrong value; empty if a flag has the value."""
    argument = getattr(error, "argument", None)
    tokens = getattr(argument, "tokens", None) or [getattr(error, "token", None)]
    source: str = getattr(tokens[0], "source", "")
    return f"{source}: " if source not in ("", "cli") else ""


def _describe_error(error: Exception) -> str:
    if isinstance(error, ValidationError) and error.argument is not None:
        causes: Any = getattr(error.__cause__, "errors", list)()  # of pydantic
        reasons = "; ".join(map(get_reason, causes)) or error.exception_message
        return f"{error.argument.name} {error.argument.value!r}: {reasons}."
    if isinstance(error, CycloptsError):
        error.verbose = False
    message = " ".join(str(error).split())
    if isinstance(error, MissingArgumentError) and (flag := error.keyword):
        return f"{message} If the value begins with a hyphen, use {flag}=VALUE."
    return message


def _spread_configs(
    function: Callable[..., int | None], formatter: HelpFormatter
) -> Callable[..., int | None]:
    """Add a flag for each field of a command's configs, and `--config` for a file of options."""
    hints = get_type_hints(function, include_extras=True)
    parameters = []
    for name, parameter in inspect.signature(function).parameters.items():
        hint, default = hints[name], parameter.default
        if isinstance(hint, type) and issubclass(hint, Config):
            hint, default = _annotate(hint, formatter if name == "config" else None), hint()
        parameters.append(parameter.replace(annotation=hint, default=default))
    if all(parameter.annotation is hints[parameter.name] for parameter in parameters):
        return function
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters.append(
        inspect.Parameter("options_file", keyword, default=None, annotation=_OptionsFile)
    )

    @wraps(function)
    def call(*arguments: Any, options_file: Path | None = None, **flags: Any) -> int | None:  # noqa: ARG001
        return function(*arguments, **flags)

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


def _annotate(config_type: type[Config], formatter: HelpFormatter | None) -> Any:
    """Annotate a config so its fields become flags with their own group in the help."""
    for name in config_type.without_flags:
        hint = get_type_hints(config_type, include_extras=True)[name]
        config_type.__annotations__[name] = Annotated[hint, Parameter(parse=False)]
    if config_type is DeviceConfig:
        return Annotated[config_type, Parameter(name="*")]
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", config_type.__name__.removesuffix("Config"))
    group = Group(f"{words.capitalize()} options", help_formatter=formatter)
    return Annotated[config_type, Parameter(name="*", group=group)]


def _prepare(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Take values of flags that are not on the command line from the `--config` file."""
    for argument in arguments:
        if argument.children:  # cyclopts resolves names in the class's module, not in its bases'
            config_type = argument.resolved_hint
            config_type.__init__.__annotations__ = get_type_hints(config_type, include_extras=True)
        if argument.name == "--config" and argument.tokens:
            from cyclopts.config import Dict

            file = argument.tokens[0].value
            values = read_yaml(file)
            if "config" in values:
                raise ValueError(f"{file}: config is not an option. Put all options in one file.")
            negatives = {name for flag in arguments for name in flag.negatives}
            for name, value in values.items():
                if f"--{str(name).replace('_', '-')}" in negatives:
                    raise ValueError(f"{file}: {name} is not an option. Use {name[3:]}: false.")
                if isinstance(value, list) and all(isinstance(item, list) for item in value):
                    values[name] = [*chain(*value)]  # flatten pairs into words
            # Nested under the command: a top-level key with a command's name is not an option.
            Dict({commands[0]: values}, source=file)(app, commands, arguments)


def _convert(hint: Any, tokens: Any) -> Any:
    """Convert words as cyclopts does, but reject 3.5 for an integer: cyclopts would round it.

    An empty path is also rejected, because it would mean the working directory.
    """
    import pydantic  # noqa: F401  # once imported, cyclopts validates annotations with it

    types = (hint, *get_args(hint))
    decimals = [token.value for token in tokens if "." in token.value]
    if decimals and int in (*types, *chain(*map(get_args, types))):  # or list items
        raise ValueError(f"{decimals[0]} is not an integer.")
    if Path in types and any(not token.value.strip() for token in tokens):
        raise ValueError("the path is empty. Use a dot for the working directory.")
    return cyclopts.convert(hint, tokens)


def _show_default(value: Any) -> str | None:
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or None
    return None if value is None else str(value)


_ALL_FLAGS = Parameter(
    consume_multiple=True,
    converter=_convert,
    json_dict=False,
    json_list=False,
    negative_iterable=(),
    negative_none=(),
    show_default=_show_default,
)
