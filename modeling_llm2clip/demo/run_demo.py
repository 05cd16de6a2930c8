"""The demo: build, encode, align, evaluate, export, verify, search, show."""

from __future__ import annotations

import json
import platform
import resource
import time
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..building.build_model import join_towers
from ..building.tower_sources import require_sources
from ..configs.build_config import BuildConfig, Prompt
from ..data.record_loading import find_example_data, load_records
from ..data.records import CaptionedImage
from ..encoding.devices import find_device
from ..evaluation.datasets.catalog.emoji import EMOJI_SEED
from ..model_folders.model_card_data import CardData, CardResult, find_license
from ..model_folders.model_writing import save_model
from ..modeling_llm2clip import LLM2CLIPModel
from ..processing_llm2clip import LLM2CLIPProcessor
from ..search.image_index import SearchResult
from ..search.results_page import write_results_page, write_results_sheet
from .feature_alignment import AlignmentArguments
from .pretrained_towers import EFFICIENTNET, SMOLLM2, SMOLLM2_BASE, fetch_tower
from .stages import align, encode_records, evaluate, hold_out, search
from .verify import verify_in_clean_process

SENTENCES = (
    "a slice of pizza",
    "a red flower",
    "an aeroplane in the sky",
    "a violin",
    "a smiling face",
    "a cup of hot coffee",
    "a cat",
    "a house with a garden",
)
_VERIFIED = 8


@dataclass(frozen=True)
class DemoArguments:
    """What the demo runs on.

    Attributes:
        output: folder that is made; must not hold an earlier run.
        vision, llm: Hub ids or folders; None for the embedded real parts.
        images: a folder with `captions.jsonl`; None for the embedded emoji and photographs.
        prompt: see `hub.prompts`; needed with another LLM.
        caption_lora: folder of a LoRA that taught the LLM to tell captions apart, merged into
            it before anything is encoded; "embedded" for that of the embedded LLM, which is also
            the default for it; "none" for the LLM as it is, which is the default for another.
        accept_lora_base: what the LoRA calls its base, where that is `llm` under another name.
        steps, batch_size, seed: of the alignment, and the seed of the split.
        device: where the model runs; see `find_device`.
    """

    output: Path = Path("llm2clip-demo")
    vision: str | None = None
    llm: str | None = None
    images: Path | None = None
    prompt: Prompt | None = None
    caption_lora: str | Path | None = None
    accept_lora_base: str | None = None
    steps: int = 100
    batch_size: int = 512
    seed: int = 0
    device: str = "cpu"

    def find_adapter(self) -> Path | None:
        """Folder of the LoRA that is merged, if any."""
        chosen = self.caption_lora or ("embedded" if self.llm is None else "none")
        if chosen == "none":
            return None
        return find_example_data() / "caption_lora" if chosen == "embedded" else Path(chosen)

    @property
    def accepted_base(self) -> str | None:
        """What the LoRA may call its base; the embedded LLM lies under a name of the cache."""
        return self.accept_lora_base or (SMOLLM2_BASE if self.llm is None else None)

    @property
    def alignment(self) -> AlignmentArguments:
        """Settings of the alignment; low rates, because the closed-form start is good already."""
        return AlignmentArguments(
            steps=self.steps, batch_size=self.batch_size, lr=1e-4, seed=self.seed
        )

    @property
    def building(self) -> BuildConfig:
        """Settings of the model that is put together."""
        return BuildConfig(
            prompt=self.prompt or "chatml",
            lora=self.find_adapter(),
            accept_lora_base=self.accepted_base,
            seed=self.seed,
        )

    def __post_init__(self) -> None:
        _ = self.alignment, self.building  # bad settings are refused now, not after the encoding
        if self.llm is not None and self.prompt is None:
            raise ValueError(
                "--llm needs --prompt, because the embeddings depend on it and it is never "
                "guessed. "
                "Give chat-template, none, or one of the presets that `llm2clip build -h` lists."
            )
        if self.output.exists() and any(self.output.iterdir()):
            raise ValueError(f"{self.output} is not empty. Remove it, or name another --output.")
        require_sources(vision=self.vision, text=self.llm, lora=self.find_adapter())


def run_demo(arguments: DemoArguments) -> dict[str, Any]:
    """Run the whole of it and return the report that is also written to `report.json`.

    Raises: ValueError for bad input, RuntimeError when a part cannot be fetched or the exported
        folder does not give the same embeddings again.
    """
    records, gallery = read_images(arguments)
    held_out = hold_out(records, seed=arguments.seed)
    vision = arguments.vision or fetch_tower(EFFICIENTNET)
    llm = arguments.llm or fetch_tower(SMOLLM2)
    started = time.monotonic()
    print("Building the model from its towers …", flush=True)
    model, processor = join_towers(vision, llm, arguments.building)
    model.to(find_device(arguments.device))  # type: ignore[arg-type]
    images = encode_records(model, processor, records)
    print(f"Aligning adapter and projections, {arguments.alignment.steps} steps …", flush=True)
    losses = align(model, images, held_out, arguments.alignment)
    scores = evaluate(model, images, held_out)
    model.to("cpu")  # type: ignore[arg-type]  # where the clean process computes the same again
    print("Saving, loading again in a clean process, searching …", flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    folder = save_model(
        model,
        processor,
        arguments.output / "model",
        card=_state_card(arguments, scores),
    )
    found = search(model, processor, images, gallery, SENTENCES)
    differences = _verify(model, processor, records, folder, arguments.output)
    _show(found, arguments.output, scores)
    report = {
        "seconds_after_download": round(time.monotonic() - started, 1),
        "peak_rss_gb": _peak_rss_gb(),
        **scores,
        "seed": arguments.seed,
        "caption_tuned": arguments.find_adapter() is not None,
        "final_loss": round(losses[-1], 4),
        "num_images": len(records),
        "num_held_out": len(held_out),
        "largest_difference_after_loading": differences,
        "versions": _versions(),
    }
    (arguments.output / "report.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    return report


def read_images(arguments: DemoArguments) -> tuple[list[CaptionedImage], list[CaptionedImage]]:
    """Return what is trained and tested on, and what is only searched.

    Warns when the seed splits the embedded emoji otherwise than the evaluation dataset `emoji`.
    """
    if arguments.images is not None:
        return [r for r in load_records(arguments.images) if r.lang == "en"], []
    if arguments.seed != EMOJI_SEED:
        warnings.warn(
            f"Seed {arguments.seed} trains on emoji that the evaluation dataset `emoji` tests: it "
            f"is the test split of seed {EMOJI_SEED}. Do not evaluate this model on it.",
            stacklevel=3,
        )
    data = find_example_data()
    emoji = [r for r in load_records(data / "emoji") if r.lang == "en"]
    return emoji, load_records(data / "photographs")


@torch.inference_mode()
def _state_card(arguments: DemoArguments, scores: dict[str, float]) -> CardData:
    is_embedded = arguments.vision is None and arguments.llm is None
    return CardData(
        license="apache-2.0" if is_embedded else None,
        vision_license=find_license(arguments.vision) if arguments.vision else "apache-2.0",
        text_license=find_license(arguments.llm) if arguments.llm else "apache-2.0",
        training_data=(arguments.images.name if arguments.images else "embedded emoji",),
        results=(CardResult("retrieval", "things held out of the alignment", scores),),
    )


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
        images=paths,
        image_embeds=output_now.image_embeds.tolist(),
        record=output / "verified_embeddings.json",
    )


def _show(found: list[SearchResult], output: Path, scores: dict[str, float]) -> None:
    write_results_sheet(found, output / "search.png")
    note = (
        f"Unseen text to image R@1 {scores['unseen_t2i_r1']:.1%}, image to text "
        f"{scores['unseen_i2t_r1']:.1%}, chance {scores['chance_r1']:.1%}. The number "
        "under an image is its cosine with the sentence."
    )
    write_results_page(
        found, output / "search.html", title="LLM2CLIP: images by sentence", note=note
    )


def _peak_rss_gb() -> float:
    """Peak memory of this process and the largest of its children together, in 10^9 bytes."""
    kilobyte = 1 if platform.system() == "Darwin" else 1024  # macOS counts bytes
    usages = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return round(sum(resource.getrusage(u).ru_maxrss * kilobyte for u in usages) / 1e9, 2)


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "sentence-transformers", "timm")
    own = {"python": platform.python_version(), "modeling_llm2clip": __version__}
    return {**own, **{name: version(name) for name in packages}}
