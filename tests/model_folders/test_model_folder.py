"""A model's folder is found by path or Hub id, and what cannot be found is named at once."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from modeling_llm2clip.model_folders import model_folder
from modeling_llm2clip.model_folders.model_folder import (
    explain_missing,
    fetch_hub_file,
    find_model_folder,
    find_model_type,
    is_hub_id,
    require_own_model,
    require_sources,
)


@pytest.fixture
def tries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Any]]:
    """Addresses that were connected to: a Hub that cannot be reached."""
    tried: list[Any] = []

    def refuse(address: Any, *_: Any, **__: Any) -> None:
        tried.append(address)
        raise OSError(-2, "Name or service not known")

    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    model_folder._connect.cache_clear()
    yield tried
    model_folder._connect.cache_clear()


@pytest.mark.usefixtures("tries")
@pytest.mark.parametrize("only", [None, ["config.json"]])
def test_a_missing_model_is_refused_as_folder_and_as_hub_id(
    only: list[str] | None,
) -> None:
    both = r"^owner/absent: no such local folder, and the Hub, which may .* not known: check the"
    with pytest.raises(ValueError, match=both):
        find_model_folder("owner/absent", only=only)


def test_the_hub_is_tried_once_in_a_process(tries: list[Any]) -> None:
    assert find_model_type("owner/absent") is None
    assert fetch_hub_file("owner/absent", "config.json") is None
    for refuse in (require_own_model, find_model_folder):
        with pytest.raises(ValueError, match="cannot be reached"):
            refuse("owner/absent")
    with pytest.raises(ValueError, match=r"vision tower.*cannot be reached.*language model: no "):
        require_sources(vision=["gpt-vision"], text="./llm")
    assert tries == [("huggingface.co", 443)]


def test_the_embedded_towers_are_not_looked_up(tries: list[Any]) -> None:
    require_sources(vision=["embedded"], text="embedded")
    assert tries == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("aligned/model", "aligned exists, but has the folders captions, images"),
        ("aligned/a/b", "aligned exists, but has the folders captions, images"),
        ("aligned/images/model", "aligned/images exists, but has no folder"),
        ("./model", "no such folder, and not a Hub id like 'owner/name'"),
        ("../model", ".. exists, but has the folders"),
        ("no/such/model", "no such folder, and not a Hub id like 'owner/name'"),
        ("/nowhere/model", "no such folder, and not a Hub id like 'owner/name'"),
        (Path("owner/model"), "no such folder, and not a Hub id like 'owner/name'"),
    ],
)
def test_a_source_that_looks_like_a_path_is_refused_without_the_network(
    tries: list[Any], tmp_path: Path, source: str | Path, message: str
) -> None:
    for name in ("images", "captions"):
        (tmp_path / "aligned" / name).mkdir(parents=True)
    assert not is_hub_id(source)
    assert message in (explain_missing(source) or "")
    with pytest.raises(ValueError, match="no such folder"):
        require_own_model(source)
    assert tries == []


def test_a_cached_repository_works_without_the_network(tries: list[Any], tmp_path: Path) -> None:
    (tmp_path / "cache" / "models--owner--cached" / "snapshots").mkdir(parents=True)
    assert explain_missing("owner/cached") is None
    assert tries == []
