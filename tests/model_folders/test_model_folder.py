"""A model's folder is found by path or Hub id, and what cannot be found is named."""

from __future__ import annotations

import pytest

from modeling_llm2clip.model_folders.model_folder import find_model_folder


@pytest.mark.parametrize("only", [None, ["config.json"]])
def test_a_model_that_is_not_cached_is_named_when_the_hub_cannot_be_reached(
    only: list[str] | None,
) -> None:
    with pytest.raises(FileNotFoundError, match=r"^owner/absent cannot be downloaded: "):
        find_model_folder("owner/absent", only=only)
