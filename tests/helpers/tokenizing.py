"""Which texts a tokenizer reads, in the order in which it does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase


@contextmanager
def note_tokenized() -> Iterator[list[str]]:
    """Yield a list that gets every text that any tokenizer of transformers reads meanwhile."""
    noted: list[str] = []
    tokenize = PreTrainedTokenizerBase.__call__

    def note(self: PreTrainedTokenizerBase, text: Any, *args: Any, **options: Any) -> Any:
        noted.extend([text] if isinstance(text, str) else text)
        return tokenize(self, text, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreTrainedTokenizerBase, "__call__", note)
        yield noted
