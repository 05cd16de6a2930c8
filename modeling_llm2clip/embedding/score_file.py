"""Scores of the pairs in a file, into a CSV that an interrupted run continues."""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from tqdm import tqdm

from ..configs.encoding_config import EncodingConfig
from ..data.atomic_files import (
    hash_file,
    hash_json,
    list_differences,
    lock_unless_held,
    require_new_file,
    write_atomically,
)
from ..data.sources.json_files import read_json_lines
from ..data.validation_errors import DataValidationError, ErrorCollector
from ..encoding.encode import score_pairs
from ..encoding.tokenized_texts import TokenizedTexts
from ..model_folders.fingerprint import fingerprint_embeddings
from ..model_folders.model_folder import find_model_folder
from ..model_folders.model_loading import load_model, require_trained
from ..modeling_llm2clip import LLM2CLIPModel
from ..processing_llm2clip import LLM2CLIPProcessor

_FIELDS = ("image", "text")
_PAIRS_AT_ONCE = 256
_CHARACTERS_SHOWN = 80


class ScoredPair(NamedTuple):
    """A line of a file of pairs: an image, by its path as it is written there, and a text."""

    image: str
    text: str


@dataclass(frozen=True)
class PairScores:
    """Summary of a CSV of scores.

    Attributes:
        num_pairs: Pairs in all.
        num_continued: Pairs that an earlier, interrupted run had scored.
        num_truncated: Pairs whose text is longer than the model reads.
        max_text_length: Tokens of a text that it reads.
        mean: Mean of all scores.
    """

    num_pairs: int
    num_continued: int
    num_truncated: int
    max_text_length: int
    mean: float


def score_file(
    source: str, pairs: str | Path, output: str | Path, config: EncodingConfig | None = None
) -> PairScores:
    """Score the pairs of a file as `score_pairs` does, and write them as CSV.

    Until all pairs are scored, the scores are in `.NAME.part` beside the CSV, which the same call
    continues.

    Args:
        source: Folder or Hub id of a whole LLM2CLIP model.
        pairs: JSON lines with `image`, a path, absolute or from the file's folder, and `text`.
        output: New CSV file, with the columns `image`, `text` and `score`.
        config: How the model is run; None for the defaults.

    Returns:
        Their number and mean.

    Raises:
        DataValidationError: A line is not a pair, or its image is not there; before the model is
            loaded.
        FileExistsError: The output exists.
        FileNotFoundError: There is no such file of pairs.
        ValueError: Another run writes this output, the model has random parts or one tower alone,
            an image cannot be decoded, or the unfinished scores are of other pairs, another model
            or device.

    Examples:
        >>> score_file("my-model", "pairs.jsonl", "scores.csv")  # doctest: +SKIP
    """
    config, pairs, output = config or EncodingConfig(), Path(pairs), Path(output)
    require_new_file(output)
    scored = read_pairs(pairs)
    folder = find_model_folder(source)
    model, processor = load_model(folder, device=config.device)
    require_trained(model, purpose="scoring", source=source)
    if not isinstance(model, LLM2CLIPModel):
        raise ValueError(f"{source} has one tower alone. Scores need a whole model.")
    hashes = {name: hash_file(pairs.parent / name) for name in {pair.image for pair in scored}}
    plan = {
        "pairs": hash_json([scored, hashes]),
        "model": hash_json([fingerprint_embeddings(folder, side) for side in ("text", "image")]),
        "device": model.device.type,
    }
    unfinished = output.with_name(f".{output.name}.part")
    output.parent.mkdir(parents=True, exist_ok=True)
    tokens = TokenizedTexts(processor, [pair.text for pair in scored])
    images = [str(pairs.parent / pair.image) for pair in scored]
    with unfinished.open("a+b") as file:
        if not lock_unless_held(unfinished, file):
            raise ValueError(f"Another run writes {unfinished}. Wait, or name another output.")
        scores = _begin_or_continue(file, unfinished, plan)
        num_continued = len(scores)
        _score_rest((model, processor), images, tokens, scores, file, config)
        _write(output, scored, scores)
        unfinished.unlink()
    mean, longest = sum(scores) / len(scores), processor.longest_text
    return PairScores(len(scored), num_continued, tokens.num_truncated, longest, mean)


def _score_rest(
    model: tuple[LLM2CLIPModel, LLM2CLIPProcessor],
    images: list[str],
    texts: TokenizedTexts,
    scores: list[float],
    file: IO[bytes],
    config: EncodingConfig,
) -> None:
    """Score the pairs that have no score yet, and keep some hundred scores at a time in a file."""
    with tqdm(
        total=len(images), initial=len(scores), unit=" pairs", disable=not config.show_progress
    ) as progress:
        while len(scores) < len(images):
            rows = range(len(images))[len(scores) : len(scores) + _PAIRS_AT_ONCE]
            new = score_pairs(
                *model, [images[row] for row in rows], [texts[row] for row in rows],
                batch_size=config.batch_size, num_workers=config.num_workers,
            ).tolist()  # fmt: skip
            file.write(json.dumps(new).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            scores += new
            progress.update(len(new))


def _begin_or_continue(file: IO[bytes], name: Path, plan: dict[str, str]) -> list[float]:
    """Return the scores of an interrupted run of the same plan; a line cut short is removed."""
    file.seek(0)
    lines = [line for line in file.read().splitlines(keepends=True) if line.endswith(b"\n")]
    file.truncate(sum(map(len, lines)))
    if not lines:
        file.write(json.dumps(plan).encode() + b"\n")
        return []
    try:
        earlier, *scores = map(json.loads, lines)
        differences = list_differences(earlier, plan)
    except (ValueError, TypeError):
        differences = ["it cannot be read"]
    if differences:
        raise ValueError(
            f"{name} has scores of another run: {'; '.join(differences)}. Give the same pairs, "
            "model and device, or remove it."
        )
    return [score for part in scores for score in part]


def _write(output: Path, pairs: list[ScoredPair], scores: list[float]) -> None:
    content = io.StringIO(newline="")
    rows = csv.writer(content)
    rows.writerow((*_FIELDS, "score"))
    rows.writerows((*pair, f"{score:.6f}") for pair, score in zip(pairs, scores, strict=True))
    write_atomically(output, content.getvalue().encode())


def read_pairs(file: Path) -> list[ScoredPair]:
    """Read all pairs of a file, and check that the images are there."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file. Give JSON lines with image and text.")
    errors, scored = ErrorCollector(), []
    for raw in read_json_lines(file, errors):
        image, text = (raw.fields.get(name) for name in _FIELDS)
        if set(raw.fields) != set(_FIELDS) or not (
            isinstance(image, str) and isinstance(text, str)
        ):
            errors.add("not an object with the texts image and text", raw.place)
        elif not text.strip():
            errors.add("text blank", raw.place)
        elif not _is_file(file.parent / image):
            errors.add("image missing", f"{raw.place} ({image[:_CHARACTERS_SHOWN]})")
        else:
            scored.append(ScoredPair(image, text))
    if errors.total:
        raise DataValidationError(str(file), errors.counts, errors.places)
    if not scored:
        raise ValueError(f'{file} has no pairs. A line is {{"image": "a.png", "text": "a dog"}}.')
    return scored


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a text in place of a path may be too long for one
        return False
