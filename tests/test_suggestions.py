"""One of a thing is in the singular, wherever it is counted."""

from __future__ import annotations

import pytest

from modeling_llm2clip._suggestions import counted


@pytest.mark.parametrize(
    ("number", "noun", "wanted"),
    [
        (0, "image", "0 images"),
        (1, "image", "1 image"),
        (2, "held-out image", "2 held-out images"),
        (1234, "image", "1,234 images"),
        (1, "entry", "1 entry"),
        (3, "entry", "3 entries"),
        (3, "key", "3 keys"),
    ],
)
def test_a_number_and_its_noun_agree(number: int, noun: str, wanted: str) -> None:
    assert counted(number, noun) == wanted
