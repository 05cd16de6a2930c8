"""Retrieval in bfloat16 beside float32: cosines, R@1, and what `--precision auto` decides.

    python -m benchmarks.accuracy.precision_effect openclipart=FOLDER emoji=FOLDER --work WORK

Each FOLDER is a dataset as the README describes it; its English lines are used. The embedded vision
tower and two text towers are aligned on one half of the images, and find the other half, at most
1,000, by their first captions: with towers in float32, and in bfloat16. Heads stay in float32, as
on a GPU. A CPU computes both; it rounds as a GPU does, and sums in another order. The guard is
asked as a GPU with bfloat16 asks it, once for each tower. What is measured is written after each
model. `--work` keeps models and embedding stores, so that a second call measures at once.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.accuracy.first_run import read_lines, write_images
from benchmarks.accuracy.text_towers import build_tower
from benchmarks.accuracy.training_set_size import split_things
from benchmarks.shared.provenance import describe_run
from modeling_llm2clip import AlignConfig, align, extract, load_records
from modeling_llm2clip.configs.encoding_config import ExtractConfig
from modeling_llm2clip.data.records.record_table import RecordTable
from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.encoding.encode import encode_images, encode_texts, project_stored
from modeling_llm2clip.encoding.precision import DeviceTraits
from modeling_llm2clip.evaluation.metrics.correspondence import Correspondence
from modeling_llm2clip.evaluation.metrics.ranking import rank_retrieval
from modeling_llm2clip.evaluation.metrics.scores import hit_rate_at
from modeling_llm2clip.model_folders.guarded_loading import LEAST_COSINE, load_in_precision
from modeling_llm2clip.modeling_llm2clip import (
    LLM2CLIPModel,
    LLM2CLIPTextModel,
    LLM2CLIPVisionModel,
)
from modeling_llm2clip.processing_llm2clip import LLM2CLIPProcessor

TOWERS = ("minilm", "tuned")  # names of `text_towers.py`
PRECISIONS = ("float32", "bfloat16")
MOST_POINTS = 0.2
_MOST_TEST_IMAGES = 1000
_CPU, _GPU = torch.device("cpu"), DeviceTraits("cuda", has_bfloat16=True, free_bytes=2**40)
_COSINE = re.compile(r"is (-?[0-9.]+|nan), and")


def main() -> None:
    """Measure both text towers on every dataset, and write what was measured after each model."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("data", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--towers", nargs="+", default=TOWERS, choices=TOWERS)
    parser.add_argument("--work", type=Path, required=True, help="keeps the models and the stores")
    output = Path(__file__).parents[1] / "results" / "precision_effect.json"
    parser.add_argument("--output", type=Path, default=output)
    arguments = parser.parse_args()
    runs: list[dict[str, Any]] = []
    for name, _, source in (text.partition("=") for text in arguments.data):
        dataset = Dataset.prepare(Path(source), arguments.work / name)
        for tower in arguments.towers:
            folder = arguments.work / tower
            if not folder.exists():
                build_tower(tower, folder)
            aligned = dataset.align(folder)
            runs.append({"dataset": name, "tower": tower, **dataset.measure(aligned)})
            print(json.dumps(runs[-1], indent=2), flush=True)
            frame = describe_run("torch", "transformers", note="beside other work")
            bars = {"least_cosine": LEAST_COSINE, "most_points": MOST_POINTS}
            record = json.dumps({**frame, **bars, "runs": runs}, indent=2)
            arguments.output.write_text(f"{record}\n", "utf-8")


@dataclass(frozen=True)
class Dataset:
    """Captioned images, one half to train on and one to find."""

    work: Path
    training: RecordTable
    test: list[CaptionedImage]

    @classmethod
    def prepare(cls, source: Path, work: Path) -> Dataset:
        """Read a dataset, and split it."""
        if not work.exists():
            write_images(source, work / "data", read_lines(source))
        records = RecordTable.from_records(load_records((work / "data").resolve()))
        first, others = split_things(records, seed=0)
        order = [*first, *others]
        count = min(_MOST_TEST_IMAGES, len(order) // 2)
        training = records.select(np.array(sorted(order[count:])))
        return cls(work, training, [records[number] for number in order[:count]])

    def align(self, model: Path) -> Path:
        """Align a model on the training images, unless that is done."""
        output = self.work / f"aligned-{model.name}"
        if (output / "model").exists():
            return output / "model"
        stores = {}
        for modality, name in (("text", f"{model.name}-text"), ("image", "image")):
            config = ExtractConfig(device="cpu", show_progress=False)
            folder = self.work / name
            stores[modality] = extract(model, self.training, folder, config, modality=modality)
        config = AlignConfig(device="cpu")
        return align(
            model, self.training, output, config,
            caption_store=stores["text"], image_store=stores["image"],
        )  # fmt: skip

    def measure(self, model: Path) -> dict[str, Any]:
        """Compare both precisions of an aligned model."""
        texts = [record.captions[0] for record in self.test]
        images = [record.image for record in self.test]
        return {
            "num_images": len(self.training),
            "num_test_images": len(images),
            **compare_precisions(model, texts, images),
            "guard": {
                "text": ask_guard(LLM2CLIPTextModel, model),
                "image": ask_guard(LLM2CLIPVisionModel, model),
            },
        }


def compare_precisions(model: Path, texts: Sequence[str], images: Sequence[Any]) -> dict[str, Any]:
    """Encode pairs with towers in float32 and in bfloat16, and search each side by the other.

    Args:
        model: A trained model folder.
        texts: One text of each image.
        images: Different images.

    Returns:
        By modality the smallest and the mean cosine of both precisions; by precision R@1 of both
        directions; by direction the number of queries that only one precision answers.
    """
    processor = LLM2CLIPProcessor.from_pretrained(model, local_files_only=True)
    embeds: dict[str, dict[str, Tensor]] = {}
    for precision in PRECISIONS:
        loaded = load_in_precision(LLM2CLIPModel, model, _CPU, precision, traits=_GPU)
        of_towers = {
            "text": encode_texts(loaded, processor, texts, project=False),
            "image": encode_images(loaded, processor, images, project=False),
        }
        embeds[precision] = {n: project_stored(loaded, e, n) for n, e in of_towers.items()}
    numbers = [str(number) for number in range(len(texts))]
    pairs = Correspondence.from_group_ids(numbers, numbers)
    ranks = {p: rank_retrieval(e["image"], e["text"], pairs) for p, e in embeds.items()}
    cosines = {
        name: F.cosine_similarity(*(of_both[name] for of_both in embeds.values()))
        for name in ("text", "image")
    }
    changed = {}
    for way in ("t2i", "i2t"):
        one, other = (getattr(both, way).best_ranks == 1 for both in ranks.values())
        changed[way] = int((one != other).sum())
    return {
        "cosine": {n: {"min": float(c.min()), "mean": float(c.mean())} for n, c in cosines.items()},
        "r1": {
            precision: {"t2i": hit_rate_at(both.t2i, k=1), "i2t": hit_rate_at(both.i2t, k=1)}
            for precision, both in ranks.items()
        },
        "changed": changed,
    }


def ask_guard(model_class: Any, model: Path) -> dict[str, Any]:
    """Return in which dtype a GPU would run a tower by itself, and the cosine that decides it."""
    said = StringIO()
    with redirect_stderr(said):
        loaded = load_in_precision(model_class, model, _CPU, traits=_GPU)
    tower = loaded.text_model if hasattr(loaded, "text_model") else loaded.vision_model
    (cosine,) = _COSINE.findall(said.getvalue())
    return {"dtype": str(tower.dtype).removeprefix("torch."), "cosine": float(cosine)}


def count_points(run: dict[str, Any]) -> float:
    """Return by how many percentage points bfloat16 moves R@1, in the direction that it moves most.

    Args:
        run: As `compare_precisions` returns it.
    """
    exact, rounded = (run["r1"][precision] for precision in PRECISIONS)
    return max((100 * (rounded[way] - exact[way]) for way in exact), key=abs)


if __name__ == "__main__":
    main()
