"""The README.md of a model folder: the template, filled from what is in the folder."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from string import Template

from huggingface_hub import ModelCard, ModelCardData
from tokenizers import Tokenizer

from ..configuration_llm2clip import LLM2CLIPConfig
from ..data.atomic_files import write_atomically
from .model_card_data import CardData, read_card_data, relicense
from .training_state import describe_untrained
from .weights import open_model_weights

_TEMPLATE = Path(__file__).with_name("model_card_template.md")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_TASK_TAG = "image-text-retrieval"
_UNTRAINED_TAG = "untrained"
_TOWERS = {"vision": "vision_model", "text": "text_model"}
_SUMMARIES = {
    ("vision", "text"): (
        "A vision tower and a language model, each followed by a projection into one shared space "
        "of $dim dimensions."
    ),
    ("vision",): "The vision-only model, which projects into a space of $dim dimensions.",
    ("text",): "The text-only model, which projects into a space of $dim dimensions.",
}
_PIPELINES = {
    ("vision", "text"): "zero-shot-image-classification",
    ("vision",): "image-feature-extraction",
    ("text",): "feature-extraction",
}
_PURPOSE = re.compile(r"## Intended use\n.*?(?=## )", re.DOTALL)
_UNTRAINED = """## Untrained: not for use yet

This model was built from two towers and not trained. It is {state}.

Until then its similarities are random. Align it first (`llm2clip align`): the aligned model has a
card of its own, and this one is not for publication.

"""
_SNIPPETS = {
    "vision": 'images = model.encode(["path/to/image.png"])',
    "text": 'captions = model.encode(["a red apple", "a sleeping cat"])',
}


def write_model_card(folder: Path, card: CardData, *, name: str) -> None:
    """Write `README.md` with the Hub's metadata: the old one or the new one is there, always.

    Args:
        folder: Folder that holds the saved model.
        card: What the card states beside what is in the folder.
        name: What the card calls the model: the folder's last name, or its Hub id.
    """
    _write(folder, _render(folder, card, name=name))


def update_model_card(folder: Path, *, license: str | None, name: str) -> None:
    """State a license, and rename the model where nobody edited its card.

    On an edited card, name and address of another license go with it, and so does the sentence
    that this package wrote about it.

    Args:
        folder: Model folder with a card.
        license: License of the weights; None keeps the stated one.
        name: New name.

    Raises:
        ValueError: `license` is `"other"`, and the card has no name and address of it.
    """
    path = folder / "README.md"
    card = read_card_data(folder)
    stated = relicense(card, license)
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    title = re.search(r"^# (.+)$", text, re.MULTILINE)
    if not text or (title is not None and text == _render(folder, card, name=title[1])):
        write_model_card(folder, stated, name=name)
    elif stated != card:
        edited = ModelCard.load(path)
        for field in ("license", "license_name", "license_link"):
            setattr(edited.data, field, getattr(stated, field))
        edited.text = edited.text.replace(_describe_license(card), _describe_license(stated))
        _write(folder, str(edited))


def _write(folder: Path, text: str) -> None:
    write_atomically(folder / "README.md", text.encode())


def _render(folder: Path, card: CardData, *, name: str) -> str:
    config = LLM2CLIPConfig.from_pretrained(folder, local_files_only=True)
    counts = _count_parameters(folder)
    sides = tuple(side for side, tower in _TOWERS.items() if tower in counts)
    origins = {side: _name_origin(config, side) for side in sides}
    trained = config.projections_trained
    data = ModelCardData(
        **card.metadata,
        library_name="sentence-transformers",
        pipeline_tag=_PIPELINES[sides] if trained else None,
        tags=["llm2clip", "sentence-transformers", _TASK_TAG if trained else _UNTRAINED_TAG],
        base_model=[origin for origin in origins.values() if _HUB_ID.fullmatch(origin)] or None,
        datasets=[data for data in card.training_data if _HUB_ID.fullmatch(data)] or None,
        model_name=name if card.results else None,
        eval_results=card.eval_results or None,
    )
    body = Template(_choose_template(config)).substitute(
        name=name,
        summary=f"An LLM2CLIP model ([arXiv:2411.04997](https://arxiv.org/abs/2411.04997)). "
        f"{Template(_SUMMARIES[sides]).substitute(dim=config.projection_dim)}"
        + (f"\n\n**{card.caution}**" if card.caution else ""),
        parts=_format_rows(_describe_parts(folder, config, counts)),
        snippet="\n".join(
            [_SNIPPETS[side] for side in sides]
            + (["print(model.similarity(images, captions))"] if len(sides) == 2 else [])
        ),
        others="`AutoModel` and `AutoProcessor`"
        if len(sides) == 1
        else f'`AutoModel`, `AutoProcessor` and `pipeline("{_PIPELINES[sides]}")`',
        training=", ".join(card.training_data) or "Not recorded.",
        scores=_describe_scores(card),
        license=_describe_license(card),
        origins=_format_rows(_describe_origins(origins, card)),
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))


def _choose_template(config: LLM2CLIPConfig) -> str:
    """Return the template; of an untrained model, with what it lacks in place of its use."""
    text = _TEMPLATE.read_text(encoding="utf-8")
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


def _describe_tower(config: LLM2CLIPConfig, side: str, counts: dict[str, int]) -> str:
    tower = getattr(config, f"{side}_config")
    architecture = getattr(tower, "architecture", None) or tower.model_type
    return f"`{architecture}`, {_shorten(counts[_TOWERS[side]])} parameters"


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


def _describe_scores(card: CardData) -> str:
    if not card.results:
        return "None recorded."
    rows = [
        (result.task, result.dataset, name, f"{value:.4g}")
        for result in card.results
        for name, value in result.scores.items()
    ]
    head = "| task | data | score | value |\n| --- | --- | --- | --- |"
    return f"{head}\n{_format_rows(rows)}"


def _describe_license(card: CardData) -> str:
    if card.license is None:
        return "No license is stated for these weights."
    if card.license == "other":
        return f"These weights: [{card.license_name}]({card.license_link})."
    return f"These weights: {card.license}."


def _describe_origins(origins: dict[str, str], card: CardData) -> list[tuple[str, ...]]:
    names = {"vision": "vision tower", "text": "language model"}
    return [
        (
            f"{names[side]} {f'`{origin}`' if origin else '(name not recorded)'}",
            getattr(card, f"{side}_license") or "not recorded",
        )
        for side, origin in origins.items()
    ]


def _name_origin(config: LLM2CLIPConfig, side: str) -> str:
    return str(getattr(config, f"{side}_config")._name_or_path or "")


def _count_parameters(folder: Path) -> dict[str, int]:
    """Count the parameters of each direct part of the model, by the headers of its weight files."""
    counts: dict[str, int] = {}
    for name, tensor in open_model_weights(folder).items():
        part = name.split(".")[0]
        counts[part] = counts.get(part, 0) + tensor.num_elements
    return counts


def _shorten(count: int) -> str:
    for power, letter in ((9, "G"), (6, "M"), (3, "k")):
        if count >= 10**power:
            return f"{count / 10**power:.1f} {letter}"
    return str(count)


def _format_rows(rows: Sequence[tuple[str, ...]]) -> str:
    escaped = ([cell.replace("|", r"\|") for cell in row] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in escaped)
