"""What tests of several sources of data share."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from modeling_llm2clip.data.remote import file_places, remote_access


@pytest.fixture
def new_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start with no block of a file and no state, and do not wait before asking again."""
    monkeypatch.setattr(remote_access, "time", SimpleNamespace(sleep=lambda _: None))
    monkeypatch.setattr(file_places, "_states", {})
    file_places._open_remote.cache_clear()
