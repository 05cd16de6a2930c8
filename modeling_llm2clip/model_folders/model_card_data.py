"""What a model card states and no weight shows: licenses, training data, results.

They stand in the metadata of the card itself, where the Hub reads them, and are read back from
there whenever the folder is written again.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # what huggingface_hub reads cards with
from huggingface_hub import EvalResult, ModelCard

from ..evaluation.labels import name_data
from ..evaluation.results import is_result, parse_result
from .fingerprint import fingerprint_model
from .model_folder import find_source_file

# What `llm2clip evaluate` tells once a language, class, category or measure: too much for a card.
_DETAILS = {"languages", "categories", "intervals", "top_1_of_class"}
_INTERVAL = {"value", "low", "high"}
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


@dataclass(frozen=True)
class CardResult:
    """What one evaluation measured.

    Attributes:
        task: what was asked, e.g. `"retrieval"`.
        dataset: what it was measured on.
        scores: name of a measure → value.
        fingerprint, dtype: of the model they were measured with, where they are known; a card
            does not keep them.
    """

    task: str
    dataset: str
    scores: Mapping[str, float]
    fingerprint: Mapping[str, str] | None = field(default=None, compare=False)
    dtype: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class CardData:
    """What is stated about a model.

    Attributes:
        license_id: of the weights: an identifier of the Hub, e.g. `"apache-2.0"`, or `"other"`.
        license_name, license_link: of a license that the Hub has no identifier for.
        vision_license, text_license: of the towers that the weights derive from, as their own
            cards say it.
        training_data: names or Hub ids of the data sets of the alignment.
        results: measured with these very weights.
        caution: what a user must know before all else, e.g. that the model is near chance.

    Raises: ValueError for a `license_id` that is none, or an `"other"` without name and link.
    """

    license_id: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    vision_license: str | None = None
    text_license: str | None = None
    training_data: tuple[str, ...] = ()
    results: tuple[CardResult, ...] = ()
    caution: str | None = None

    def __post_init__(self) -> None:
        errors = []
        if self.license_id is not None and not _LICENSE.fullmatch(self.license_id):
            errors.append(f"license_id={self.license_id!r} is no identifier like 'apache-2.0'")
        if self.license_id == "other" and not (self.license_name and self.license_link):
            errors.append("license_id='other' needs license_name and license_link")
        if errors:
            raise ValueError(
                f"{'; '.join(errors)}. The identifiers: https://huggingface.co/docs/hub/"
                "repositories-licenses."
            )

    @property
    def metadata(self) -> dict[str, Any]:
        """The fields of the card's metadata, results left out."""
        fields = {
            "license": self.license_id,
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
        """The results as the Hub's `model-index` has them, one a score."""
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


def read_card_facts(folder: Path) -> CardData:
    """Read what the card of a folder states; nothing where there is no card.

    Raises: ValueError for metadata that huggingface_hub cannot parse.
    """
    path = folder / "README.md"
    if not path.is_file():
        return CardData()
    data = _read_metadata(path)
    scores: dict[tuple[str, str], dict[str, float]] = {}
    for entry in data.eval_results or []:
        key = (entry.task_type, entry.dataset_name)
        scores.setdefault(key, {})[entry.metric_type] = entry.metric_value
    return CardData(
        license_id=data.license if isinstance(data.license, str) else None,
        license_name=data.license_name,
        license_link=data.license_link,
        vision_license=data.get("vision_license"),
        text_license=data.get("text_license"),
        training_data=tuple(data.get("training_data") or ()),
        results=tuple(CardResult(*key, found) for key, found in scores.items()),
        caution=data.get("caution"),
    )


def require_license(facts: CardData, source: str | Path) -> None:
    """Raise ValueError where no license of the weights is stated."""
    if facts.license_id is None:
        raise ValueError(
            f"{source} states no license, and nothing is published without one. Export it with "
            "--license, e.g. --license apache-2.0; the licenses of both towers must allow it "
            f"(vision tower: {facts.vision_license or 'not recorded'}, language model: "
            f"{facts.text_license or 'not recorded'})."
        )


def find_license(source: str | Path, *, revision: str | None = None) -> str | None:
    """Read the license on a tower's own card.

    Args:
        source: Hub id, folder, or a `.gguf` file in one.
    Returns: None where the card states none, or neither folder nor Hub has a card.
    """
    card = find_source_file(source, "README.md", revision=revision)
    try:
        return None if card is None else _name_license(_read_metadata(card))
    except (OSError, ValueError):  # metadata that is no metadata
        return None


def read_results(paths: Sequence[Path]) -> tuple[CardResult, ...]:
    """Read recorded evaluation results: JSON files with one object each, or a list of them.

    Each object has `task`, `set` (or `dataset`) and `scores`: numbers by name, nested at will, with
    an interval as `{"value", "low", "high"}`. A nested score is named by its path, e.g.
    `t2i.hit_rate_at_1`. What is told once a language, class or category is left to the
    file, as is everything else in it. Of what `llm2clip evaluate` wrote, the set's name says its
    language, and what it lacks.

    Raises: ValueError naming every file that is none, every score that is no finite number, and
        every task that is given twice on one data set.
    """
    results: dict[tuple[str, str], CardResult] = {}
    errors = []
    for path in paths:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            errors.append(f"{path}: {error}")
            continue
        for entry in content if isinstance(content, list) else [content]:
            try:
                result = _read_result(entry, path)
            except ValueError as error:
                errors.append(f"{path}: {error}")
                continue
            key = (result.task, result.dataset)
            if key in results:
                errors.append(f"{path}: {key[0]} on {key[1]} is given twice")
            results[key] = result
    if errors:
        raise ValueError(
            f"{'; '.join(errors)}. Wanted: JSON with 'task' and 'set' (text) and 'scores' (names "
            "and numbers), as `llm2clip evaluate` writes it."
        )
    return tuple(results.values())


def require_own_results(results: Sequence[CardResult], folder: Path) -> None:
    """Refuse results that were not measured with the folder's model.

    Raises: ValueError saying of each in what its model differs.
    """
    stated = [result for result in results if result.fingerprint is not None]
    if not stated:
        return
    wanted = fingerprint_model(folder)
    foreign = []
    for result in stated:
        measured = {"dtype": result.dtype or wanted["dtype"], **(result.fingerprint or {})}
        differing = [name for name, value in wanted.items() if measured.get(name) != value]
        if differing:
            foreign.append(f"{result.task} on {result.dataset} ({', '.join(differing)})")
    if foreign:
        raise ValueError(
            f"{'; '.join(foreign)}: not measured with the model that is to be written. Export "
            "first (another dtype makes other weights), evaluate the folder that is written, as "
            "a model of this package and in its own dtype, and give these results."
        )


def _read_result(entry: Any, path: Path) -> CardResult:
    if not isinstance(entry, dict):
        raise ValueError(f"holds {type(entry).__name__}, wanted an object")
    task, dataset = entry.get("task"), entry.get("set", entry.get("dataset"))
    absent = [name for name, value in (("task", task), ("set", dataset)) if not value]
    if absent:
        raise ValueError(f"has no {absent}")
    found = dict(_iterate_scores(entry.get("scores"), ""))
    if not found:
        raise ValueError("has no scores")
    wrong = sorted(name for name, value in found.items() if not _is_number(value))
    if wrong:
        raise ValueError(f"has scores that are no finite numbers: {wrong}")
    if not is_result(entry):
        return CardResult(str(task), str(dataset), found, entry.get("fingerprint"))
    result = parse_result(entry, path)
    dtype = result.protocol["model"]["dtype"]
    return CardResult(result.task, name_data(result), found, result.fingerprint, dtype)


def _iterate_scores(scores: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield path and value of every score; None, a list and what is told in detail are none."""
    if isinstance(scores, dict):
        if _INTERVAL <= set(scores):
            scores = {
                "": scores["value"],
                **{k: v for k, v in scores.items() if k not in _INTERVAL},
            }
        for name, value in scores.items():
            if name not in _DETAILS:
                yield from _iterate_scores(value, f"{path}.{name}".strip("."))
    elif scores is not None and not isinstance(scores, list):
        yield path, scores


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _read_metadata(card: Path) -> Any:
    try:
        return ModelCard.load(card).data
    except yaml.YAMLError as error:
        raise ValueError(
            f"{card}: its metadata is no YAML ({error}). Correct what stands between the '---'."
        ) from error


def _name_license(data: Any) -> str | None:
    stated = data.license
    if isinstance(stated, list):
        return ", ".join(map(str, stated)) or None
    return data.license_name or stated if stated == "other" else stated  # type: ignore[no-any-return]
