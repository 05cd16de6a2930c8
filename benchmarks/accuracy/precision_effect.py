"""Retrieval in bfloat16 beside float32: cosines, R@1, and what `--precision auto` decides.

    python -m benchmarks.accuracy.precision_effect openclipart=FOLDER emoji=FOLDER --work WORK

Each FOLDER is a dataset as the README describes it; its English lines are used. The embedded vision
tower and two text towers are aligned on at most 800 images, in closed form, and find 500 others by
their first captions: with towers in float32, and in bfloat16. Heads stay in float32, as on a GPU. A
CPU computes both; it rounds as a GPU does, and sums in another order. The guard is asked as a GPU
with bfloat16 asks it, once for each tower. What is measured is written after each model. `--work`
keeps models and embedding stores, so that a second call measures at once.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.accuracy.first_run import read_lines, write_images
from benchmarks.accuracy.text_towers import build_tower
from benchmarks.accuracy.training_set_size import load_head, split_things
from benchmarks.shared.provenance import describe_run
from modeling_llm2clip import AlignConfig, align, extract, load_records
from modeling_llm2clip.configs.encoding_config import ExtractConfig
from modeling_llm2clip.data.records.record_table import RecordTable
from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.encoding.encode import encode_images, encode_texts
from modeling_llm2clip.encoding.precision import DeviceTraits
from modeling_llm2clip.evaluation.metrics.correspondence import Correspondence
from modeling_llm2clip.evaluation.metrics.ranking import rank_retrieval
from modeling_llm2clip.evaluation.metrics.scores import hit_rate_at
from modeling_llm2clip.model_folders.guarded_loading import LEAST_COSINE, load_in_precision
from modeling_llm2clip.modeling_llm2clip import LLM2CLIPTextModel, LLM2CLIPVisionModel
from modeling_llm2clip.processing_llm2clip import LLM2CLIPProcessor

TOWERS = ("minilm", "tuned")  # names of `text_towers.py`
PRECISIONS = ("float32", "bfloat16")
MOST_POINTS = 0.2
_MOST_IMAGES = (500, 800)  # to find, to train on
_CPU, _GPU = torch.device("cpu"), DeviceTraits("cuda", has_bfloat16=True, free_bytes=2**40)
COSINE = re.compile(r"is (-?[0-9.]+|nan), at least")


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


@dataclass
class Dataset:
    """Captioned images, some to train on and others to find."""

    work: Path
    training: RecordTable
    test: list[CaptionedImage]
    images: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def prepare(
        cls, source: Path, work: Path, most_images: tuple[int, int] = _MOST_IMAGES
    ) -> Dataset:
        """Read a dataset, and split it into images to find and others to train on."""
        if not work.exists():
            write_images(source, work / "data", read_lines(source))
        records = RecordTable.from_records(load_records((work / "data").resolve()))
        first, others = split_things(records, seed=0)
        order = [*first, *others]
        count = min(most_images[0], len(order) // 2)
        chosen = sorted(order[count:][: most_images[1]])
        test = [records[number] for number in order[:count]]
        return cls(work, records.select(np.array(chosen)), test)

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
        config = AlignConfig(device="cpu", max_steps=0)
        return align(
            model, self.training, output, config,
            caption_store=stores["text"], image_store=stores["image"],
        )  # fmt: skip

    def measure(self, model: Path) -> dict[str, Any]:
        """Compare both precisions of an aligned model; all models have the same vision tower."""
        if not self.images:
            images = [record.image for record in self.test]
            self.images = encode_twice(LLM2CLIPVisionModel, encode_images, model, images)
        captions = [record.captions[0] for record in self.test]
        texts = encode_twice(LLM2CLIPTextModel, encode_texts, model, captions)
        guard = {
            "text": ask_guard(LLM2CLIPTextModel, model),
            "image": ask_guard(LLM2CLIPVisionModel, model),
        }
        texts["auto"], self.images["auto"] = (
            side[guard[name]["dtype"]] for name, side in (("text", texts), ("image", self.images))
        )
        return {
            "num_images": len(self.training),
            "num_test_images": len(self.test),
            **compare_precisions(model, texts, self.images),
            "guard": guard,
        }


def encode_twice(
    model_class: Any, encode: Callable[..., Tensor], model: Path, inputs: Sequence[Any]
) -> dict[str, Tensor]:
    """Encode inputs by a tower in float32 and in bfloat16; (N, D), not projected, by precision."""
    processor = LLM2CLIPProcessor.from_pretrained(model, local_files_only=True)
    embeds = {}
    for precision in PRECISIONS:
        loaded = load_in_precision(model_class, model, _CPU, precision, traits=_GPU)
        embeds[precision] = encode(loaded, processor, inputs, project=False)
    return embeds


@torch.no_grad()
def compare_precisions(
    model: Path, texts: Mapping[str, Tensor], images: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Project what the towers gave in both precisions, and search each side by the other.

    Args:
        model: A trained model folder.
        texts: By precision, (N, D); text n describes image n. `auto` is what the guard chose.
        images: By precision, (N, D).

    Returns:
        By modality the smallest and the mean cosine of float32 and bfloat16; by precision R@1 of
        both directions.
    """
    head = load_head(model)
    ranks, sides = {}, {}
    for precision, embeds in texts.items():
        text = head.project_caption_embeds(embeds)
        image = head.project_vision_embeds(images[precision])
        numbers = [str(number) for number in range(len(text))]
        pairs = Correspondence.from_group_ids(numbers, numbers)
        ranks[precision] = rank_retrieval(image, text, pairs)
        sides[precision] = {"text": text, "image": image}
    cosines = {
        name: F.cosine_similarity(*(sides[precision][name] for precision in PRECISIONS))
        for name in ("text", "image")
    }
    return {
        "cosine": {n: {"min": float(c.min()), "mean": float(c.mean())} for n, c in cosines.items()},
        "r1": {
            precision: {"t2i": hit_rate_at(both.t2i, k=1), "i2t": hit_rate_at(both.i2t, k=1)}
            for precision, both in ranks.items()
        },
    }


def ask_guard(model_class: Any, model: Path) -> dict[str, Any]:
    """Return in which dtype a GPU would run a tower by itself, and the cosine that decides it."""
    said = StringIO()
    with redirect_stderr(said):
        loaded = load_in_precision(model_class, model, _CPU, traits=_GPU)
    tower = loaded.text_model if hasattr(loaded, "text_model") else loaded.vision_model
    (cosine,) = COSINE.findall(said.getvalue())
    return {"dtype": str(tower.dtype).removeprefix("torch."), "cosine": float(cosine)}


def count_points(r1: Mapping[str, Mapping[str, float]], precision: str) -> float:
    """Return by how many percentage points a precision moves R@1 of float32 at most.

    Args:
        r1: By precision and direction.
        precision: `bfloat16` or `auto`.
    """
    return max(100 * abs(r1[precision][way] - exact) for way, exact in r1["float32"].items())


if __name__ == "__main__":
    main()
