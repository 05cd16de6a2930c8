"""What a model card states and no weight shows: licenses, training data, results.

It is in the metadata of the card, where the Hub reads it, and is read back from there whenever the
folder is written again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml  # what huggingface_hub reads cards with
from huggingface_hub import EvalResult, ModelCard

from ..configs.export_config import CardConfig
from ..configuration_llm2clip import LLM2CLIPConfig
from .model_folder import find_source_file

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


@dataclass(frozen=True)
class CardResult:
    """What one evaluation measured.

    Attributes:
        task: What was evaluated, such as `"retrieval"`.
        dataset: What it was measured on.
        scores: Name of a measure → value.
        fingerprint: Fingerprint of the measured model, where it is known; a card does not keep it.
        dtype: Dtype that the model was measured in, likewise.
    """

    task: str
    dataset: str
    scores: Mapping[str, float]
    fingerprint: Mapping[str, str] | None = field(default=None, compare=False)
    dtype: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class CardData:
    """What a card states about a model.

    Attributes:
        license: License of the weights: an identifier of the Hub, such as `"apache-2.0"`, or
            `"other"`.
        license_name: Name of a license that the Hub has no identifier for.
        license_link: Address of it.
        vision_license: License of the vision tower, as its own card has it.
        text_license: License of the language model, likewise.
        training_data: Names or Hub ids of the datasets of the alignment.
        results: Results measured with these very weights.
        caution: What a user must know before all else, for example that the model is near chance.

    Raises:
        ValueError: `license` is not an identifier, or `"other"` without name and link.
    """

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    vision_license: str | None = None
    text_license: str | None = None
    training_data: tuple[str, ...] = ()
    results: tuple[CardResult, ...] = ()
    caution: str | None = None

    def __post_init__(self) -> None:
        errors = []
        if self.license is not None and not _LICENSE.fullmatch(self.license):
            errors.append(f"license={self.license!r} is not an identifier like 'apache-2.0'")
        if self.license == "other" and not (self.license_name and self.license_link):
            errors.append("license='other' needs license_name and license_link")
        if errors:
            raise ValueError(
                f"{'; '.join(errors)}. The identifiers: https://huggingface.co/docs/hub/"
                "repositories-licenses."
            )

    @property
    def metadata(self) -> dict[str, Any]:
        """The fields of the card's metadata, without the results."""
        fields = {
            "license": self.license,
            "license_name": self.license_name,
            "license_link": self.license_link,
            "vision_license": self.vision_license,
            "text_license": self.text_license,
            "training_data": list(self.training_data) or None,
            "caution": self.caution,
        }
        return {name: value for name, value in fields.items() if value is not None}

    @property
    def eval_results(self) -> list[EvalResult]:
        """The results as the Hub's `model-index` has them, one per score."""
        return [
            EvalResult(
                task_type=result.task,
                dataset_type=result.dataset,
                dataset_name=result.dataset,
                metric_type=name,
                metric_value=value,
            )
            for result in self.results
            for name, value in result.scores.items()
        ]


def read_card_data(folder: Path) -> CardData:
    """Read what the card of a folder states; nothing where there is no card.

    Args:
        folder: Model folder.

    Raises:
        ValueError: huggingface_hub cannot parse the metadata.
    """
    path = folder / "README.md"
    if not path.is_file():
        return CardData()
    data = _read_metadata(path)
    scores: dict[tuple[str, str], dict[str, float]] = {}
    for entry in data.eval_results or []:
        task = (entry.task_type, entry.dataset_name)
        scores.setdefault(task, {})[entry.metric_type] = entry.metric_value
    return CardData(
        license=data.license if isinstance(data.license, str) else None,
        license_name=data.license_name,
        license_link=data.license_link,
        vision_license=data.get("vision_license"),
        text_license=data.get("text_license"),
        training_data=tuple(data.get("training_data") or ()),
        results=tuple(CardResult(*task, found) for task, found in scores.items()),
        caution=data.get("caution"),
    )


def update_card_data(
    card: CardData, config: CardConfig, *, results: Sequence[CardResult] | None = None
) -> CardData:
    """Return what a card states once a config says more.

    Args:
        card: What it states so far.
        config: Fields that are given win.
        results: Results in place of the card's; None keeps those.

    Raises:
        ValueError: As `CardData`.
    """
    names = ("license_name", "license_link", "vision_license", "text_license")
    changes: dict[str, Any] = {name: getattr(config, name) for name in names}
    changes["training_data"] = config.training_data or None
    changes["results"] = None if results is None else tuple(results)
    given = {name: value for name, value in changes.items() if value is not None}
    return relicense(card, config.license, **given)


def relicense(card: CardData, license: str | None, **changes: Any) -> CardData:
    """Return what a card states under another license, without name and address of the old one.

    Args:
        card: What it states so far.
        license: License of the weights; None keeps the card's.
        **changes: Other fields, such as the new license's name and address.

    Raises:
        ValueError: As `CardData`.
    """
    if license is None or license == card.license == "other":
        return replace(card, **changes)
    fresh = {"license": license, "license_name": None, "license_link": None}
    return replace(card, **{**fresh, **changes})


def set_base_models(config: LLM2CLIPConfig, base_models: tuple[str, str] | None) -> None:
    """Name the base models in a model's configuration, which the card repeats.

    Args:
        config: Changed in place.
        base_models: Hub ids of the vision tower and of the language model; None changes nothing.
    """
    if base_models is not None:
        config.vision_config._name_or_path, config.text_config._name_or_path = base_models


def require_license(card: CardData, source: str | Path) -> None:
    """Refuse to publish a model without a license.

    Args:
        card: What its card states.
        source: How errors name the model.

    Raises:
        ValueError: No license of the weights is stated.
    """
    if card.license is None:
        raise ValueError(
            f"{source} states no license, and nothing is published without one. State it with "
            "--license, e.g. --license apache-2.0; the licenses of both towers must allow it "
            f"(vision tower: {card.vision_license or 'not recorded'}, language model: "
            f"{card.text_license or 'not recorded'})."
        )


def find_license(source: str | Path, *, revision: str | None = None) -> str | None:
    """Read the license on a tower's own card.

    Args:
        source: Hub id, folder, or a `.gguf` file in one.
        revision: Branch, tag or commit of the Hub repository.

    Returns:
        The license; None where no card states one, or the Hub cannot be reached.
    """
    card = find_source_file(source, "README.md", revision=revision)
    try:
        return None if card is None else _name_license(_read_metadata(card))
    except (OSError, ValueError):  # metadata that cannot be parsed
        return None


def _read_metadata(card: Path) -> Any:
    try:
        return ModelCard.load(card).data
    except yaml.YAMLError as error:
        raise ValueError(
            f"{card}: its metadata is not YAML ({error}). Correct the lines between the '---'."
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{card} is not UTF-8 ({error}). Save it in this encoding.") from error


def _name_license(data: Any) -> str | None:
    stated = data.license
    if isinstance(stated, list):
        return ", ".join(map(str, stated)) or None
    return data.license_name or stated if stated == "other" else stated  # type: ignore[no-any-return]
