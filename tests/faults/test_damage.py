"""The harness of damaged files: outcomes are distinguished, and mutations repeat."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from faults import damage
from faults.damage import Target, anything, run_targets
from faults.mutations import mutate


def write_numbers(folder: Path) -> Path:
    (folder / "numbers.json").write_text(json.dumps({"numbers": [1, 2, 3]}), encoding="utf-8")
    return folder / "numbers.json"


def differ_after(trouble: Callable[[Path], object]) -> Callable[[Path], object]:
    """Make a reader that meets trouble once a file is not the one that was written."""

    def read(path: Path) -> object:
        is_whole = path.is_file() and path.read_text(errors="replace") == '{"numbers": [1, 2, 3]}'
        return 6 if is_whole else trouble(path)

    return read


def raise_error(error: Exception) -> object:
    raise error


@pytest.mark.parametrize(
    ("trouble", "outcome"),
    [
        (lambda path: raise_error(ValueError(f"{path.name} is damaged.")), "refused_by_name"),
        (lambda _: raise_error(ValueError("damaged")), "unnamed"),
        (lambda path: raise_error(KeyError(path.name)), "unnamed"),
        (lambda _: os._exit(3), "unnamed"),
        (lambda _: 7, "silently_wrong"),
    ],
)
def test_outcomes_of_a_reader_are_distinguished(
    trouble: Callable[[Path], object], outcome: str, tmp_path: Path
) -> None:
    counts = run_targets([Target("numbers", write_numbers, differ_after(trouble))], tmp_path, 0, 0)
    assert (counts.cases, getattr(counts, outcome)) == (1, 1)
    assert len(counts.failures) == (outcome != "refused_by_name")


def test_a_reader_that_does_not_end_is_hung(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(damage, "_SECONDS", 0.2)
    monkeypatch.setattr(damage, "_TIMES_UNDISTURBED", 0)
    read = differ_after(lambda _: time.sleep(600))
    assert run_targets([Target("numbers", write_numbers, read)], tmp_path, 0, 0).hung == 1


def test_other_valid_data_must_be_what_an_independent_reader_reads(tmp_path: Path) -> None:
    for expect, outcome in ((lambda _: 8, "silently_wrong"), (anything, "cases")):
        target = Target("numbers", write_numbers, differ_after(lambda _: 7), expect)
        counts = run_targets([target], tmp_path, 0, 0)
        assert getattr(counts, outcome) == 1 and len(counts.failures) == (expect is not anything)


def test_a_seed_gives_the_same_damage(tmp_path: Path) -> None:
    contents = []
    for _ in range(2):
        file, rng = write_numbers(tmp_path), random.Random(3)
        described = [mutate(write_numbers(tmp_path), rng, ("fields",)) for _ in range(20)]
        contents.append((described, file.read_bytes()))
    assert contents[0] == contents[1] and len(set(contents[0][0])) > 10
