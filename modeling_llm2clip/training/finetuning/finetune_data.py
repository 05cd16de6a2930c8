"""Data for fine-tuning: pairs of captions and other texts, and held-out groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path

from datasets import DatasetDict
from tqdm import tqdm

from ...configs.finetune_config import FinetuneConfig
from ...data.captions.caption_groups import CaptionGroup, CaptionGroups
from ...data.captions.text_pairs import read_text_pairs
from ...encoding.tokenized_texts import TokenizedTexts
from ...processing_llm2clip import LLM2CLIPProcessor
from ..trainer_mixins import run_once_per_machine
from .pair_sampling import (
    GROUP_COLUMN,
    NoDuplicateGroupsBatchSampler,
    list_key_columns,
    list_text_columns,
    open_table,
    require_rows,
    write_caption_pairs,
    write_text_pairs,
)

_MAX_HELD_OUT = 1000
_CAPTIONS = "captions"
_ROWS_AT_ONCE = 2**13
_TOKENS_TO_SPARE = 8  # a tokenizer may add spaces at both ends


@dataclass(frozen=True)
class FinetuneData:
    """Text pairs to train on, and held-out groups to evaluate on.

    Attributes:
        tables: Tables of text pairs (see `pair_sampling`): caption pairs first, then other pairs.
        num_trained: Number of groups whose captions are in the first table.
        num_first_pairs: Number of leading rows of the first table that contain all its captions.
        held_out: Groups to evaluate on.
        counts: Numbers of training and held-out groups, and numbers of captions and text pairs left
            out because of held-out captions.
    """

    tables: DatasetDict
    num_trained: int
    num_first_pairs: int
    held_out: list[CaptionGroup]
    counts: dict[str, int]

    def iterate_groups(self) -> Iterator[list[str]]:
        """Yield the distinct captions of each training group, in order of group number."""
        table = self.tables[_CAPTIONS]
        texts, keys = list_text_columns(table), list_key_columns(table)
        number, captions = 0, dict[int, str]()
        for start in range(0, self.num_first_pairs, _ROWS_AT_ONCE):
            rows = table.data.slice(start, min(_ROWS_AT_ONCE, self.num_first_pairs - start))
            columns = (rows.column(name).to_pylist() for name in (GROUP_COLUMN, *keys, *texts))
            for group, *pair in zip(*columns, strict=True):
                if group != number:
                    yield [*captions.values()]
                    number, captions = group, {}
                captions.update(zip(pair[: len(keys)], pair[len(keys) :], strict=True))
        yield [*captions.values()]

    def iterate_texts(self) -> Iterator[str]:
        """Yield all images' captions, held-out images included, and the texts of other pairs."""
        yield from chain.from_iterable(self.iterate_groups())
        yield from chain.from_iterable(group.captions for group in self.held_out)
        for table in list(self.tables.values())[1:]:
            for name in list_text_columns(table):
                for chunk in table.data.column(name).chunks:
                    yield from chunk.to_pylist()


def prepare_data(groups: CaptionGroups, config: FinetuneConfig, folder: Path) -> FinetuneData:
    """Hold out groups, pair the captions of other groups, and exclude pairs with held-out texts.

    One process per machine writes the pairs, and all processes memory-map the files.
    """
    to_train, held_out, num_lost = _hold_out(groups, config)
    num_others = len(config.text_pairs)
    files = [folder / _CAPTIONS, *(folder / f"pairs_{n + 1}" for n in range(num_others))]
    num_pairs_lost = run_once_per_machine(partial(_write_tables, to_train, files, config))
    tables = DatasetDict({file.name: open_table(file) for file in files})
    for table in tables.values():  # fail early if a table cannot fill a batch
        sampler = NoDuplicateGroupsBatchSampler(
            table, config.per_device_train_batch_size, drop_last=True
        )
        next(iter(sampler))
    counts = {
        "num_held_out": len(held_out),
        "num_trained": len(to_train),
        "num_captions_lost": num_lost,
        "num_text_pairs_lost": num_pairs_lost,
    }
    return FinetuneData(tables, len(to_train), to_train.num_pairs, [*held_out], counts)


def count_rows(groups: CaptionGroups, config: FinetuneConfig) -> tuple[int, list[int]]:
    """Count the training groups, and the rows of each table of `prepare_data`, without writing.

    Data without a batch of different texts are only refused by `prepare_data`, which samples one.
    """
    to_train, _, _ = _hold_out(groups, config)
    num_rows = [config.num_pairings * to_train.num_pairs]
    num_rows += [_write_text_pairs(file, None, to_train)[0] for file, _ in config.text_pairs]
    require_rows(min(len(to_train), *num_rows), config.per_device_train_batch_size)
    return len(to_train), num_rows


def _hold_out(
    groups: CaptionGroups, config: FinetuneConfig
) -> tuple[CaptionGroups, CaptionGroups, int]:
    default = min(_MAX_HELD_OUT, max(2, len(groups) // 5))
    return groups.hold_out(
        default if config.num_held_out is None else config.num_held_out, seed=config.seed
    )


def count_truncated(
    processor: LLM2CLIPProcessor, data: FinetuneData, *, show_progress: bool = False
) -> dict[str, int]:
    """Count all training and held-out texts, and the truncated texts among them.

    A text that several images or pairs share is counted each time. Texts too short to be truncated
    are not tokenized: an ASCII text has at most one token per character, plus the prompt and a
    margin.
    """
    overhead = int(TokenizedTexts(processor, ["a"]).lengths[0]) + _TOKENS_TO_SPARE
    max_characters = processor.longest_text - overhead
    texts = iter(tqdm(data.iterate_texts(), "measure", unit=" texts", disable=not show_progress))
    num_texts = num_truncated = 0
    while some := list(islice(texts, _ROWS_AT_ONCE)):
        num_texts += len(some)
        if long := [t for t in some if not t.isascii() or len(t) > max_characters]:
            num_truncated += TokenizedTexts(processor, long).num_truncated
    return {"num_texts": num_texts, "num_truncated": num_truncated}


def _write_tables(groups: CaptionGroups, files: Sequence[Path], config: FinetuneConfig) -> int:
    """Write caption pairs and text pairs, and return how many text pairs were left out."""
    write_caption_pairs(groups, files[0], seed=config.seed, num_pairings=config.num_pairings)
    pairs = zip(config.text_pairs, files[1:], strict=True)
    return sum(_write_text_pairs(source, file, groups)[1] for (source, _), file in pairs)


def _write_text_pairs(source: Path, file: Path | None, groups: CaptionGroups) -> tuple[int, int]:
    """Write text pairs without held-out captions, and return how many were written and left out."""
    num_written, num_lost = write_text_pairs(
        read_text_pairs(source), file, left_out=groups.left_out
    )
    if not num_written:
        raise ValueError(
            f"text_pairs {source}: all {num_lost} pairs contain a held-out caption. "
            "Hold out fewer images (num_held_out), or leave this file out."
        )
    return num_written, num_lost
