"""The README's training recipe, word for word, on captioned images that no setting was tuned to.

    python benchmarks/first_run.py openclipart=FOLDER photographs=FOLDER

Each FOLDER is a dataset as the README describes it. A fifth of its images, at most 300, is set
aside before anything else; the commands of the README's recipe run on the rest, in an empty
folder, unchanged. Then the same towers are aligned with other settings, among them the
closed form alone and training from random weights. Every model is asked to find the images that
were set aside. With --existing, the recipe's last command also fine-tunes a model on the same
towers that was trained on other images. Exits with 1 when the recipe reaches less than 0.9 of the
best setting on any dataset.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from provenance import describe_processor, read_commit
from torch import Tensor

from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.encoding.encode import encode_images, encode_texts
from modeling_llm2clip.evaluation.metrics.correspondence import Correspondence
from modeling_llm2clip.evaluation.metrics.ranking import rank_retrieval
from modeling_llm2clip.evaluation.metrics.scores import hit_rate_at
from modeling_llm2clip.modeling_llm2clip import LLM2CLIPModel
from modeling_llm2clip.processing_llm2clip import LLM2CLIPProcessor
from modeling_llm2clip.training.alignment.alignment_model import AlignmentModel
from modeling_llm2clip.training.run_folder import read_results

ROOT = Path(__file__).parents[1]
RECIPE = re.compile(r"<!-- recipe -->\n```bash\n(.*?)```", re.DOTALL)
# What the README calls the user's images and the model that its recipe ends with.
IMAGES, MODEL, ALIGNED = "my-images", "my-model", "aligned"
LEAST_SHARE_OF_BEST = 0.9
MOST_TEST_IMAGES = 300
# Flags of `align` beside the recipe's own.
OTHER_SETTINGS = {
    "closed form alone": ["--max-steps", "1", "--learning-rate", "1e-9"],
    "closed form, trained without noise": ["--image-noise", "0", "--caption-noise", "0"],
    "closed form, trained at 3e-4": ["--learning-rate", "3e-4"],
    "closed form, 1,000 steps": ["--max-steps", "1000"],
    "from random, 300 steps": ["--projection-init", "model"],
    "from random, 1,000 steps": ["--projection-init", "model", "--max-steps", "1000"],
    "from random, 300 steps without noise": [
        "--projection-init", "model", "--image-noise", "0", "--caption-noise", "0",
    ],
}  # fmt: skip


def main() -> int:
    """Run every dataset, write what was measured, and compare with the bar."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("data", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--existing", type=Path, help="such as llm2clip-demo/model; default: none")
    parser.add_argument("--seed", type=int, default=0, help="which images are set aside")
    output = Path(__file__).parent / "results" / "first_run.json"
    parser.add_argument("--output", type=Path, default=output)
    arguments = parser.parse_args()
    measured = {}
    for text in arguments.data:
        name, _, folder = text.partition("=")
        with tempfile.TemporaryDirectory() as scratch:
            measured[name] = run_dataset(
                Path(folder), Path(scratch), seed=arguments.seed, existing=arguments.existing
            )
    record = {
        "commit": read_commit(),
        "hardware": f"{describe_processor()}, {platform.machine()}, {os.cpu_count()} threads",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "modeling_llm2clip")},
        },
        "seed": arguments.seed,
        "recipe": read_recipe(),
        "datasets": measured,
    }
    arguments.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(measured, indent=2))
    missed = [
        name
        for name, found in measured.items()
        if found["recipe_r1"] < LEAST_SHARE_OF_BEST * found["best_r1"]
    ]
    if missed:
        print(f"The recipe reaches less than {LEAST_SHARE_OF_BEST} of the best setting: {missed}")
    return bool(missed)


def read_recipe() -> list[str]:
    """Return the commands of the README's recipe, unchanged."""
    (block,) = RECIPE.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    return [line for line in block.splitlines() if line.strip()]


def run_dataset(source: Path, scratch: Path, *, seed: int, existing: Path | None) -> dict[str, Any]:
    """Run the recipe and the other settings on one dataset.

    Returns: scores of the recipe and of the best setting, chance, the recipe's seconds, and all
        scores by setting. R@1 is the mean of both directions.
    """
    test = set_aside(source, scratch / IMAGES, seed=seed)
    recipe = read_recipe()
    started = time.monotonic()
    for command in recipe:
        run(command, scratch)
    seconds = time.monotonic() - started
    embeds = encode_test_images(scratch / MODEL, test)
    scores = {"README's recipe": score(scratch / ALIGNED / "model", test, embeds)}
    (align,) = [command for command in recipe if " align " in command]
    for number, (name, flags) in enumerate(OTHER_SETTINGS.items()):
        folder = f"{ALIGNED}-{number}"
        command = align.replace(f" {ALIGNED} ", f" {folder} ")
        run(" ".join([command, *flags]), scratch)
        scores[name] = score(scratch / folder / "model", test, embeds)
        print(name, scores[name], flush=True)
    fine_tuned = None
    if existing is not None:
        command = align.replace(f" {ALIGNED} ", " fine-tuned ")
        run(command.replace(f" {MODEL} ", f" {existing.resolve()} "), scratch)
        fine_tuned = {
            "before": score(existing, test, embeds),
            "after": score(scratch / "fine-tuned" / "model", test, embeds),
            "start": read_results(scratch / "fine-tuned")["start"],
        }
    best = max(scores, key=lambda name: scores[name]["r1"])
    results = read_results(scratch / ALIGNED)
    return {
        "recipe_r1": scores["README's recipe"]["r1"],
        "best_r1": scores[best]["r1"],
        "best": best,
        "chance_r1": 1 / len({record.group_id for record in test}),
        "seconds": round(seconds),
        "num_images": len(load_records(scratch / IMAGES)),
        "num_test_images": len(test),
        "start": results["start"],
        "held_out": results["held_out"],
        "scores": scores,
        "existing_model": fine_tuned,
    }


def set_aside(source: Path, images: Path, *, seed: int) -> list[CaptionedImage]:
    """Write a folder with all but a fifth of the things shown, 300 at most; return one image each.

    The folder holds links to the images, and the lines of the dataset in English.
    """
    lines = [json.loads(line) for line in (source / "captions.jsonl").open(encoding="utf-8")]
    lines = [line for line in lines if line.get("lang", "en") == "en"]
    group_ids = sorted({line.get("group_id", line["image"]) for line in lines})
    random.Random(seed).shuffle(group_ids)
    held_out = set(group_ids[: min(MOST_TEST_IMAGES, len(group_ids) // 5)])
    images.mkdir()
    for child in source.iterdir():
        if child.is_dir():
            (images / child.name).symlink_to(child.resolve())
    kept = [line for line in lines if line.get("group_id", line["image"]) not in held_out]
    text = "".join(json.dumps(_known_fields(line)) + "\n" for line in kept)
    (images / "captions.jsonl").write_text(text, encoding="utf-8")
    test = {}
    for line in lines:
        group_id = line.get("group_id", line["image"])
        if group_id in held_out and group_id not in test:
            test[group_id] = line
    (images.parent / "test").mkdir()
    for child in source.iterdir():
        if child.is_dir():
            (images.parent / "test" / child.name).symlink_to(child.resolve())
    text = "".join(json.dumps(_known_fields(line)) + "\n" for line in test.values())
    (images.parent / "test" / "captions.jsonl").write_text(text, encoding="utf-8")
    return load_records(images.parent / "test")


def _known_fields(line: dict[str, Any]) -> dict[str, Any]:
    known = ("image", "captions", "long_captions", "keywords", "group_id", "lang")
    return {name: line[name] for name in known if line.get(name)}


def run(command: str, folder: Path) -> None:
    """Run a command of the README with this package, and show what it says."""
    print(f"$ {command}", flush=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    program = f"{sys.executable} -m modeling_llm2clip "
    assert command.startswith("llm2clip ")
    subprocess.run(
        command.replace("llm2clip ", program, 1), shell=True, check=True, cwd=folder,
        env=environment,
    )  # fmt: skip


def encode_test_images(model_folder: Path, test: list[CaptionedImage]) -> tuple[Tensor, Tensor]:
    """Embeddings of the frozen towers, of each image and of its first caption."""
    model = LLM2CLIPModel.from_pretrained(model_folder).eval()
    processor = LLM2CLIPProcessor.from_pretrained(model_folder)
    captions = encode_texts(
        model, processor, [record.captions[0] for record in test], project=False
    )
    images = encode_images(model, processor, [record.image for record in test], project=False)
    return captions, images


@torch.no_grad()
def score(
    folder: Path, test: list[CaptionedImage], embeds: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """R@1 of both directions, and their mean, among the images that were set aside."""
    head = AlignmentModel.from_pretrained(folder, with_llm=False, with_vision_tower=False).eval()
    text_embeds = head.project_caption_embeds(embeds[0])
    image_embeds = head.project_vision_embeds(embeds[1])
    group_ids = [record.group_id for record in test]
    ranking = rank_retrieval(
        image_embeds, text_embeds, Correspondence.from_group_ids(group_ids, group_ids)
    )
    scores = {
        "t2i_r1": hit_rate_at(ranking.t2i, k=1),
        "i2t_r1": hit_rate_at(ranking.i2t, k=1),
    }
    return {**scores, "r1": sum(scores.values()) / 2}


if __name__ == "__main__":
    sys.exit(main())
