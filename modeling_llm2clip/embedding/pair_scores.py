"""Scores of the pairs in a file, into a CSV that an interrupted run continues."""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from ..configs.encoding_config import EncodingConfig
from ..data.atomic_files import hash_json, list_differences, require_new_file, write_atomically
from ..data.sources.json_files import read_json_lines
from ..data.validation_errors import DataValidationError, ErrorCollector
from ..encoding.score_pairs import score_pairs
from ..model_folders.fingerprint import fingerprint_embeddings
from ..model_folders.model_folder import find_model_folder
from ..model_folders.model_loading import load_model, require_trained
from ..modeling_llm2clip import LLM2CLIPModel

_FIELDS = ("image", "text")
_PAIRS_AT_ONCE = 256


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
        mean: Mean of all scores.
    """

    num_pairs: int
    num_continued: int
    mean: float


def score_file(
    source: str, pairs: str | Path, output: str | Path, config: EncodingConfig | None = None
) -> PairScores:
    """Score the pairs of a file by `score_pairs`, and write them as CSV.

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
        ValueError: The model has random parts or one tower alone, an image cannot be decoded, or
            the unfinished scores are of other pairs, another model or device.

    Examples:
        >>> score_file("my-model", "pairs.jsonl", "scores.csv")  # doctest: +SKIP
    """
    config, pairs, output = config or EncodingConfig(), Path(pairs), Path(output)
    require_new_file(output)
    found = read_pairs(pairs)
    folder = find_model_folder(source)
    model, processor = load_model(folder, device=config.device)
    require_trained(model, purpose="scoring", source=source)
    if not isinstance(model, LLM2CLIPModel):
        raise ValueError(f"{source} has one tower alone. Scores need a whole model.")
    sizes = [(pairs.parent / pair.image).stat().st_size for pair in found]
    plan = {
        "pairs": hash_json([found, sizes]),
        "model": hash_json([fingerprint_embeddings(folder, side) for side in ("text", "image")]),
        "device": model.device.type,
    }
    unfinished = output.with_name(f".{output.name}.part")
    output.parent.mkdir(parents=True, exist_ok=True)
    scores = _begin_or_continue(unfinished, plan)
    num_continued = len(scores)
    with (
        unfinished.open("a", encoding="utf-8") as file,
        tqdm(total=len(found), initial=num_continued, unit=" pairs",
             disable=not config.show_progress) as progress,
    ):  # fmt: skip
        while chunk := found[len(scores) : len(scores) + _PAIRS_AT_ONCE]:
            of_chunk = score_pairs(
                model,
                processor,
                [str(pairs.parent / pair.image) for pair in chunk],
                [pair.text for pair in chunk],
                batch_size=config.batch_size,
                num_workers=config.num_workers,
            ).tolist()
            file.write(json.dumps(of_chunk) + "\n")
            file.flush()
            os.fsync(file.fileno())
            scores += of_chunk
            progress.update(len(chunk))
    _write(output, found, scores)
    unfinished.unlink()
    return PairScores(len(found), num_continued, sum(scores) / len(scores))


def _begin_or_continue(unfinished: Path, plan: dict[str, str]) -> list[float]:
    """Return the scores of an interrupted run of the same plan; a line cut short is removed."""
    lines = unfinished.read_bytes().splitlines(keepends=True) if unfinished.exists() else []
    whole = [line for line in lines if line.endswith(b"\n")]
    if not whole:
        write_atomically(unfinished, json.dumps(plan).encode() + b"\n")
        return []
    if differences := list_differences(json.loads(whole[0]), plan):
        raise ValueError(
            f"{unfinished} has scores of another run: {'; '.join(differences)}. Give the same "
            "pairs, model and device, or remove it."
        )
    if len(whole) < len(lines):
        write_atomically(unfinished, b"".join(whole))
    return [score for line in whole[1:] for score in json.loads(line)]


def _write(output: Path, pairs: list[ScoredPair], scores: list[float]) -> None:
    content = io.StringIO(newline="")
    rows = csv.writer(content)
    rows.writerow((*_FIELDS, "score"))
    rows.writerows((*pair, f"{score:.6f}") for pair, score in zip(pairs, scores, strict=True))
    write_atomically(output, content.getvalue().encode())


def read_pairs(file: Path) -> list[ScoredPair]:
    """Read all pairs of a file, and check that the images are there."""
    errors, found = ErrorCollector(), []
    for raw in read_json_lines(file, errors):
        image, text = (raw.fields.get(name) for name in _FIELDS)
        if set(raw.fields) != set(_FIELDS) or not (
            isinstance(image, str) and isinstance(text, str)
        ):
            errors.add("not an object with the texts image and text", raw.place)
        elif not text.strip():
            errors.add("text blank", raw.place)
        elif not (file.parent / image).is_file():
            errors.add("image missing", f"{raw.place} ({image})")
        else:
            found.append(ScoredPair(image, text))
    if errors.total:
        raise DataValidationError(str(file), errors.counts, errors.places)
    if not found:
        raise ValueError(f'{file} has no pairs. A line is {{"image": "a.png", "text": "a dog"}}.')
    return found
