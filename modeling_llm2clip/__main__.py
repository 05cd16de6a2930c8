"""The `llm2clip` command: runs subcommands and reports errors on one line."""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Sequence

from safetensors import SafetensorError

from . import __version__
from ._extras import MissingExtraError
from ._library_warnings import hide_known_warnings
from ._suggestions import escape_controls
from .cli.align import align
from .cli.build import build
from .cli.command import UsageError, make_line, parse
from .cli.convert import convert
from .cli.demo import demo
from .cli.doctor import doctor
from .cli.embed import embed
from .cli.env import env
from .cli.evaluate import evaluate
from .cli.export import export
from .cli.extract import extract
from .cli.finetune_llm import finetune_llm
from .cli.index import index
from .cli.options import bound_spinning, hide_library_bars
from .cli.push import push
from .cli.score import score
from .cli.search import search
from .cli.serve import serve
from .cli.tag import tag
from .cli.train import train
from .scheduling.graceful_stop import StageInterrupt

LINE = make_line(
    [
        index, search, tag, score, embed, serve, evaluate, doctor,
        train, build, finetune_llm, extract, align,
        export, push, convert,
        demo, env,
    ],
    description="CLIP with an LLM as its text encoder.",
    version=__version__,
    examples=("llm2clip demo", "llm2clip build --help"),
)  # fmt: skip
FIRST_SCREEN = """\
llm2clip trains and serves LLM2CLIP models: CLIP with an LLM as its text encoder.

Four commands train a model on the folder my-images, which has images and a captions.jsonl:

  llm2clip build embedded embedded my-model
      writes my-model: two small pretrained towers, joined and untrained
  llm2clip extract my-model my-images captions --modality text
      writes captions: the embeddings of the captions
  llm2clip extract my-model my-images images --modality image
      writes images: the embeddings of the images
  llm2clip align my-model my-images aligned --caption-store captions --image-store images
      writes aligned/model: the trained model

Without images of your own: llm2clip demo
All commands: llm2clip --help; options of a command: llm2clip align --help
Documentation in the repository: README.md, docs/index.md; data formats: docs/data-formats.md"""
_EXTRAS = 'Install the packages for all commands: pip install "modeling_llm2clip[all]"'


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments of the command line, without the program's name. Default: `sys.argv[1:]`.

    Returns:
        The exit code: 0 for success, 1 for a model with problems, 2 for an error, 130 after SIGINT
        and 143 after SIGTERM.
    """
    words = sys.argv[1:] if argv is None else [*argv]
    if not words:
        print(FIRST_SCREEN)
        return 0
    name = f"llm2clip {words[0]}" if words and words[0] in LINE else "llm2clip"
    try:
        run = parse(LINE, words)
        bound_spinning()
        hide_known_warnings()
        hide_library_bars(run)
        return run() or 0
    except StageInterrupt as error:
        if message := str(error):  # set only in the main process
            print(f"llm2clip: {message}", file=sys.stderr)
        return 128 + error.signal
    except KeyboardInterrupt:
        print("llm2clip: Interrupted. No partially written folder will load as a model.",
              file=sys.stderr)  # fmt: skip
        return 128 + signal.SIGINT
    except Exception as error:
        described = _describe(error)
        if described is None:  # a bug: show the traceback
            raise
        print(escape_controls(f"{name}: {described}"), file=sys.stderr)
        return 2


def _describe(error: Exception) -> str | None:
    """Return an error's message and remedy; None if the error is a bug in this package."""
    message, remedy = str(error), _name_remedy_of_device(error)
    match error:
        case UsageError() | MissingExtraError():
            return message
        case ImportError():
            return f"{message}. {_EXTRAS}"
        case ValueError() | OSError() | RuntimeError() | ArithmeticError():
            return f"{message}{remedy}"
        case SafetensorError():  # whose only base is Exception
            return (
                f"a weight file could not be read or written ({message}). Check for free disk "
                "space. If the file is truncated, download or save it again."
            )
        case TypeError() if remedy:
            return f"{message}{remedy}"
        case Exception() if type(error).__name__.startswith("StrictDataclass"):  # a tower's config
            return f"{' '.join(message.split())}. Restore the config.json with this field."
    return None


def _name_remedy_of_device(error: Exception) -> str:
    """Return the remedy for a lack of memory, disk space or an mps operation; otherwise ""."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's
        return " Lower --batch-size or --mini-batch-size if there is one, or use --device cpu."
    if isinstance(error, OSError) and (error.errno, error.filename) == (errno.ENOSPC, None):
        return ". Free space on the disk or in /dev/shm, which data loaders fill (--num-workers 0)."
    if "MPS" in str(error):  # it lacks float64 and some operations
        return " The mps device does not support this operation. Use --device cpu."
    return ""


if __name__ == "__main__":
    sys.exit(main())
