"""What tests of several sources of data share."""

from __future__ import annotations

from types import SimpleNamespace

import datasets
import pytest
from numbered_rows import make_dataset

from modeling_llm2clip.data.remote import file_locations, remote_access


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> datasets.Dataset:
    folder = str(tmp_path_factory.mktemp("saved") / "rows")
    make_dataset().save_to_disk(folder, num_shards=3)
    return datasets.load_from_disk(folder)


@pytest.fixture
def new_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start with no block of a file and no state, and do not wait before asking again."""
    monkeypatch.setattr(remote_access, "time", SimpleNamespace(sleep=lambda _: None))
    monkeypatch.setattr(file_locations, "_states", {})
    file_locations._open_remote.cache_clear()
