"""What the official families' weights do not say."""

from __future__ import annotations

import pytest

from modeling_llm2clip.configs.source_format import SOURCE_FORMATS, SourceFormat


def test_the_preprocessing_of_siglip2_has_no_default() -> None:
    assert SOURCE_FORMATS["siglip2"].preprocessing is None


def test_a_prompt_excludes_a_prefix() -> None:
    with pytest.raises(ValueError, match="excludes prompt_prefix"):
        SourceFormat(layout="openai", prompt_prefix="x")
    SourceFormat(layout="openai", prompt=None, prompt_prefix="x")
