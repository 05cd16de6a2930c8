"""Finished runs of both stages, which many tests read and none may change."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from aligning import Prepared, Run
    from tuning import Tuned


@pytest.fixture(scope="session")
def finished(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An alignment of `SHORT_RUN`."""
    return prepared.align(tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture(scope="session")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """A fine-tuning of `SHORT`."""
    from tuning import tune  # here, since most tests fine-tune nothing

    return tune(tmp_path_factory.mktemp("tuned") / "run")
