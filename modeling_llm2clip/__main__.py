"""`llm2clip`: parse, dispatch, and turn errors into one line and an exit code."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from . import __version__
from .hub.prompt_presets import PROMPT_NAMES

_EXTRAS = 'Install what the demo needs: pip install "modeling_llm2clip[demo]"'
_AFTER_DEMO = """
Use it in Python:

    from sentence_transformers import SentenceTransformer
    import modeling_llm2clip  # lets AutoModel and sentence-transformers know the model

    model = SentenceTransformer("{folder}")
    texts, pictures = model.encode(["a red apple"]), model.encode(["{picture}"])
    print(model.similarity(texts, pictures))
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 for success, 1 for an unhealthy checkpoint, 2 for bad input."""
    arguments = _build_parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except ImportError as error:
        print(f"llm2clip {arguments.command}: {error}. {_EXTRAS}", file=sys.stderr)
        return 2
    except (ValueError, OSError, RuntimeError, ArithmeticError) as error:
        print(f"llm2clip {arguments.command}: {error}", file=sys.stderr)
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
    _add_demo(commands)
    _add_build(commands)
    _add_doctor(commands)
    return parser


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser("demo", help="the whole method on real parts, in minutes")
    demo.add_argument("--output", type=Path, default=Path("llm2clip-demo"))
    demo.add_argument("--vision", help="Hub id or folder of a vision tower")
    demo.add_argument("--llm", help="Hub id, folder or .gguf of a language model; needs --prompt")
    demo.add_argument("--prompt", help="prompt around every caption; see llm2clip build -h")
    demo.add_argument("--pictures", type=Path, help="folder with captions.jsonl")
    demo.add_argument("--caption-adapter", type=Path, help="LoRA of a caption-tuned LLM")
    demo.add_argument("--steps", type=int, default=100)
    demo.add_argument("--batch-size", type=int, default=512)
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(run=_run_demo)


def _add_build(commands: Any) -> None:
    build = commands.add_parser("build", help="put an untrained model together from two towers")
    build.add_argument("vision", help="Hub id or folder of a vision tower")
    build.add_argument("llm", help="Hub id, folder or .gguf file of a language model")
    build.add_argument("output", type=Path, help="folder to write")
    prompt = build.add_argument_group("prompt around every caption (one choice is needed)")
    prompt.add_argument("--prompt", choices=PROMPT_NAMES)
    prompt.add_argument("--prefix", help="text in front of every caption")
    prompt.add_argument("--suffix", help="text behind every caption")
    build.add_argument("--projection-dim", type=int, default=512)
    build.add_argument("--max-text-length", type=int, default=512)
    build.add_argument("--text-pooling", choices=("mean", "last_token"), default="mean")
    build.add_argument("--vision-pooling", choices=("pooler", "cls", "mean"), default="pooler")
    build.add_argument("--text-adapter-layers", type=int, default=4)
    build.add_argument("--visual-projection-bias", action="store_true")
    build.add_argument("--caption-adapter", type=Path, help="LoRA of a caption-tuned LLM")
    build.add_argument("--causal", dest="bidirectional", action="store_false")
    build.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    build.add_argument("--seed", type=int, default=0)
    build.set_defaults(run=_run_build)


def _add_doctor(commands: Any) -> None:
    doctor = commands.add_parser("doctor", help="check a checkpoint from the outside")
    doctor.add_argument("model", help="Hub id or folder")
    doctor.add_argument("--revision")
    doctor.add_argument("--device", default="cpu")
    doctor.set_defaults(run=_run_doctor)


def _run_demo(arguments: argparse.Namespace) -> int:
    from .demo.run import DemoArguments, run_demo

    report = run_demo(_pick(DemoArguments, arguments))
    output = arguments.output.resolve()
    print(json.dumps(report, indent=2))
    for name in ("model", "search.png", "search.html", "report.json"):
        print(f"{name:12} {output / name}")
    print(_AFTER_DEMO.format(folder=output / "model", picture=output / "search.png"))
    return 0


def _run_build(arguments: argparse.Namespace) -> int:
    import torch

    from .hub.build import BuildArguments, build_from_sources
    from .hub.export import export_model, require_new_folder

    require_new_folder(arguments.output)  # before the towers are loaded
    model, processor = build_from_sources(
        arguments.vision,
        arguments.llm,
        _pick(BuildArguments, arguments),
        dtype=getattr(torch, arguments.dtype),
        caption_adapter=arguments.caption_adapter,
    )
    folder = export_model(model, processor, arguments.output)
    print(f"Wrote {folder}. Adapter and projections are random: align it before use.")
    return 0


def _run_doctor(arguments: argparse.Namespace) -> int:
    from .hub.doctor import diagnose

    diagnosis = diagnose(arguments.model, revision=arguments.revision, device=arguments.device)
    print(diagnosis.report())
    return 0 if diagnosis.healthy else 1


def _pick(arguments_class: Any, namespace: argparse.Namespace) -> Any:
    """Hand a dataclass those parsed arguments that it has fields for."""
    parsed = vars(namespace)
    return arguments_class(**{f.name: parsed[f.name] for f in fields(arguments_class)
                              if f.name in parsed})  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
