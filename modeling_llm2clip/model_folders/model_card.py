"""Write the README.md of a model folder: a template, filled in from the folder's files.

Facts that the weights do not show, such as licenses, training data and results, are in the card's
metadata, where the Hub reads them. These facts are read back whenever the folder is rewritten.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import Template
from typing import Any

import yaml  # huggingface_hub reads cards with it
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from tokenizers import Tokenizer

from ..configs.export_config import CardConfig
from ..configuration_llm2clip import LLM2CLIPConfig
from ..data.atomic_files import write_atomically
from ..data.sources.json_files import read_json
from .fingerprint import describe_prompt
from .model_folder import fetch_hub_file
from .model_loading import describe_untrained
from .weights import open_model_weights

# Where the package is published, written by `.ci/write_badges.py`. If None, cards do not name it.
ADDRESS: str | None = None
# Arguments of a dataset and a metric in the Hub's `model-index`. (`.eval_results/` only accepts
# tasks of registered benchmarks.)
_COUNT, _INTERVAL = "count", "interval_95"
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
# What `_describe_license` returns, for any license.
_STATED_LICENSE = re.compile(
    r"No license is stated for these weights\.|"
    rf"These weights: (\[.*?\]\(.*?\)|{_LICENSE.pattern})\."
)
_LICENSES = "## Licenses"
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
_UNREADABLE = (ValueError, yaml.YAMLError, RecursionError)  # raised by damaged metadata
_NOT_METADATA = ("results", "edits")
_OPTIONS = ("license_name", "license_link", "vision_license", "text_license", "training_data")
# Metadata entries that an option replaces.
_ENTRIES = {"base_models": "base_model", "training_data": "datasets"}
_PIPELINES = {
    ("vision", "text"): "zero-shot-image-classification",
    ("vision",): "image-feature-extraction",
    ("text",): "feature-extraction",
}
_PURPOSE = re.compile(r"## Intended use\n.*?(?=## )", re.DOTALL)
_UNTRAINED = """## Untrained: not for use yet

The two towers of this model are not aligned yet. It is {state}.

Until then, its similarities are random. Align it first (`llm2clip align`): the aligned model gets
its own card, and this one should not be published.

"""
_KEPT = """

Training kept the text side close to the vision tower's original text encoder for {}. Other classes
were not kept close, so their classification may be worse."""
_PACKAGE = """

The package [modeling_llm2clip]({address}) checks, evaluates, searches, serves and trains this
model. With `import modeling_llm2clip`, no remote code is needed.

```bash
pip install git+{address}
llm2clip doctor {name}
```"""
_SNIPPETS = {
    "vision": 'images = model.encode(["path/to/image.png"])',
    "text": 'captions = model.encode(["a red apple", "a sleeping cat"])',
}


@dataclass(frozen=True)
class CardResult:
    """The scores of one evaluation, by name; the dataset's name includes the language.

    `intervals` are 95 % confidence intervals (low, high), by the name of the score. `count` says
    how much was measured, such as "1,000 images, 5,000 texts". A card does not store the measured
    model's fingerprint and dtype. `entries` are the results as stated on a card, with anything that
    other people added, such as a source or a verification.
    """

    task: str
    dataset: str
    scores: Mapping[str, float]
    fingerprint: Mapping[str, str] | None = field(default=None, compare=False)
    dtype: str | None = field(default=None, compare=False)
    intervals: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    count: str | None = None
    entries: tuple[EvalResult, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class CardEdits:
    """Edits that somebody else made to a card.

    Attributes:
        metadata: Metadata entries that this package would not have written.
        sections: Sections of the body, in order; an unedited section is stored as only its heading.
    """

    metadata: Mapping[str, Any] = field(default_factory=dict)
    sections: tuple[str, ...] = ()


@dataclass(frozen=True)
class CardData:
    """The facts that a card states about a model.

    `license` is a Hub identifier, or "other" with `license_name` and `license_link`; the towers'
    licenses come from their own cards. `text_training_data` is the subset of `training_data` whose
    captions fine-tuned the language model. `language` has the codes of the captions' languages.
    `results` were measured with exactly these weights. `kept_texts` names the texts whose
    embeddings the last training kept close to CLIP's. `caution` is a warning that users must see
    first, for example that the model is near chance.
    """

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    vision_license: str | None = None
    text_license: str | None = None
    training_data: tuple[str, ...] = ()
    text_training_data: tuple[str, ...] = ()
    language: tuple[str, ...] = ()
    results: tuple[CardResult, ...] = ()
    kept_texts: str | None = None
    caution: str | None = None
    edits: CardEdits = field(default=CardEdits(), compare=False)

    def __post_init__(self) -> None:
        errors = []
        for name, value in vars(self).items():
            texts = value if isinstance(value, tuple) else () if value is None else (value,)
            if name not in _NOT_METADATA and not all(isinstance(text, str) for text in texts):
                errors.append(f"{name}={value!r} is not a string")
        if isinstance(self.license, str) and not _LICENSE.fullmatch(self.license):
            errors.append(f"license={self.license!r} is not an identifier like 'apache-2.0'")
        if self.license == "other" and not (self.license_name and self.license_link):
            errors.append("license='other' needs license_name and license_link")
        if errors:
            raise ValueError(
                f"{'; '.join(errors)}. License identifiers: https://huggingface.co/docs/hub/"
                "repositories-licenses."
            )

    @property
    def metadata(self) -> dict[str, Any]:
        stated = {n: v for n, v in vars(self).items() if n not in _NOT_METADATA}
        lists = {n: list(value) or None for n, value in stated.items() if isinstance(value, tuple)}
        return {n: value for n, value in {**stated, **lists}.items() if value is not None}

    @property
    def eval_results(self) -> list[EvalResult]:
        """Results in the format of the Hub's `model-index`, one per score."""
        return [entry for result in self.results for entry in result.entries or _enter(result)]


def _enter(result: CardResult) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=result.task,
            dataset_type=result.dataset,
            dataset_name=result.dataset,
            metric_type=name,
            metric_value=value,
            dataset_args={_COUNT: result.count} if result.count else None,
            metric_args=(
                {_INTERVAL: list(result.intervals[name])} if name in result.intervals else None
            ),
        )
        for name, value in result.scores.items()
    ]


def read_card_data(folder: Path, *, training_alone: bool = False) -> CardData:
    """Read the facts that a folder's card states, or only its training data."""
    path = folder / "README.md"
    if not path.is_file():
        return CardData()
    try:
        data = ModelCard.load(path).data
        if training_alone:
            return CardData(training_data=_list_texts(data, "training_data"))
        return _make_card(data)
    except (*_UNREADABLE, LookupError, TypeError, AttributeError) as error:
        reason = str(error).partition(" Pass ")[0]  # an option of huggingface_hub
        raise ValueError(
            f"{path}: invalid metadata ({reason}). Correct the lines between the '---'."
        ) from error


def _make_card(data: Any) -> CardData:
    entries: dict[tuple[str | None, ...], list[EvalResult]] = {}
    for entry in data.eval_results or []:
        key = (entry.task_type, entry.dataset_name, entry.dataset_config, entry.dataset_split)
        entries.setdefault(key, []).append(entry)
    return CardData(
        license=data.license,
        license_name=data.license_name,
        license_link=data.license_link,
        vision_license=data.get("vision_license"),
        text_license=data.get("text_license"),
        training_data=_list_texts(data, "training_data"),
        text_training_data=_list_texts(data, "text_training_data"),
        language=_list_texts(data, "language"),
        results=tuple(
            CardResult(
                scores[0].task_type,
                scores[0].dataset_name,
                {score.metric_type: float(score.metric_value) for score in scores},
                intervals={
                    score.metric_type: tuple(args[_INTERVAL])
                    for score in scores
                    if (args := score.metric_args) and _INTERVAL in args
                },
                count=(scores[0].dataset_args or {}).get(_COUNT),
                entries=tuple(scores),
            )
            for scores in entries.values()
        ),
        kept_texts=data.get("kept_texts"),
        caution=data.get("caution"),
    )


def _list_texts(data: Any, name: str) -> tuple[str, ...]:
    stated = data.get(name) or []  # another package's card may have a single value
    return tuple(stated) if isinstance(stated, list) else (stated,)


def read_edited_card(folder: Path) -> CardData:
    """Read the facts on a model folder's card, and the edits that somebody else made."""
    card = read_card_data(folder)
    if not (folder / "README.md").is_file():
        return card
    edited = ModelCard.load(folder / "README.md")
    rendered = ModelCard(_render(folder, card, name=find_name(folder)))
    written, sections = rendered.data.to_dict(), dict(_split(rendered.text))
    entries = edited.data.to_dict().items()
    metadata = {k: v for k, v in entries if k != "model-index" and written.get(k) != v}
    parts = []
    for heading, text in _split(edited.text):
        if sections.get(heading) == text:
            text = heading
        elif heading == _LICENSES:  # if only the metadata was edited, this states the old license
            text = _STATED_LICENSE.sub("\0", text, count=1)
        parts.append(text)
    return replace(card, edits=CardEdits(metadata, tuple(parts)))


def find_name(folder: Path) -> str:
    """Find the model's name in the code snippet of a folder's card."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    name = re.search(r'SentenceTransformer\(\s*"(.+)"', text)
    return name[1] if name else ""


def _split(body: str) -> list[tuple[str, str]]:
    """Split a card's body into sections, (heading, text); the first section has no heading."""
    first, *others = re.split(r"^(?=## )", body, flags=re.MULTILINE)
    return [("", first), *((part.partition("\n")[0], part) for part in others)]


def read_card_of_trained(
    folder: Path, training_data: Sequence[str], languages: Sequence[str] = ()
) -> CardData:
    """Read the facts on a card that still hold after training on more data.

    Languages are shortened to the first part of their tags (BCP 47), as the Hub requires.
    """
    stated = read_card_data(folder)
    data = dict.fromkeys((*stated.training_data, *training_data))
    codes = [lang.split("-")[0].lower() for lang in languages]
    language = dict.fromkeys((*stated.language, *(c for c in codes if len(c) in (2, 3))))
    return replace(
        stated, results=(), kept_texts=None, caution=None,
        training_data=tuple(data), language=tuple(language),
    )  # fmt: skip


def update_card_data(
    card: CardData, config: CardConfig, *, results: Sequence[CardResult] | None = None
) -> CardData:
    """Return a card's facts, updated by the options of a config.

    `results` replace the card's results; None keeps the card's results.
    """
    options = config.list_given()
    stated: dict[str, Any] = {name: getattr(config, name) for name in options if name in _OPTIONS}
    replaced = {_ENTRIES.get(name) for name in options}
    metadata = {k: v for k, v in card.edits.metadata.items() if k not in replaced}
    stated["edits"] = replace(card.edits, metadata=metadata)
    if results is not None:
        stated["results"] = tuple(results)
    return relicense(card, config.license, **stated)


def relicense(card: CardData, license: str | None, **changes: Any) -> CardData:
    """Return a card's facts with a new license, without the old license's name and link."""
    if license is None or license == card.license == "other":
        return replace(card, **changes)
    fresh = {"license": license, "license_name": None, "license_link": None}
    return replace(card, **{**fresh, **changes})


def set_base_models(config: LLM2CLIPConfig, base_models: tuple[str, str] | None) -> None:
    """Record the names of the vision tower and the LLM in the configuration, for the card."""
    if base_models is not None:
        config.vision_config._name_or_path, config.text_config._name_or_path = base_models


def require_license(card: CardData, source: str | Path) -> None:
    if card.license is None:
        raise ValueError(
            f"{source} states no license, and nothing is published without one. Set --license, "
            "e.g. --license apache-2.0; the licenses of both towers must allow it "
            f"(vision tower: {card.vision_license or 'not recorded'}, language model: "
            f"{card.text_license or 'not recorded'})."
        )


def find_license(source: str | Path, *, revision: str | None = None) -> str | None:
    """Read the license from a tower's own card: in its folder, next to its weight file, or on the
    Hub.

    None if no card states a license, or the Hub cannot be reached.
    """
    path = Path(source)
    if path.exists():
        card: Path | None = (path if path.is_dir() else path.parent) / "README.md"
    else:
        repository = path.parent if path.suffix == ".gguf" else path
        card = fetch_hub_file(repository, "README.md", revision=revision)
    try:
        if card is None or not card.is_file():
            return None
        data = ModelCard.load(card).data
    except (OSError, *_UNREADABLE):
        return None
    stated: Any = data.license
    if isinstance(stated, list):
        return ", ".join(map(str, stated)) or None
    named: str | None = (data.license_name or stated) if stated == "other" else stated
    return named


def write_model_card(folder: Path, card: CardData, *, name: str) -> None:
    """Write `README.md` with the Hub's metadata; an interrupted write leaves the old card."""
    write_atomically(folder / "README.md", _render(folder, card, name=name).encode())


def _render(folder: Path, card: CardData, *, name: str) -> str:
    config = LLM2CLIPConfig.from_pretrained(folder, local_files_only=True)
    counts = Counter[str]()  # parameters of each direct part of the model
    for weight, tensor in open_model_weights(folder).items():
        counts[weight.split(".")[0]] += tensor.num_elements
    sides = tuple(side for side, tower in _TOWERS.items() if tower in counts)
    origins = {side: getattr(config, f"{side}_config")._name_or_path or "" for side in sides}
    trained = config.projections_trained
    tags = ["llm2clip", "transformers", "sentence-transformers"]
    data = ModelCardData(
        **card.metadata,
        library_name="transformers",  # the Hub knows all of its pipelines below
        pipeline_tag=_PIPELINES[sides] if trained else None,
        tags=[*tags, _TASK_TAG if trained else _UNTRAINED_TAG],
        **name_base_models(*origins.values()),
        datasets=[data for data in card.training_data if _HUB_ID.fullmatch(data)] or None,
        model_name=name if card.results else None,
        eval_results=card.eval_results or None,
    )
    body = Template(_choose_template(config)).substitute(
        name=name,
        summary=f"An LLM2CLIP model ([arXiv:2411.04997](https://arxiv.org/abs/2411.04997)). "
        f"{Template(_SUMMARIES[sides]).substitute(dim=config.projection_dim)}"
        + (f"\n\n**{card.caution}**" if card.caution else ""),
        parts=format_rows(_describe_parts(folder, config, counts)),
        snippet="\n".join(
            [_SNIPPETS[side] for side in sides]
            + (["print(model.similarity(images, captions))"] if len(sides) == 2 else [])
        ),
        package=_PACKAGE.format(address=ADDRESS, name=name) if ADDRESS else "",
        others="`AutoModel` and `AutoProcessor`"
        if len(sides) == 1
        else f'`AutoModel`, `AutoProcessor` and `pipeline("{_PIPELINES[sides]}")`',
        training=(", ".join(card.training_data) or "Not recorded.")
        + (_KEPT.format(card.kept_texts) if card.kept_texts and "text" in sides else ""),
        scores=_describe_scores(card),
        license=_describe_license(card),
        origins=format_rows(_describe_origins(origins, card)),
    )
    sections = dict(_split(body))
    kept = "".join(sections.get(part, part) for part in card.edits.sections)
    metadata = ModelCardData(**{**data.to_dict(), **card.edits.metadata})
    # U+0085 is a line break in YAML and would be read back as a space.
    text = re.sub("\x85 *", " ", f"---\n{metadata.to_yaml()}\n---\n\n{kept.lstrip() or body}")
    return str(ModelCard(text.replace("\0", _describe_license(card))))


def name_base_models(*names: str, relation: str = "finetune") -> dict[str, Any]:
    """Return metadata that names the models a model was built from, if they are on the Hub.

    Without a stated relation, the Hub would show a model with two base models as a merge.
    """
    parts = (part for name in names for part in name.split("+"))  # joined vision towers
    on_hub = [part for part in parts if _HUB_ID.fullmatch(part)]
    return {"base_model": on_hub, "base_model_relation": relation} if on_hub else {}


def _choose_template(config: LLM2CLIPConfig) -> str:
    """Return the template; for an untrained model, a warning replaces the intended use."""
    text = _TEMPLATE.read_text(encoding="utf-8")
    state = describe_untrained(config)
    if state is None:
        return text
    note = f"Part of the model is {state}.\n\n"
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
        rows.append(("texts", f"at most {config.max_text_length} tokens, including the prompt"))
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
        return "preprocessed by an image processor that is not in the folder"
    settings = read_json(path)["image_processor"]
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
    prefix, suffix = describe_prompt(Tokenizer.from_file(str(folder / "tokenizer.json")), config)
    if not (prefix or suffix):
        return "none"
    return f"`{prefix!r}` text `{suffix!r}`, written into the tokenizer"


def _describe_scores(card: CardData) -> str:
    if not card.results:
        return "None recorded."
    rows = [
        (result.task, result.dataset, result.count or "not stated", name, f"{value:.4g}",
         " to ".join(f"{bound:.4g}" for bound in result.intervals.get(name, ())))
        for result in card.results
        for name, value in result.scores.items()
    ]  # fmt: skip
    head = "| task | data | count | score | value | 95 % interval |\n|" + " --- |" * 6
    return f"{head}\n{format_rows(rows)}"


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


def _shorten(count: int) -> str:
    for power, letter in ((9, "G"), (6, "M"), (3, "k")):
        if count >= 10**power:
            return f"{count / 10**power:.1f} {letter}"
    return str(count)


def format_rows(rows: Sequence[tuple[str, ...]]) -> str:
    escaped = ([cell.replace("|", r"\|") for cell in row] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in escaped)
