"""Retrieval with four text towers: the same images, captions and steps of alignment.

    python -m benchmarks.accuracy.text_towers PHOTOGRAPHS... --long LONG --work WORK

PHOTOGRAPHS are folders of captioned images, which are joined, and LONG one of images whose longest
text is a paragraph; none of LONG is ever trained on. For each split, a fifth of the photographs, at
most 300, is set aside, and each model is aligned on the rest. Photographs that were set aside are
retrieved by their first captions, those of LONG by their paragraphs. The towers run once over all
texts and images: `--work` keeps models and embedding stores, so that a second call trains at once.
What is measured is written after each run. Caption retrieval accuracy (CRA) is what
`finetune_llm.py` recorded of the same text towers.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy.training_set_size import (
    build_untrained,
    read_first,
    score,
    split_things,
    train,
)
from benchmarks.shared.provenance import describe_run
from modeling_llm2clip import (
    AlignConfig,
    BuildConfig,
    EmbeddingStore,
    extract,
    load_records,
)
from modeling_llm2clip.building.pretrained_towers import SMOLLM2, fetch_tower
from modeling_llm2clip.configs.build_config import EMBEDDED, OWN_PROMPT
from modeling_llm2clip.data.records.record_table import RecordTable
from modeling_llm2clip.data.records.records import CaptionedImage

RESULTS = Path(__file__).parents[1] / "results"
# Names in the table of `finetune_llm.py`, and how the towers are built; an LLM that is given by its
# folder comes without the LoRA.
TOWERS = {
    "causal": BuildConfig(prompt="chatml", bidirectional=False),
    "bidirectional": BuildConfig(prompt="chatml"),
    "tuned": BuildConfig(),
    "minilm": BuildConfig(prompt=OWN_PROMPT),
}
UNTUNED = ("causal", "bidirectional")


def main() -> None:
    """Align every text tower on every split, and write the scores after each run."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("photographs", nargs="+", type=Path)
    parser.add_argument("--long", type=Path, required=True, help="images with paragraphs")
    parser.add_argument("--captions-per-image", type=int, default=5, help="the first ones")
    parser.add_argument("--most-images", type=int, help="of PHOTOGRAPHS; default: all")
    parser.add_argument("--num-splits", type=int, default=3)
    parser.add_argument("--max-steps", type=int, default=100, help="0: the closed form alone")
    parser.add_argument("--towers", nargs="+", default=list(TOWERS), choices=TOWERS)
    parser.add_argument("--work", type=Path, required=True, help="keeps the models and the stores")
    parser.add_argument("--output", type=Path, default=RESULTS / "text_towers.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = AlignConfig(max_steps=arguments.max_steps, global_batch_size=256)
    images = Images.load(arguments)
    test, training = split_things(images.short, seed=0)
    recorded = json.loads((RESULTS / "finetune_llm.json").read_text("utf-8"))
    record: dict[str, Any] = {
        "num_images": len(training),
        "num_test_images": len(test),
        "num_long_images": len(images.long),
        "captions_per_image": arguments.captions_per_image,
        "alignment": asdict(config),
        "cra": {name: recorded["cra"][name] for name in arguments.towers},
        "cra_data": recorded["data"],
        "runs": [],
    }
    stores = {}
    for name in arguments.towers:
        if not (arguments.work / name).exists():
            build_tower(name, arguments.work / name)
        stores[name] = images.extract(arguments.work / name, arguments.work)
    for split in range(arguments.num_splits):
        for name in arguments.towers:
            with tempfile.TemporaryDirectory(dir=arguments.work) as scratch:
                model = arguments.work / name
                scores = images.measure(
                    model, stores[name], replace(config, seed=split), Path(scratch)
                )
            record["runs"].append({"tower": name, "split": split, **scores})
            print(record["runs"][-1], flush=True)
            frame = describe_run("torch", "transformers", threads=1, note="beside other work")
            written = json.dumps({**frame, **record}, indent=2)
            arguments.output.write_text(f"{written}\n", "utf-8")


def build_tower(name: str, model: Path) -> None:
    """Build the model of a text tower on the demo's vision tower."""
    text = str(fetch_tower(SMOLLM2)) if name in UNTUNED else EMBEDDED
    build_untrained(model, TOWERS[name], text=text)


@dataclass(frozen=True)
class Images:
    """Photographs with short captions, of which some are set aside, and others with long ones."""

    short: RecordTable
    long: RecordTable

    @classmethod
    def load(cls, arguments: argparse.Namespace) -> Images:
        """Read all folders, and keep the captions that are used."""
        count = arguments.captions_per_image
        records = (r for folder in arguments.photographs for r in read_english(folder))
        short = (
            replace(record, captions=record.captions[:count])
            for record in islice(records, arguments.most_images)
        )
        long = (
            replace(record, captions=(max(record.captions, key=len),))
            for record in read_english(arguments.long)
        )
        return cls(RecordTable.from_records(short), RecordTable.from_records(long))

    def extract(self, model: Path, work: Path) -> dict[str, EmbeddingStore]:
        """Extract the missing stores; models share the vision tower, and so the store of images."""
        return {
            "text": extract_to(model, self.short, work / f"{model.name}-short", "text"),
            "image": extract_to(model, self.short, work / "photographs", "image"),
            "long text": extract_to(model, self.long, work / f"{model.name}-long", "text"),
            "long image": extract_to(model, self.long, work / "long-images", "image"),
        }

    def measure(
        self, model: Path, stores: dict[str, EmbeddingStore], config: AlignConfig, scratch: Path
    ) -> dict[str, dict[str, float]]:
        """Align on the photographs that are not set aside, and score short and long captions."""
        test, training = split_things(self.short, seed=config.seed)
        both = {name: stores[name] for name in ("text", "image")}
        head = train(model, self.short, training, both, scratch, config)
        every = list(range(len(self.long)))
        return {
            "short": score(
                head, read_first(stores["text"], test), read_first(stores["image"], test)
            ),
            "long": score(
                head,
                read_first(stores["long text"], every),
                read_first(stores["long image"], every),
            ),
        }


def read_english(folder: Path) -> Iterable[CaptionedImage]:
    """Read the lines of a folder in English."""
    ignored = ("category",)
    return (r for r in load_records(folder, ignore_fields=ignored) if r.lang == "en")


def extract_to(model: Path, records: RecordTable, folder: Path, modality: Any) -> EmbeddingStore:
    """Extract a store where that is not done, and open it."""
    return EmbeddingStore.open(extract(model, records, folder, modality=modality))


if __name__ == "__main__":
    main()
