"""Ours beside an ordinary CLIP with a small text transformer, on the embedded emoji.

    llm2clip demo && python benchmarks/evaluation_table.py llm2clip-demo/model

Both have the same frozen vision tower, see the same pictures and texts in the same number of steps
and batch size, and are measured by `llm2clip evaluate`: retrieval on the emoji that neither saw,
in English and in the languages that neither was trained on. As the ordinary CLIP begins from
nothing, it is also trained for more steps. `--long-captions` adds a question to the text encoders
alone: the first half of a long caption looks for its second half, by length.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from ordinary_clip import (
    OrdinaryClipArguments,
    build_ordinary_clip,
    encode_tower,
    save_ordinary_clip,
    train_ordinary_clip,
)
from provenance import describe_processor, read_commit
from transformers import AutoModel

from modeling_llm2clip.data.splits import hold_out
from modeling_llm2clip.demo.real_parts import EFFICIENTNET, fetch_real_part
from modeling_llm2clip.demo.run import DemoArguments, read_pictures
from modeling_llm2clip.evaluation.arguments import DataChoice, EvaluationArguments, ModelChoice
from modeling_llm2clip.evaluation.encoders.encoder import EncoderSettings
from modeling_llm2clip.evaluation.evaluate import evaluate
from modeling_llm2clip.evaluation.plots import plot_lengths
from modeling_llm2clip.evaluation.results import Result
from modeling_llm2clip.evaluation.tables import render_results

OURS = "ours"


def main() -> None:
    """Train the baselines, evaluate all, and write the table's numbers."""
    arguments = _parse()
    started = time.monotonic()
    work = arguments.work or Path(tempfile.mkdtemp())
    long_data = None
    if arguments.long_captions is not None:
        long_data = _shorten(arguments.long_captions, work / "long", arguments.most_captions)
    models = [ModelChoice(str(arguments.model), OURS)]
    training: dict[str, Any] = {}
    for name, folder, trained in _train_baselines(arguments, work):
        models.append(ModelChoice(str(folder), name))
        training[name] = trained
    settings = EncoderSettings(show_progress=True)
    results = evaluate(
        EvaluationArguments(
            models=tuple(models),
            data=(DataChoice("emoji"),),
            tasks=("cross-lingual",),
            languages=tuple(arguments.languages),
            output=work / "emoji",
            encoder=settings,
        )
    )
    if long_data is not None:
        results += evaluate(
            EvaluationArguments(
                models=tuple(models),
                data=(DataChoice("folder", str(long_data)),),
                tasks=("length",),
                captions_only=True,
                output=work / "length",
                encoder=settings,
            )
        )
        plot_lengths([r for r in results if r.task == "length"], work / "lengths.png")
    print(render_results(results, style="markdown"))
    record = {
        "command": _command(arguments),
        "commit": read_commit(),
        "hardware": f"{describe_processor()}, {platform.machine()}, {torch.get_num_threads()} "
        "threads",
        "versions": {
            name: version(name) for name in ("torch", "transformers", "timm", "open_clip_torch")
        },
        "seconds": round(time.monotonic() - started),
        "long_captions": None
        if long_data is None
        else f"the first {arguments.most_captions} captions of {arguments.long_name}",
        "training": training,
        "results": [_summarize(result) for result in results],
    }
    arguments.output.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", "utf-8")
    print(f"Wrote {arguments.output} after {record['seconds']} s; details are in {work}.")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="what llm2clip demo wrote")
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 300], help="of the baseline")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--long-captions", type=Path, help="JSON lines with captions")
    parser.add_argument("--long-name", default="the long captions given", help="public name")
    parser.add_argument("--most-captions", type=int, default=400, help="of the long ones")
    parser.add_argument("--most-pictures", type=int, help="to train on; for a quick try")
    parser.add_argument("--languages", nargs="+", default=[], help="for a quick try; default: all")
    parser.add_argument("--work", type=Path, help="folder of models and results; kept")
    results = Path(__file__).parent / "results"
    parser.add_argument("--output", type=Path, default=results / "evaluation.json")
    return parser.parse_args()


def _train_baselines(arguments: argparse.Namespace, work: Path) -> Any:
    """Yield name, folder and what was done, one baseline a number of steps."""
    records, _ = read_pictures(DemoArguments(output=work / "nothing-is-written-here"))
    held_out = hold_out(records, seed=0)
    chosen = [record for record in records if record.key not in held_out]
    chosen = list(islice(chosen, arguments.most_pictures))
    tower = AutoModel.from_pretrained(fetch_real_part(EFFICIENTNET)).timm_model
    features = None
    for steps in arguments.steps:
        settings = OrdinaryClipArguments(steps=steps, batch_size=arguments.batch_size)
        name = f"ordinary CLIP, {steps} steps"
        model = build_ordinary_clip(tower, settings)
        features = encode_tower(model, chosen) if features is None else features
        started = time.monotonic()
        losses = train_ordinary_clip(model, chosen, features, settings)
        trained = {
            **asdict(settings),
            "pictures": len(chosen),
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "final_loss": round(losses[-1], 4),
            "seconds": round(time.monotonic() - started),
        }
        yield name, save_ordinary_clip(model, work / f"ordinary-clip-{steps}", settings), trained


def _shorten(source: Path, folder: Path, most: int) -> Path:
    """Write the first captions as data of their own: encoding all may take an hour."""
    lines = source.read_text(encoding="utf-8").splitlines()
    texts = [text for line in lines for text in json.loads(line)["captions"]]
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [
        json.dumps({"image": f"{number}.png", "captions": [text]}, ensure_ascii=False)
        for number, text in enumerate(texts[:most])
    ]
    (folder / "captions.jsonl").write_text("\n".join(chosen) + "\n", encoding="utf-8")
    return folder


def _summarize(result: Result) -> dict[str, Any]:
    """What a table needs, and the protocol, without the intervals of every language."""
    scores: dict[str, Any] = dict(result.scores)
    if "languages" in scores:
        scores["languages"] = {
            lang: {
                direction: {k: v for k, v in of_direction.items() if k != "intervals"}
                for direction, of_direction in of_language.items()
            }
            for lang, of_language in scores["languages"].items()
        }
    return {
        "model": result.model,
        "task": result.task,
        "set": result.set,
        "scores": scores,
        "protocol": {name: result.protocol[name] for name in ("model", "task")},
        "counts": result.counts,
        "seconds": result.seconds,
    }


def _command(arguments: argparse.Namespace) -> str:
    steps = " ".join(map(str, arguments.steps))
    long = ""
    if arguments.long_captions is not None:
        long = f" --long-captions … --long-name {arguments.long_name!r}"
        long += f" --most-captions {arguments.most_captions}"
    return f"python benchmarks/evaluation_table.py … --steps {steps}{long}"


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
