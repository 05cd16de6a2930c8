"""`llm2clip`: parse, dispatch, and turn errors into one line and an exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from safetensors import SafetensorError

from . import __version__
from ._extras import MissingExtraError
from .commands import (
    align,
    build,
    convert,
    demo,
    doctor,
    evaluate,
    export,
    extract,
    search,
    tune_captions,
)
from .commands.library_warnings import hide_known_warnings

_EXTRAS = 'Install what the commands need: pip install "modeling_llm2clip[all]"'


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 for success, 1 for an unhealthy checkpoint, 2 for bad input.

    A command that SIGINT or SIGTERM stopped in good order returns 130 or 143 itself.
    """
    arguments = _build_parser().parse_args(argv)
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
        print(f"llm2clip {arguments.command}: {error}", file=sys.stderr)
        return 2
    except SafetensorError as error:  # whose only base is Exception
        print(
            f"llm2clip {arguments.command}: a weight file could not be read or written ({error}). "
            "Look for room on the disk; download or save again what is truncated.",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(
            "llm2clip: stopped. What is half written is in no folder that loads.", file=sys.stderr
        )
        return 130


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("llm2clip", description="CLIP with an LLM as text encoder")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (
        demo, build, convert, tune_captions, extract, align, evaluate, search, export, doctor,
    ):  # fmt: skip
        command.add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
