"""What tests of several sources of data share."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from modeling_llm2clip.data.remote import file_locations, remote_access


@pytest.fixture
def new_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start with no block of a file and no state, and do not wait before asking again."""
    monkeypatch.setattr(remote_access, "time", SimpleNamespace(sleep=lambda _: None))
    monkeypatch.setattr(file_locations, "_states", {})
    file_locations._open_remote.cache_clear()
