"""Score the pairs in a file and write a CSV."""

from __future__ import annotations

import csv
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from ..configs.encoding_config import EncodingConfig
from ..data.atomic_files import atomic_file, require_new_file
from ..data.sources.json_files import read_json_lines
from ..data.validation_errors import DataValidationError, ErrorCollector
from ..encoding.encode import score_pairs
from ..encoding.tokenized_texts import TokenizedTexts
from ..model_folders.model_folder import find_model_folder
from ..model_folders.model_loading import load_model, require_trained
from ..modeling_llm2clip import LLM2CLIPModel

_FIELDS = ("image", "text")
_PAIRS_AT_ONCE = 256
_CHARACTERS_SHOWN = 80


class ScoredPair(NamedTuple):
    """A line of a file of pairs: an image's path, as written in the file, and a text."""

    image: str
    text: str


@dataclass(frozen=True)
class PairScores:
    """Summary of a CSV of scores.

    Attributes:
        num_pairs: Number of pairs.
        num_truncated: Number of pairs whose text exceeds the model's maximum length.
        max_text_length: The model's maximum length of a text, in tokens.
        mean: Mean of all scores.
    """

    num_pairs: int
    num_truncated: int
    max_text_length: int
    mean: float


def score_file(
    source: str, pairs: str | Path, output: str | Path, config: EncodingConfig | None = None
) -> PairScores:
    """Score the pairs of a file with `score_pairs`, and write a CSV once all are scored.

    Args:
        source: Folder or Hub id of a whole LLM2CLIP model.
        pairs: JSON lines with `image`, a path (absolute or relative to the file), and `text`.
        output: New CSV file, with the columns `image`, `text` and `score`.
        config: How to run the model; None for the defaults.

    Returns:
        A summary of the scores.

    Raises:
        DataValidationError: A line is not a pair, or its image is missing (checked before the
            model is loaded).
        FileExistsError: The output exists.
        FileNotFoundError: There is no such file of pairs.
        ValueError: The model has untrained parts or only one tower, or an image cannot be decoded.

    Examples:
        >>> score_file("my-model", "pairs.jsonl", "scores.csv")  # doctest: +SKIP
    """
    config, pairs, output = config or EncodingConfig(), Path(pairs), Path(output)
    require_new_file(output)
    scored = read_pairs(pairs)
    folder = find_model_folder(source)
    model, processor = load_model(folder, device=config.device, precision=config.precision)
    require_trained(model.config, purpose="scoring", source=source)
    if not isinstance(model, LLM2CLIPModel):
        raise ValueError(f"{source} has only one tower. Scores need a whole model.")
    tokens = TokenizedTexts(processor, [pair.text for pair in scored])
    scores: list[float] = []
    with tqdm(total=len(scored), unit=" pairs", disable=not config.show_progress) as progress:
        for start in range(0, len(scored), _PAIRS_AT_ONCE):
            rows = range(len(scored))[start : start + _PAIRS_AT_ONCE]
            scores += score_pairs(
                model,
                processor,
                [str(pairs.parent / scored[row].image) for row in rows],
                [tokens[row] for row in rows],
                batch_size=config.batch_size,
            ).tolist()
            progress.update(len(rows))
    _write(output, scored, scores)
    mean, longest = sum(scores) / len(scores), processor.longest_text
    return PairScores(len(scored), tokens.num_truncated, longest, mean)


def _write(output: Path, pairs: list[ScoredPair], scores: list[float]) -> None:
    content = io.StringIO(newline="")
    rows = csv.writer(content)
    rows.writerow((*_FIELDS, "score"))
    rows.writerows((*pair, f"{score:.6f}") for pair, score in zip(pairs, scores, strict=True))
    with atomic_file(output) as file:
        file.write(content.getvalue().encode())


def read_pairs(file: Path) -> list[ScoredPair]:
    """Read all pairs of a file, and check that the images exist."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist. Pass JSON lines with image and text.")
    errors, scored = ErrorCollector(), []
    for raw in read_json_lines(file, errors):
        image, text = (raw.fields.get(name) for name in _FIELDS)
        if set(raw.fields) != set(_FIELDS) or not (
            isinstance(image, str) and isinstance(text, str)
        ):
            errors.add("not an object with the strings image and text", raw.place)
        elif not text.strip():
            errors.add("text blank", raw.place)
        elif not os.path.isfile(file.parent / image):  # noqa: PTH113  # False for an overlong name
            errors.add("image missing", f"{raw.place} ({image[:_CHARACTERS_SHOWN]})")
        else:
            scored.append(ScoredPair(image, text))
    if errors.total:
        raise DataValidationError(str(file), errors.counts, errors.places)
    if not scored:
        raise ValueError(
            f'{file} has no pairs. Write lines like {{"image": "a.png", "text": "a dog"}}.'
        )
    return scored
