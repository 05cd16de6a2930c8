"""What all commands share: the parser, help with defaults, "did you mean", and one `--device`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .._suggestions import did_you_mean
from ..encoding.devices import DEVICE_NAMES, is_device_name

if TYPE_CHECKING:
    import torch

# Arguments of Python that are not called as their flags' destination.
_OTHER_NAMES = {
    "repo_id": "push",
    "dropout": "lora_dropout",
    "targets": "lora_targets",
}
_GPU_WORDS = {"gpu": "cuda", "metal": "mps", "nvidia": "cuda"}


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows the default of every flag that has one, and leaves the examples as they are."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if not takes_value(action) or "default" in text or default == argparse.SUPPRESS:
            return text
        if default is None or default == []:
            return text
        shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        return f"{text} (default: {shown.replace('%', '%%')})"


class Parser(argparse.ArgumentParser):
    """Takes flags in full only, and names the one that a misspelt word may have meant.

    Args:
        examples: command lines for the end of the help.
    """

    def __init__(self, *args: Any, examples: Sequence[str] = (), **kwargs: Any) -> None:
        self.examples = tuple(examples)
        title = "example" if len(self.examples) == 1 else "examples"
        kwargs = {"allow_abbrev": False, "formatter_class": HelpFormatter, **kwargs}
        kwargs.setdefault("epilog", "\n  ".join((f"{title}:", *examples)) if examples else None)
        super().__init__(*args, **kwargs)

    @property
    def commands(self) -> dict[str, Parser]:
        """The parsers of the commands, by name."""
        groups = (action.choices for action in self._actions
                  if isinstance(action, argparse._SubParsersAction))  # fmt: skip
        return {name: parser for group in groups for name, parser in group.items()}

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse all arguments; an unknown one is an error here, where its flags are known."""
        words = sys.argv[1:] if args is None else [*args]
        self._refuse_unknown_flags(words)
        parsed, unknown = super().parse_known_args(words, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed, unknown

    def _refuse_unknown_flags(self, words: Sequence[str]) -> None:
        """Before argparse could complain of something that is missing because of a misspelling."""
        known = self._option_string_actions
        for word in words:
            flag = word.partition("=")[0]
            if word == "--" or (self._subparsers is not None and not word.startswith("-")):
                return  # no flags of this parser from here on
            if flag.startswith("--") and " " not in flag and flag not in known:
                self.error(f"unknown flag {flag}.{did_you_mean(flag, known)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        choices = [str(choice) for choice in action.choices]
        raise argparse.ArgumentError(
            action,
            f"invalid choice: {value!r}, choose from {', '.join(choices)}."
            f"{did_you_mean(str(value), choices)}",
        )


def takes_value(action: argparse.Action) -> bool:
    """Whether this is a flag with a value, or with a form that turns it off."""
    is_switch = action.nargs == 0 and not isinstance(action, argparse.BooleanOptionalAction)
    return bool(action.option_strings) and not is_switch


def add_device_flag(parser: Any) -> None:
    """Add `--device`, which is the same in every command."""
    parser.add_argument(
        "--device", type=_read_device, default="auto", metavar="DEVICE",
        help=f"where the model runs: {', '.join(DEVICE_NAMES)}; auto: cuda, else mps, else cpu",
    )  # fmt: skip


def _read_device(text: str) -> str:
    if not is_device_name(text):
        meant = _GPU_WORDS.get(text.lower(), text)
        raise argparse.ArgumentTypeError(
            f"{text!r} is no device, choose from {', '.join(DEVICE_NAMES)}."
            f"{did_you_mean(meant, DEVICE_NAMES)}"
        )
    return text


def choose_device(arguments: argparse.Namespace) -> torch.device:
    """Return the device of a command, and print it unless there was nothing to choose.

    Raises:
        ValueError: The device is not there.
    """
    import torch

    from ..encoding.devices import describe_device, find_device, list_devices

    device = find_device(arguments.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # else kernels that libraries bring would run on the first
    had_choice = arguments.device == "auto" and len(list_devices()) > 1
    if device.type != "cpu" or had_choice:
        print(f"Device: {describe_device(device)} (--device {arguments.device}).", file=sys.stderr)
    return device


def name_flags(message: str, parser: argparse.ArgumentParser) -> str:
    """Put a command's flags where an error of the package names arguments of Python.

    `batch_size=1 …` becomes `--batch-size 1 …`, and `batch_size` alone `--batch-size`. A switch
    that turns something off has the opposite sense and is left as it is.
    """
    flags = {
        action.dest: next((o for o in action.option_strings if o.startswith("--")), "")
        for action in parser._actions
        if action.option_strings and not isinstance(action, argparse._StoreFalseAction)
    }
    flags |= {name: flags[dest] for name, dest in _OTHER_NAMES.items() if dest in flags}
    message = re.sub(r"^\w+Arguments: ", "", message)
    message = re.sub(r"\['\w+'(?:, '\w+')*\]", lambda found: _name_list(found[0], flags), message)
    for name in sorted(flags, key=len, reverse=True):
        # Not within a path, a quotation or a longer name.
        message = re.sub(rf"(?<![\w./\\'\"=-]){name}=(?=\S)", f"{flags[name]} ", message)
        if "_" in name:  # else it may be a plain word
            message = re.sub(
                rf"(?<![\w./\\'\"=-]){name}(?![\w/\\'\"(=-]|\.\w)", flags[name], message
            )
    return re.sub(r"(--[\w-]+) \(\1\)", r"\1", message)


def _name_list(shown: str, flags: dict[str, str]) -> str:
    names = re.findall(r"\w+", shown)
    return ", ".join(flags[name] for name in names) if flags.keys() >= set(names) else shown
