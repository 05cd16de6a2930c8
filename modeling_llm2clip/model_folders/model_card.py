"""The README.md of a model folder: the template, filled from what is in the folder."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from math import prod
from pathlib import Path
from string import Template

from huggingface_hub import ModelCard, ModelCardData
from safetensors import safe_open
from tokenizers import Tokenizer

from ..configuration_llm2clip import LLM2CLIPConfig
from .golden_embeddings import GOLDEN_FILE
from .model_card_data import CardData
from .training_state import describe_untrained

TEMPLATE = Path(__file__).with_name("model_card_template.md")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_TASK_TAG = "image-text-retrieval"
_UNTRAINED_TAG = "untrained"
_TOWERS = {"vision": "vision_model", "text": "text_model"}
_SUMMARIES = {
    ("vision", "text"): (
        "A vision tower and a language model, each followed by a projection into one shared space "
        "of $dim dimensions."
    ),
    ("vision",): "The image half alone, which projects into a space of $dim dimensions.",
    ("text",): "The text half alone, which projects into a space of $dim dimensions.",
}
_PIPELINES = {
    ("vision", "text"): "zero-shot-image-classification",
    ("vision",): "image-feature-extraction",
    ("text",): "feature-extraction",
}
_PURPOSE = re.compile(r"## Intended use\n.*?(?=## )", re.DOTALL)
_UNTRAINED = """## Untrained: not for use yet

This model was put together and not trained. It is {state}.

Until then its similarities are random numbers. It must be aligned first; what comes of that has a
card of its own, and this one is not for publication.

"""
_SNIPPETS = {
    "vision": 'images = model.encode(["path/to/image.png"])',
    "text": 'captions = model.encode(["a red apple", "a sleeping cat"])',
}


def write_model_card(folder: Path, facts: CardData, *, name: str) -> None:
    """Write `README.md` with the Hub's metadata.

    Args:
        folder: Holds the saved model already.
        facts: What the card states beside what it reads in the folder.
        name: Name of the model on the card: the folder's last name, or its Hub id.
    """
    card = render_model_card(folder, facts, name=name)
    (folder / "README.md").write_text(card, encoding="utf-8")


def render_model_card(folder: Path, facts: CardData, *, name: str) -> str:
    """Return what `write_model_card` writes.

    Args:
        folder: As there.
        facts: As there.
        name: As there.
    """
    config = LLM2CLIPConfig.from_pretrained(folder, local_files_only=True)
    counts = _count_parameters(folder)
    halves = tuple(half for half, tower in _TOWERS.items() if tower in counts)
    origins = {half: _name_origin(config, half) for half in halves}
    trained = config.projections_trained
    data = ModelCardData(
        **facts.metadata,
        library_name="sentence-transformers",
        pipeline_tag=_PIPELINES[halves] if trained else None,
        tags=["llm2clip", "sentence-transformers", _TASK_TAG if trained else _UNTRAINED_TAG],
        base_model=[origin for origin in origins.values() if _HUB_ID.fullmatch(origin)] or None,
        datasets=[data for data in facts.training_data if _HUB_ID.fullmatch(data)] or None,
        model_name=name if facts.results else None,
        eval_results=facts.eval_results or None,
    )
    body = Template(_choose_template(config)).substitute(
        name=name,
        summary=f"An LLM2CLIP model ([arXiv:2411.04997](https://arxiv.org/abs/2411.04997)). "
        f"{Template(_SUMMARIES[halves]).substitute(dim=config.projection_dim)}"
        + (f"\n\n**{facts.caution}**" if facts.caution else ""),
        parts=_draw(_describe_parts(folder, config, counts)),
        snippet="\n".join(
            [_SNIPPETS[half] for half in halves]
            + (["print(model.similarity(images, captions))"] if len(halves) == 2 else [])
        ),
        others="`AutoModel` and `AutoProcessor`"
        if len(halves) == 1
        else f'`AutoModel`, `AutoProcessor` and `pipeline("{_PIPELINES[halves]}")`',
        training=", ".join(facts.training_data) or "Not recorded.",
        scores=_describe_scores(facts),
        license=_describe_license(facts),
        origins=_draw(_describe_origins(origins, facts)),
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))


def _choose_template(config: LLM2CLIPConfig) -> str:
    """The template; of an untrained model, what it lacks in place of its intended use."""
    text = TEMPLATE.read_text(encoding="utf-8")
    state = describe_untrained(config)
    if state is None:
        return text
    note = f"The model is in part {state}.\n\n"
    if config.projections_trained:
        return _PURPOSE.sub(lambda purpose: purpose[0] + note, text)
    return _PURPOSE.sub(_UNTRAINED.format(state=state), text)


def _describe_parts(
    folder: Path, config: LLM2CLIPConfig, counts: dict[str, int]
) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    if "vision_model" in counts:
        rows.append(("vision tower", _describe_tower(config, "vision", counts)))
        rows.append(("images", _describe_images(folder)))
    if "text_model" in counts:
        direction = "bidirectional" if config.bidirectional else "causal"
        pooling = f"{direction}, pooling `{config.text_pooling}`"
        rows.append(("language model", f"{_describe_tower(config, 'text', counts)}, {pooling}"))
        rows.append(("prompt", _describe_prompt(folder, config)))
        rows.append(("texts", f"at most {config.max_text_length} tokens, prompt included"))
    total = sum(counts.values())
    rows.append(("weights", f"{_shorten(total)} parameters, {str(config.dtype)[6:]}"))
    return rows


def _describe_tower(config: LLM2CLIPConfig, half: str, counts: dict[str, int]) -> str:
    tower = getattr(config, f"{half}_config")
    architecture = getattr(tower, "architecture", None) or tower.model_type
    return f"`{architecture}`, {_shorten(counts[_TOWERS[half]])} parameters"


def _describe_images(folder: Path) -> str:
    path = folder / "processor_config.json"
    if not path.is_file():
        return "prepared by an image processor that is not in the folder"
    settings = json.loads(path.read_text(encoding="utf-8"))["image_processor"]
    size = settings.get("crop_size") if settings.get("do_center_crop") else settings.get("size")
    shown = (
        f"{size['height']} × {size['width']} pixels"
        if size and "height" in size
        else f"at most {settings['max_num_patches']} patches"
        if "max_num_patches" in settings
        else f"size {size}"
    )
    return f"{shown}, mean {settings['image_mean']}, std {settings['image_std']}"


def _describe_prompt(folder: Path, config: LLM2CLIPConfig) -> str:
    if not (config.prompt_prefix_ids or config.prompt_suffix_ids):
        return "none"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prefix, suffix = (
        tokenizer.decode(ids, skip_special_tokens=False)
        for ids in (config.prompt_prefix_ids, config.prompt_suffix_ids)
    )
    return f"`{prefix!r}` text `{suffix!r}`, written into the tokenizer"


def _describe_scores(facts: CardData) -> str:
    if not facts.results:
        return "None recorded."
    rows = [
        (result.task, result.dataset, name, f"{value:.4g}")
        for result in facts.results
        for name, value in result.scores.items()
    ]
    return "\n".join(["| task | data | score | value |", "| --- | --- | --- | --- |", _draw(rows)])


def _describe_license(facts: CardData) -> str:
    if facts.license_id is None:
        return "No license is stated for these weights."
    if facts.license_id == "other":
        return f"These weights: [{facts.license_name}]({facts.license_link})."
    return f"These weights: {facts.license_id}."


def _describe_origins(origins: dict[str, str], facts: CardData) -> list[tuple[str, ...]]:
    kinds = {"vision": "vision tower", "text": "language model"}
    return [
        (
            f"{kinds[half]} {f'`{origin}`' if origin else '(name not recorded)'}",
            getattr(facts, f"{half}_license") or "not recorded",
        )
        for half, origin in origins.items()
    ]


def _name_origin(config: LLM2CLIPConfig, half: str) -> str:
    return str(getattr(config, f"{half}_config")._name_or_path or "")


def _count_parameters(folder: Path) -> dict[str, int]:
    """Parameters of each direct part of the model, from the heads of the weight files."""
    counts: dict[str, int] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if path.name == GOLDEN_FILE:
            continue
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                part = name.split(".")[0]
                size = prod(file.get_slice(name).get_shape())
                counts[part] = counts.get(part, 0) + size
    return counts


def _shorten(count: int) -> str:
    for power, letter in ((9, "G"), (6, "M"), (3, "k")):
        if count >= 10**power:
            return f"{count / 10**power:.1f} {letter}"
    return str(count)


def _draw(rows: Sequence[tuple[str, ...]]) -> str:
    escaped = ([cell.replace("|", r"\|") for cell in row] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in escaped)
