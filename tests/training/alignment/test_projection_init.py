"""Stage 3, where the projections start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from aligning import Prepared, names_that_differ, prepare


@pytest.fixture(scope="module", params=[100, 800])
def colored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp(f"colored-{request.param}")
    return prepare(folder, num_colored=request.param, trained=False)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(tmp_path_factory.mktemp("few"), num_colored=60, trained=False)


def read_lines(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_one_step_at_the_default_rate_keeps_what_cca_found(
    colored: Prepared, tmp_path: Path
) -> None:
    # The first step moves every weight by the whole learning rate. With 20 held-out images one of
    # them is a twentieth, and with 80 an eightieth: a tenth is more than chance moves.
    run = colored.align_stored(tmp_path / "run", max_steps=1)
    assert run.results["start"]["method"] == "cca"
    (line,) = [line for line in read_lines(tmp_path / "run") if "held_out_loss" in line]
    assert run.before.t2i_r1 > 3 * run.before.chance_t2i_r1
    for direction in ("t2i_r1", "i2t_r1"):
        before = getattr(run.before, direction)
        assert line[f"held_out_{direction}"] >= 0.9 * before


@pytest.mark.slow
def test_auto_keeps_a_trained_model_that_is_better_than_cca(few: Prepared, tmp_path: Path) -> None:
    many = prepare(tmp_path / "many", num_colored=600, trained=False)
    first = many.align_stored(tmp_path / "first", max_steps=1)
    trained = Prepared(few.data, first.model, few.captions, few.images)
    start = trained.align_stored(tmp_path / "kept", max_steps=1).results["start"]
    assert start["method"] == "model" and start["is_trained"]
    # CCA of noise is worse than what it replaces; of a random model it is better.
    poor = prepare(tmp_path / "poor", num_colored=200, trained=True)
    start = poor.align_stored(tmp_path / "fitted", max_steps=1).results["start"]
    assert start["method"] == "cca"


@pytest.mark.slow
def test_no_steps_are_the_closed_form_also_of_a_trained_model(
    few: Prepared, tmp_path: Path
) -> None:
    trained = Prepared(
        few.data, few.align_stored(tmp_path / "first").model, few.captions, few.images
    )
    run = trained.align_stored(tmp_path / "run", max_steps=0, held_out_ratio=0.0)
    assert run.results["start"]["method"] == "cca"
    assert names_that_differ(run.model, trained.model)
