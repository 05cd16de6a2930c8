"""`llm2clip demo`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .._extras import DEMO, require
from ..configs.build_config import PROMPT_NAMES
from .parser import add_device_flag, choose_device
from .pick import pick

_AFTER_DEMO = """
Use it in Python:

    from sentence_transformers import SentenceTransformer
    import modeling_llm2clip  # lets AutoModel and sentence-transformers know the model

    model = SentenceTransformer("{folder}")
    texts, images = model.encode(["a red apple"]), model.encode(["{image}"])
    print(model.similarity(texts, images))
"""


def add_parser(commands: Any) -> None:
    """Add the command and its flags."""
    demo = commands.add_parser(
        "demo",
        help="the whole method on real parts, in minutes",
        examples=("llm2clip demo --output llm2clip-demo",),
    )
    demo.add_argument("--output", type=Path, default=Path("llm2clip-demo"), help="folder to write")
    demo.add_argument(
        "--vision", help="Hub id or folder of a vision tower; default: the embedded EfficientNet"
    )
    demo.add_argument(
        "--llm",
        help="Hub id, folder or .gguf of a language model, with --prompt; default: the embedded "
        "SmolLM2",
    )
    demo.add_argument(
        "--prompt", choices=PROMPT_NAMES,
        help="prompt around every caption; default: that of the embedded SmolLM2",
    )  # fmt: skip
    demo.add_argument(
        "--images", type=Path, help="folder with captions.jsonl; default: the embedded emoji"
    )
    demo.add_argument(
        "--caption-lora",
        help="LoRA of a caption-tuned LLM: a folder, embedded, or none; default: embedded for the "
        "embedded SmolLM2, none for another LLM",
    )
    demo.add_argument(
        "--accept-lora-base", metavar="NAME",
        help="the LoRA's name for this LLM; default: the LLM's own",
    )  # fmt: skip
    demo.add_argument("--steps", type=int, default=100, help="steps of the alignment")
    demo.add_argument("--batch-size", type=int, default=512, help="images a step")
    demo.add_argument("--seed", type=int, default=0, help="seed of the split and of the alignment")
    add_device_flag(demo)
    demo.set_defaults(run=run)


def _describe(report: dict[str, Any]) -> str:
    """The scores in a few lines; `report.json` has every number."""
    largest = max(report["largest_difference_after_loading"].values())
    return (
        f"{report['num_held_out']} things of {report['num_images']:,} images were held out of "
        "the alignment:\n"
        f"  text to image  R@1 {report['unseen_text_to_image_r1']:.1%}, "
        f"R@10 {report['unseen_text_to_image_r10']:.1%}\n"
        f"  image to text  R@1 {report['unseen_image_to_text_r1']:.1%}\n"
        f"  chance         R@1 {report['chance_r1']:.1%}\n"
        f"Loaded again in a clean process: embeddings at most {largest:.1e} from these.\n"
        f"{report['seconds_after_download']:.0f} s after the download, peak memory "
        f"{report['peak_rss_gb']} GB, last loss {report['final_loss']}."
    )


def run(arguments: argparse.Namespace) -> int:
    """Run it and return the exit code."""
    require(*DEMO)
    from ..building.tower_loading import require_sources

    if arguments.llm is not None and arguments.prompt is None:
        raise ValueError(
            "--llm needs --prompt, because the embeddings depend on it and it is never guessed. "
            f"Give one of {', '.join(PROMPT_NAMES)}."
        )
    if arguments.output.exists() and any(arguments.output.iterdir()):
        raise ValueError(f"{arguments.output} is not empty. Remove it, or name another --output.")
    own_adapter = arguments.caption_lora in (None, "embedded", "none")
    require_sources(
        vision=arguments.vision,
        text=arguments.llm,
        lora=None if own_adapter else arguments.caption_lora,
    )
    arguments.device = str(choose_device(arguments))

    from ..demo.run_demo import DemoArguments, run_demo

    report = run_demo(pick(DemoArguments, arguments))
    output = arguments.output.resolve()
    print(_describe(report))
    for name in ("model", "search.png", "search.html", "report.json"):
        print(f"{name:12} {output / name}")
    print(_AFTER_DEMO.format(folder=output / "model", image=output / "search.png"))
    return 0
