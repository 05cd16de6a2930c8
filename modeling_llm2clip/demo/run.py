"""The demo: build, encode, align, evaluate, export, verify, search, show."""

from __future__ import annotations

import json
import platform
import random
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import __version__
from ..data.captioned_images import CaptionedImage, read_captioned_folder
from ..encoding.captions import encode_captions
from ..encoding.pictures import encode_pictures
from ..evaluation.metrics import rank_best_positive, recall_at
from ..hub.build import BuildArguments, build_from_sources
from ..hub.export import export_model
from ..modeling_llm2clip import LLM2CLIPModel
from ..processing_llm2clip import LLM2CLIPProcessor
from ..training.feature_alignment import AlignmentArguments, AlignmentPairs, align_features
from .contact_sheet import SearchResult, write_contact_sheet, write_page
from .example_data import find_example_data
from .real_parts import EFFICIENTNET, SMOLLM2, fetch_real_part
from .verify import verify_in_clean_process

SENTENCES = (
    "a cat with its eyes closed",
    "something to eat with cheese",
    "a vehicle that flies",
    "a musical instrument",
    "a person who is very happy",
    "a cup of hot coffee",
    "flowers",
    "a building where people pray",
)
_MOST_HELD_OUT = 300
_VERIFIED = 8


@dataclass(frozen=True)
class DemoArguments:
    """What the demo runs on.

    Attributes:
        output: folder that is made; must not hold an earlier run.
        vision, llm: Hub ids or folders; None for the embedded real parts.
        pictures: a folder with `captions.jsonl`; None for the embedded emoji and photographs.
        prompt: see `hub.prompts`; needed with another LLM.
        caption_adapter: folder of a LoRA that taught the LLM to tell captions apart; merged
            into the LLM before anything is encoded.
        steps, batch_size, seed: of the alignment, and the seed of the split.
    """

    output: Path = Path("llm2clip-demo")
    vision: str | None = None
    llm: str | None = None
    pictures: Path | None = None
    prompt: str | None = None
    caption_adapter: Path | None = None
    steps: int = 300
    batch_size: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if self.llm is not None and self.prompt is None:
            raise ValueError(
                "--llm needs --prompt, because the vectors depend on it and it is never guessed. "
                "Give chat-template, none, or one of the presets that `llm2clip build -h` lists."
            )
        if self.output.exists() and any(self.output.iterdir()):
            raise ValueError(f"{self.output} is not empty. Remove it, or name another --output.")


@dataclass(frozen=True)
class _Pictures:
    """One line a picture: what it shows and the rows of its captions."""

    records: list[CaptionedImage]
    vision_embeds: Tensor
    caption_embeds: Tensor
    captions_of_picture: list[list[int]]

    def rows(self, keys: set[str], *, inside: bool) -> list[int]:
        return [i for i, r in enumerate(self.records) if (r.key in keys) == inside]


def run_demo(arguments: DemoArguments) -> dict[str, Any]:
    """Run the whole of it and return the report that is also written to `report.json`.

    Raises: ValueError for bad input, RuntimeError when a part cannot be fetched or the exported
        folder does not give the same vectors again.
    """
    records, gallery = _read_pictures(arguments)
    vision = arguments.vision or fetch_real_part(EFFICIENTNET)
    llm = arguments.llm or fetch_real_part(SMOLLM2)
    started = time.monotonic()
    print("Building the model from its towers …", flush=True)
    model, processor = build_from_sources(
        vision,
        llm,
        BuildArguments(prompt=arguments.prompt or "chatml", seed=arguments.seed),
        caption_adapter=arguments.caption_adapter,
    )
    pictures = _encode(model, processor, records)
    held_out = _hold_out(records, seed=arguments.seed)
    print(f"Aligning adapter and projections, {arguments.steps} steps …", flush=True)
    losses = _align(model, pictures, held_out, arguments)
    scores = _evaluate(model, pictures, held_out)
    print("Saving, loading again in a clean process, searching …", flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    folder = export_model(model, processor, arguments.output / "model", scores=scores)
    found = _search_everything(model, processor, pictures, gallery)
    differences = _verify(model, processor, records, folder, arguments.output)
    _show(found, arguments.output, scores)
    report = {
        "seconds_after_download": round(time.monotonic() - started, 1),
        "peak_rss_gb": _peak_rss_gb(),
        **scores,
        "seed": arguments.seed,
        "final_loss": round(losses[-1], 4),
        "num_pictures": len(records),
        "num_held_out": len(held_out),
        "largest_difference_after_loading": differences,
        "versions": _versions(),
    }
    (arguments.output / "report.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    return report


def _read_pictures(arguments: DemoArguments) -> tuple[list[CaptionedImage], list[CaptionedImage]]:
    """Return what is trained and tested on, and what is only searched."""
    if arguments.pictures is not None:
        return [r for r in read_captioned_folder(arguments.pictures) if r.lang == "en"], []
    data = find_example_data()
    emoji = [r for r in read_captioned_folder(data / "emoji") if r.lang == "en"]
    return emoji, read_captioned_folder(data / "photographs")


def _texts_of(record: CaptionedImage) -> list[str]:
    """The captions as they are, and once more with the picture's keywords behind the first."""
    texts = list(record.captions)
    if record.keywords:
        texts.append(f"{record.captions[0]}: {', '.join(record.keywords)}")
    return texts


def _encode(
    model: LLM2CLIPModel, processor: LLM2CLIPProcessor, records: list[CaptionedImage]
) -> _Pictures:
    print(f"Encoding {len(records)} pictures …", flush=True)
    vision_embeds = encode_pictures(model, processor, [r.path for r in records], show_progress=True)
    rows: dict[str, int] = {}
    captions_of_picture = [
        [rows.setdefault(text, len(rows)) for text in _texts_of(record)] for record in records
    ]
    print(f"Encoding {len(rows)} captions …", flush=True)
    captions = encode_captions(model, processor, list(rows), show_progress=True)
    return _Pictures(records, vision_embeds, captions.caption_embeds, captions_of_picture)


def _hold_out(records: Sequence[CaptionedImage], *, seed: int) -> set[str]:
    """Choose keys whose pictures and captions are both kept out of training."""
    keys = sorted({record.key for record in records})
    if len(keys) < 10:
        raise ValueError(f"{len(keys)} different things are too few to train and test on; give 10.")
    random.Random(seed).shuffle(keys)
    return set(keys[: min(_MOST_HELD_OUT, len(keys) // 5)])


def _align(
    model: LLM2CLIPModel, pictures: _Pictures, held_out: set[str], arguments: DemoArguments
) -> list[float]:
    rows = pictures.rows(held_out, inside=False)
    seen = {text for row in rows for text in pictures.records[row].captions}
    leaked = [key for key in _first_captions(pictures, held_out) if key in seen]
    if leaked:
        raise ValueError(f"Held-out captions are also training captions: {leaked[:5]}.")
    pairs = AlignmentPairs(
        pictures.caption_embeds,
        pictures.vision_embeds[rows],
        [pictures.captions_of_picture[row] for row in rows],
        [pictures.records[row].key for row in rows],
    )
    settings = AlignmentArguments(
        steps=arguments.steps, batch_size=arguments.batch_size, seed=arguments.seed
    )
    return align_features(model, pairs, settings, show_progress=True)


def _first_captions(pictures: _Pictures, keys: set[str]) -> list[str]:
    return [pictures.records[row].captions[0] for row in pictures.rows(keys, inside=True)]


@torch.inference_mode()
def _evaluate(model: LLM2CLIPModel, pictures: _Pictures, held_out: set[str]) -> dict[str, float]:
    """Compare the first picture of each held-out key with its first caption."""
    rows = list({pictures.records[r].key: r for r in pictures.rows(held_out, inside=True)}.values())
    keys = [pictures.records[row].key for row in rows]
    captions = [pictures.captions_of_picture[row][0] for row in rows]
    text_embeds = model.project_caption_embeds(pictures.caption_embeds[captions])
    image_embeds = model.project_vision_embeds(pictures.vision_embeds[rows])
    text_to_image = rank_best_positive(text_embeds, image_embeds, keys, keys)
    image_to_text = rank_best_positive(image_embeds, text_embeds, keys, keys)
    return {
        "unseen_text_to_image_r1": recall_at(text_to_image, k=1),
        "unseen_text_to_image_r10": recall_at(text_to_image, k=10),
        "unseen_image_to_text_r1": recall_at(image_to_text, k=1),
        "chance_r1": 1 / len(keys),
    }


@torch.inference_mode()
def _search_everything(
    model: LLM2CLIPModel,
    processor: LLM2CLIPProcessor,
    pictures: _Pictures,
    gallery: list[CaptionedImage],
) -> list[SearchResult]:
    """Answer the sentences from one picture a key, and the gallery that was never trained on."""
    rows = list({r.key: i for i, r in enumerate(pictures.records)}.values())
    paths = [pictures.records[row].path for row in rows]
    vision_embeds = pictures.vision_embeds[rows]
    if gallery:
        extra = encode_pictures(model, processor, [record.path for record in gallery])
        vision_embeds = torch.cat([vision_embeds, extra])
        paths += [record.path for record in gallery]
    image_embeds = F.normalize(model.project_vision_embeds(vision_embeds), dim=-1)
    captions = encode_captions(model, processor, SENTENCES).caption_embeds
    text_embeds = F.normalize(model.project_caption_embeds(captions), dim=-1)
    best = (text_embeds @ image_embeds.T).topk(min(6, len(paths)))
    return [
        SearchResult(sentence, [(paths[i], float(s)) for s, i in zip(scores, indices, strict=True)])
        for sentence, scores, indices in zip(SENTENCES, best.values, best.indices, strict=True)
    ]


@torch.inference_mode()
def _verify(
    model: LLM2CLIPModel,
    processor: LLM2CLIPProcessor,
    records: list[CaptionedImage],
    folder: Path,
    output: Path,
) -> dict[str, float]:
    paths = [str(record.path) for record in records[:_VERIFIED]]
    output_now = model(**processor(text=list(SENTENCES), images=paths))
    return verify_in_clean_process(
        folder,
        texts=list(SENTENCES),
        text_embeds=output_now.text_embeds.tolist(),
        pictures=paths,
        image_embeds=output_now.image_embeds.tolist(),
        record=output / "verified_vectors.json",
    )


def _show(found: list[SearchResult], output: Path, scores: dict[str, float]) -> None:
    write_contact_sheet(found, output / "search.png")
    note = (
        f"Unseen text to picture R@1 {scores['unseen_text_to_image_r1']:.1%}, picture to text "
        f"{scores['unseen_image_to_text_r1']:.1%}, chance {scores['chance_r1']:.1%}. The number "
        "under a picture is its cosine with the sentence."
    )
    write_page(found, output / "search.html", title="LLM2CLIP: pictures by sentence", note=note)


def _peak_rss_gb() -> float:
    """Peak memory of this process and the largest of its children together, in 10^9 bytes."""
    kilobyte = 1 if platform.system() == "Darwin" else 1024  # macOS counts bytes
    usages = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return round(sum(resource.getrusage(u).ru_maxrss * kilobyte for u in usages) / 1e9, 2)


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "sentence-transformers", "timm")
    own = {"python": platform.python_version(), "modeling_llm2clip": __version__}
    return {**own, **{name: version(name) for name in packages}}
