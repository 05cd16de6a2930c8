"""Ours, an ordinary CLIP, and every other type of encoder in one table.

    llm2clip demo && python -m benchmarks.accuracy.evaluation_table llm2clip-demo/model

- Ours and an ordinary CLIP with a small text transformer have the same frozen vision tower, see the
  same images and texts in the same batches, and are measured on the emoji that neither saw. As
  the ordinary CLIP begins from nothing, it is also trained for more steps (`--steps`).
- `--long-captions` asks the text encoders alone, without images: the first half of a caption
  looks for its second half, by length, and (`cra`) one caption of an image for its other one. Ours
  is there twice: as it is, and with every text truncated to the limit of a 77-token encoder.
- CLIP, SigLIP2, the layout of EVA02-CLIP and sentence-transformers go through the same code with
  tiny random weights: such a row shows the path, not a score.

With `--work` a stopped run goes on: nothing is trained or measured twice.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel

from benchmarks.accuracy.ordinary_clip import (
    OrdinaryClipConfig,
    build_ordinary_clip,
    encode_tower,
    save_ordinary_clip,
    train_ordinary_clip,
)
from benchmarks.shared.provenance import describe_run
from modeling_llm2clip.building.pretrained_towers import EFFICIENTNET, fetch_tower
from modeling_llm2clip.configs.evaluation_config import (
    EvaluatedDataset,
    EvaluatedModel,
    EvaluationConfig,
)
from modeling_llm2clip.configuration_llm2clip import LLM2CLIPConfig
from modeling_llm2clip.demo.run_demo import split_emoji
from modeling_llm2clip.evaluation.evaluate import evaluate
from modeling_llm2clip.evaluation.report import render_results
from modeling_llm2clip.evaluation.results import Result
from modeling_llm2clip.processing_llm2clip import LLM2CLIPProcessor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "helpers"))
from tiny_encoders import save_tiny_encoder

OURS, OURS_CUT = "ours", "ours, cut at 77 tokens"
TINY_LABEL = "tiny random weights: shows the path, not a score"
_TINY_DUAL = {
    "clip": "CLIP, tiny and random",
    "siglip2": "SigLIP2, tiny and random",
    "open_clip": "EVA02-CLIP's layout in open_clip and timm, tiny and random",
}
_TINY_TEXT = {"sentence-transformers": "sentence-transformers, tiny and random"}
TEXT_ONLY = "texts alone: no image is used"


def main() -> None:
    """Train the baselines, evaluate all, and write the table's numbers."""
    arguments = _parse()
    started = time.monotonic()
    work = arguments.work or Path(tempfile.mkdtemp())
    captions = None
    if arguments.long_captions is not None:
        captions = _read_captions(arguments.long_captions)[: arguments.most_captions]
    training: dict[str, Any] = {}
    models = [EvaluatedModel(source=str(arguments.model), name=OURS)]
    for name, folder, trained in _train_baselines(arguments, work):
        models.append(EvaluatedModel(source=str(folder), name=name))
        training[name] = trained
    tiny_dual, tiny_text = (_save_tiny(names, work) for names in (_TINY_DUAL, _TINY_TEXT))
    rows = _evaluate(
        [*models, *tiny_dual],
        EvaluatedDataset(name="emoji"),
        task="cross-lingual",
        work=work / "emoji",
        languages=tuple(arguments.languages),
    )
    if captions is not None:
        short = _truncate(arguments.model, work / "ours-cut")
        models.insert(1, EvaluatedModel(source=str(short), name=OURS_CUT))
        rows += _evaluate_texts(arguments, models, [*tiny_dual, *tiny_text], captions, work)
    record = {
        "command": _command(arguments),
        **describe_run(
            "torch", "transformers", "timm", "open_clip_torch", threads=torch.get_num_threads()
        ),
        "seconds": round(time.monotonic() - started),
        "long_captions": None
        if captions is None
        else f"{sum(map(len, captions)):,} captions of {arguments.long_name}",
        "training": training,
        "tiny": {"models": [m.name for m in (*tiny_dual, *tiny_text)], "label": TINY_LABEL},
        "results": rows,
    }
    arguments.output.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", "utf-8")
    print(f"Wrote {arguments.output} after {record['seconds']} s; details are in {work}.")


def _evaluate(
    models: Sequence[EvaluatedModel],
    data: EvaluatedDataset,
    *,
    task: str,
    work: Path,
    **choices: Any,
) -> list[dict[str, Any]]:
    """Run one task as `llm2clip evaluate` does; returns the rows of the record."""
    started = time.monotonic()
    config = EvaluationConfig(output=work, **choices)

    def show(result: Result) -> None:
        print(
            f"[{time.monotonic() - started:.0f} s] {result.task}: {result.model}, "
            f"{result.seconds:.0f} s",
            file=sys.stderr,
        )

    results = evaluate(models, data, config, tasks=(task,), on_result=show)
    print(render_results(results, style="markdown"))
    return [_summarize(result) for result in results]


def _evaluate_texts(
    arguments: argparse.Namespace,
    models: Sequence[EvaluatedModel],
    tiny: Sequence[EvaluatedModel],
    captions: Sequence[Sequence[str]],
    work: Path,
) -> list[dict[str, Any]]:
    """Ask the text encoders alone: half to half by length, and caption to caption."""
    singles = [[caption] for of_image in captions for caption in of_image]
    pairs = [of_image for of_image in captions if len(of_image) > 1]
    rows = _evaluate(
        models, _write_data(singles, work / "singles"),
        task="length", work=work / "length", captions_only=True,
    )  # fmt: skip
    if len(pairs) > 1:
        rows += _evaluate(
            [*models, *tiny], _write_data(pairs, work / "pairs"),
            task="cra", work=work / "cra", captions_only=True,
        )  # fmt: skip
    else:
        print(f"{len(pairs)} images have two captions: there is nothing to ask cra.")
    return [{**row, "dataset": arguments.long_name, "shown": TEXT_ONLY} for row in rows]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("model", type=Path, help="model folder that llm2clip demo wrote")
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 300], help="of the baseline")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--long-captions", type=Path, help="JSON lines with captions")
    parser.add_argument("--long-name", default="the long captions given", help="public name")
    parser.add_argument(
        "--most-captions", type=int, help="of images with long captions, the first; default: all"
    )
    parser.add_argument("--most-images", type=int, help="to train on; for a quick try")
    parser.add_argument("--languages", nargs="+", default=[], help="for a quick try; default: all")
    parser.add_argument("--work", type=Path, help="folder of models and results; kept")
    results = Path(__file__).parents[1] / "results"
    parser.add_argument("--output", type=Path, default=results / "evaluation.json")
    return parser.parse_args()


def _train_baselines(arguments: argparse.Namespace, work: Path) -> Any:
    """Yield name, folder and record of the training: one baseline per number of steps."""
    chosen = list(islice(split_emoji(seed=0)[0], arguments.most_images))
    tower = AutoModel.from_pretrained(fetch_tower(EFFICIENTNET)).timm_model
    features = None
    for steps in arguments.steps:
        settings = OrdinaryClipConfig(steps=steps, batch_size=arguments.batch_size)
        name, folder = f"ordinary CLIP, {steps} steps", work / f"ordinary-clip-{steps}"
        record, expected = folder / "training.json", {**asdict(settings), "images": len(chosen)}
        if record.is_file():
            trained = json.loads(record.read_text("utf-8"))
            if {key: trained[key] for key in expected} != expected:
                raise ValueError(f"{folder} was trained otherwise. Name another --work.")
            yield name, folder, trained
            continue
        model = build_ordinary_clip(tower, settings)
        features = encode_tower(model, chosen) if features is None else features
        started = time.monotonic()
        losses = train_ordinary_clip(model, chosen, features, settings)
        trained = {
            **expected,
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "final_loss": round(losses[-1], 4),
            "seconds": round(time.monotonic() - started),
        }
        save_ordinary_clip(model, folder, settings)
        record.write_text(json.dumps(trained, indent=2), "utf-8")
        yield name, folder, trained


def _save_tiny(names: dict[str, str], work: Path) -> list[EvaluatedModel]:
    choices = []
    for model_type, name in names.items():
        folder = work / "tiny" / model_type
        shutil.rmtree(folder, ignore_errors=True)  # the same weights every time
        folder.parent.mkdir(parents=True, exist_ok=True)
        choices.append(EvaluatedModel(source=str(save_tiny_encoder(model_type, folder)), name=name))
    return choices


def _truncate(model: Path, folder: Path) -> Path:
    """Link the model once more, with texts truncated where a 77-token encoder truncates them.

    That sees 75 tokens of a text; the prompt, which a CLIP has not, is not charged for.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = LLM2CLIPConfig.from_pretrained(model)
    prompt = len(config.prompt_prefix_ids) + len(config.prompt_suffix_ids)
    changed = {}
    for file in sorted(path for path in model.iterdir() if path.is_file()):
        if file.suffix == ".json" and '"max_text_length"' in file.read_text("utf-8"):
            content = {**json.loads(file.read_text("utf-8")), "max_text_length": prompt + 75}
            (folder / file.name).write_text(json.dumps(content, indent=2), "utf-8")
            changed[file.name] = content
        else:
            (folder / file.name).symlink_to(file.resolve())
    if LLM2CLIPProcessor.from_pretrained(folder).max_text_length != prompt + 75:
        raise ValueError(
            f"Texts are not truncated: max_text_length was changed in {sorted(changed)}."
        )
    return folder


def _read_captions(file: Path) -> list[list[str]]:
    """The captions of each image of a file of JSON lines."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["captions"] for line in lines]


def _write_data(captions: Sequence[Sequence[str]], folder: Path) -> EvaluatedDataset:
    """Write captions as data of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"image": f"{number}.png", "captions": list(texts)}, ensure_ascii=False)
        for number, texts in enumerate(captions)
    ]
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return EvaluatedDataset(name="folder", folder=str(folder))


def _summarize(result: Result) -> dict[str, Any]:
    """The result but for the intervals of every language and where the model lay."""
    scores: dict[str, Any] = dict(result.scores)
    if "languages" in scores:
        scores["languages"] = {
            lang: {
                direction: {k: v for k, v in of_direction.items() if k != "intervals"}
                for direction, of_direction in of_language.items()
            }
            for lang, of_language in scores["languages"].items()
        }
    kept = {name: value for name, value in asdict(result).items() if name != "run"}
    return {**kept, "scores": scores}


def _command(arguments: argparse.Namespace) -> str:
    steps = " ".join(map(str, arguments.steps))
    long = ""
    if arguments.long_captions is not None:
        long = f" --long-captions … --long-name {arguments.long_name!r}"
        if arguments.most_captions is not None:
            long += f" --most-captions {arguments.most_captions}"
    return f"python -m benchmarks.accuracy.evaluation_table … --steps {steps}{long}"


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
