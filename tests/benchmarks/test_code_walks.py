"""A way counts each function once, and one step of a training is that step alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.codebase.code_walks import Function, count_moves, walk

ROOT = Path(__file__).parents[2]


def test_a_move_leads_into_another_file_and_a_reentry_into_a_known_one() -> None:
    files = ["a.py", "a.py", "b.py", "a.py", "c.py", "c.py", "b.py"]
    functions = [Function(file, f"name_{n}", n) for n, file in enumerate(files)]
    counts = count_moves(functions)
    assert counts == {"functions": 7, "files": 3, "moves": 4, "re_entries": 2}
    assert count_moves([]) == {"functions": 0, "files": 0, "moves": 0, "re_entries": 0}


@pytest.mark.slow  # a process that aligns twice
def test_the_way_of_a_pair_is_one_step_without_what_surrounds_it() -> None:
    functions, _ = walk(ROOT, "pair")
    names = {(function.file, function.name) for function in functions}
    assert ("training/alignment/alignment_trainer.py", "compute_loss") in names
    assert ("training/losses/pairs.py", "forward") in names
    assert not [file for file, _ in names if file == "training/alignment/align.py"]
    assert len(functions) == len(set(functions))


@pytest.mark.slow
def test_what_a_way_leaves_out_is_loading() -> None:
    functions, left_out = walk(ROOT, "image")
    assert any(function.file.startswith("model_folders/") for function in left_out)
    assert not [f for f in functions if f.file.startswith(("model_folders/", "building/"))]
    assert any(function.file.startswith("search/") for function in functions)
