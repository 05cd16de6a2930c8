"""What the official families' weights do not say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modeling_llm2clip.configs.source_format import SourceFormat
from modeling_llm2clip.conversion.convert_checkpoint import convert_checkpoint
from modeling_llm2clip.conversion.layouts import LAYOUTS, find_layout


def test_the_preprocessing_of_siglip2_has_no_default() -> None:
    assert LAYOUTS["siglip2"].source_format.preprocessing is None


@pytest.mark.parametrize("layout", ["openai", "hub_clip", "eva02"])
@pytest.mark.parametrize("option", [{"activation": "gelu_tanh"}, {"image_size": 384}])
def test_what_siglip2_alone_leaves_open_is_refused_elsewhere_before_anything_is_read(
    layout: str, option: Any, tmp_path: Path
) -> None:
    source_format = SourceFormat(layout=layout, **option)
    with pytest.raises(ValueError, match=r"go(es)? with the source format.*Leave it out"):
        convert_checkpoint(tmp_path / "none.pt", tmp_path / "llm", tmp_path / "new", source_format)


def test_every_layout_takes_its_own_source_format() -> None:
    for source_format in (layout.source_format for layout in LAYOUTS.values()):
        assert find_layout(source_format).source_format == source_format


def test_an_unknown_layout_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    source_format = SourceFormat(layout="open_clip")
    with pytest.raises(ValueError, match=r"must be one of.*'siglip2'"):
        convert_checkpoint(tmp_path / "none.pt", tmp_path / "llm", tmp_path / "new", source_format)


def test_a_prompt_excludes_a_prefix() -> None:
    with pytest.raises(ValueError, match="excludes prompt_prefix"):
        SourceFormat(layout="openai", prompt_prefix="x")
    SourceFormat(layout="openai", prompt=None, prompt_prefix="x")
