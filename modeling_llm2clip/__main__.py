"""`llm2clip`: parse, dispatch, and turn errors into one line and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from safetensors import SafetensorError

from . import __version__
from ._extras import MissingExtraError
from .cli import (
    align,
    build,
    convert,
    demo,
    doctor,
    evaluate,
    export,
    extract,
    search,
    tag,
)
from .cli import (
    finetune_llm as finetune_llm,
)
from .cli.library_warnings import hide_known_warnings
from .cli.parser import Parser, name_flags
from .training.graceful_stop import StageInterrupt

_EXTRAS = 'Install what the commands need: pip install "modeling_llm2clip[all]"'


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 for success, 1 for an unhealthy checkpoint, 2 for bad input.

    A command that SIGINT or SIGTERM stopped in good order returns 130 or 143 itself.
    """
    parser = _build_parser()
    arguments = parser.parse_args(argv)
    hide_known_warnings()
    try:
        return int(arguments.run(arguments))
    except MissingExtraError as error:
        print(f"llm2clip {arguments.command}: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"llm2clip {arguments.command}: {error}. {_EXTRAS}", file=sys.stderr)
        return 2
    except (ValueError, OSError, RuntimeError, ArithmeticError) as error:
        message = name_flags(str(error), parser.commands[arguments.command])
        remedy = _name_remedy_of_device(error)
        print(f"llm2clip {arguments.command}: {message}{remedy}", file=sys.stderr)
        return 2
    except TypeError as error:
        if not (remedy := _name_remedy_of_device(error)):
            raise
        print(f"llm2clip {arguments.command}: {error}{remedy}", file=sys.stderr)
        return 2
    except SafetensorError as error:  # whose only base is Exception
        print(
            f"llm2clip {arguments.command}: a weight file could not be read or written ({error}). "
            "Look for room on the disk; download or save again what is truncated.",
            file=sys.stderr,
        )
        return 2
    except StageInterrupt as error:
        if message := str(error):
            print(f"llm2clip: {message}", file=sys.stderr)
        return 128 + error.signal
    except KeyboardInterrupt:
        print(
            "llm2clip: stopped. What is half written is in no folder that loads.", file=sys.stderr
        )
        return 130


def _name_remedy_of_device(error: Exception) -> str:
    """Return what to do about a device that is too small, or that lacks a dtype or an operation."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's
        return " Give a smaller --batch-size or --mini-batch-size if there is one, or --device cpu."
    if "MPS" in str(error):  # which has no float64, and not every operation
        return " The device mps cannot compute this. Give --device cpu."
    return ""


def _build_parser() -> Parser:
    parser = Parser(
        "llm2clip",
        description="CLIP with an LLM as text encoder",
        examples=("llm2clip demo", "llm2clip build --help"),
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (
        demo, build, convert, finetune_llm, extract, align, evaluate, search, tag, export,
        doctor,
    ):  # fmt: skip
        command.add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
