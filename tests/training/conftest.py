"""Finished runs of both stages, shared by many tests, which must not change them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from aligning import Prepared, Run
    from tuning import Tuned


@pytest.fixture(scope="session")
def finished(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An alignment with `SHORT_RUN`."""
    return prepared.align(tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture(scope="session")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """A fine-tuning with `SHORT`."""
    from tuning import tune  # imported here because most tests do not fine-tune

    return tune(tmp_path_factory.mktemp("tuned") / "run")


@pytest.fixture(scope="session")
def few(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """60 images of colored squares, and a model with random projections."""
    from aligning import prepare

    return prepare(tmp_path_factory.mktemp("few"), num_colored=60, trained=False)


@pytest.fixture(scope="session", params=[100, 800])
def colored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Like `few`, with more images."""
    from aligning import prepare

    folder = tmp_path_factory.mktemp(f"colored-{request.param}")
    return prepare(folder, num_colored=request.param, trained=False)
