"""What the official families' weights do not say."""

from __future__ import annotations

from typing import Any

import pytest

from modeling_llm2clip.configs.source_format import SOURCE_FORMATS, SourceFormat


def test_the_preprocessing_of_siglip2_has_no_default() -> None:
    assert SOURCE_FORMATS["siglip2"].preprocessing is None


@pytest.mark.parametrize("layout", ["openai", "hub_clip", "eva02"])
@pytest.mark.parametrize("option", [{"activation": "gelu_tanh"}, {"image_size": 384}])
def test_what_siglip2_alone_leaves_open_is_refused_elsewhere(layout: Any, option: Any) -> None:
    with pytest.raises(ValueError, match="of layout siglip2 alone"):
        SourceFormat(layout=layout, **option)


def test_a_prompt_excludes_a_prefix() -> None:
    with pytest.raises(ValueError, match="excludes prompt_prefix"):
        SourceFormat(layout="openai", prompt_prefix="x")
    SourceFormat(layout="openai", prompt=None, prompt_prefix="x")
