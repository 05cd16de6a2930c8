"""Tokenizes texts once, both to count tokens and to encode."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..processing_llm2clip import LLM2CLIPProcessor, clean_list

_TOKENIZED_AT_ONCE = 4096


class TokenizedText(NamedTuple):
    """A text and its token ids; `str` returns the text.

    Attributes:
        text: The text, stripped.
        ids: (L,) token ids for the model, prompt included.
    """

    text: str
    ids: NDArray[np.int32]

    def __str__(self) -> str:
        return self.text


class TokenizedTexts(Sequence[TokenizedText]):
    """Tokenized texts; each distinct text is tokenized once.

    The ids are stored in one array, which takes a tenth of the memory of lists.

    Args:
        processor: The model's processor.
        texts: N non-blank texts, at least one.

    Attributes:
        lengths: (N,) number of tokens of each text.
        is_truncated: (N,) True for texts over the model's maximum length.
    """

    def __init__(self, processor: LLM2CLIPProcessor, texts: Iterable[str]) -> None:
        self._texts = clean_list(texts)
        row_of: dict[str, int] = {}
        self._rows = np.array([row_of.setdefault(text, len(row_of)) for text in self._texts])
        distinct = list(row_of)
        parts, lengths, truncated = [], [], []
        for start in range(0, len(distinct), _TOKENIZED_AT_ONCE):
            ids, is_truncated = processor.list_ids(distinct[start : start + _TOKENIZED_AT_ONCE])
            parts.append(np.concatenate([np.array(row, np.int32) for row in ids]))
            lengths += [len(row) for row in ids]
            truncated += is_truncated
        self.lengths = np.array(lengths)[self._rows]
        self.is_truncated = np.array(truncated)[self._rows]
        self._ids = np.concatenate(parts)
        self._ends = np.concatenate([[0], np.cumsum(lengths)])

    @property
    def num_truncated(self) -> int:
        """Number of texts over the model's maximum length."""
        return int(self.is_truncated.sum())

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self._texts)

    def __getitem__(self, text: Any) -> Any:
        """Return a text with its token ids."""
        row = self._rows[text]
        return TokenizedText(self._texts[text], self._ids[self._ends[row] : self._ends[row + 1]])
