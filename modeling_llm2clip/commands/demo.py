"""`llm2clip demo`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .._extras import DEMO, require
from .pick import pick

_AFTER_DEMO = """
Use it in Python:

    from sentence_transformers import SentenceTransformer
    import modeling_llm2clip  # lets AutoModel and sentence-transformers know the model

    model = SentenceTransformer("{folder}")
    texts, pictures = model.encode(["a red apple"]), model.encode(["{picture}"])
    print(model.similarity(texts, pictures))
"""


def add_parser(commands: Any) -> None:
    """Add the command and its flags."""
    demo = commands.add_parser("demo", help="the whole method on real parts, in minutes")
    demo.add_argument("--output", type=Path, default=Path("llm2clip-demo"))
    demo.add_argument("--vision", help="Hub id or folder of a vision tower")
    demo.add_argument("--llm", help="Hub id, folder or .gguf of a language model; needs --prompt")
    demo.add_argument("--prompt", help="prompt around every caption; see llm2clip build -h")
    demo.add_argument("--pictures", type=Path, help="folder with captions.jsonl")
    demo.add_argument(
        "--caption-adapter", help="LoRA of a caption-tuned LLM: a folder, embedded, or none"
    )
    demo.add_argument("--accept-adapter-base", metavar="NAME", help="the LoRA's name for this LLM")
    demo.add_argument("--steps", type=int, default=100)
    demo.add_argument("--batch-size", type=int, default=512)
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run it and return the exit code."""
    require(*DEMO)
    from ..demo.run import DemoArguments, run_demo

    report = run_demo(pick(DemoArguments, arguments))
    output = arguments.output.resolve()
    print(json.dumps(report, indent=2))
    for name in ("model", "search.png", "search.html", "report.json"):
        print(f"{name:12} {output / name}")
    print(_AFTER_DEMO.format(folder=output / "model", picture=output / "search.png"))
    return 0
