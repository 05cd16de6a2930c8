"""One of a thing is in the singular, wherever it is counted."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest
from package_sources import read_package

from benchmarks.codebase.code_counts import Source
from modeling_llm2clip._suggestions import counted, list_first

# A number, which no "of" precedes, is followed by a plural within two words.
PLURAL = re.compile(r" (?!(?:is|has|was|of)\b)(?:[a-z-]+ )?[a-z-]+(?<!ha)(?<!\bi)s\b")
# What is never one: it is checked before, or one is not what the message is about.
NEVER_ONE = {
    "cli/evaluate.py: model_type",  # one is for all models
    "data/named_embeddings.py: self.names",  # whose number is beside the point
    "data/streams/dataset_streams.py: self.shards",  # part of a name that runs record
    "data/streams/record_streams.py: self.reader.shards",
    "doctor/endpoint_client.py: rows",
    "doctor/file_checks.py: SHORT_TEXTS",
    "doctor/file_checks.py: dtypes",
    "doctor/file_checks.py: lengths",
    "doctor/file_checks.py: uploaded",
    "doctor/forward_checks.py: caption",
    "doctor/forward_checks.py: model.state_dict()",
    "doctor/served_difference.py: value",
    "doctor/server_checks.py: _BLANK_REQUESTS",
    "evaluation/datasets/classification_dataset.py: published.class_keys",
    "evaluation/datasets/dataset_spec.py: self.languages",
    "evaluation/report.py: data",
    "publishing/onnx_checks.py: inputs.captions",
    "search/filters.py: where",  # thousands, or beside the point
    "serving/batching.py: embeds",
    "serving/service.py: inputs",
    "training/alignment/align_checks.py: records",
    "training/alignment/alignment_trainer.py: broken",  # a batch has two pairs or more
}


@pytest.mark.parametrize(
    ("number", "noun", "wanted"),
    [
        (0, "image", "0 images"), (1, "image", "1 image"), (1234, "image", "1,234 images"),
        (2, "held-out image", "2 held-out images"), (3, "entry", "3 entries"), (3, "key", "3 keys"),
    ],
)  # fmt: skip
def test_a_number_and_its_noun_agree(number: int, noun: str, wanted: str) -> None:
    assert counted(number, noun) == wanted


@pytest.mark.parametrize(
    ("items", "separator", "total", "expected"),
    [
        ([], ", ", None, ""),
        (["a"], ", ", None, "a"),
        (list("abcde"), ", ", None, "a, b, c, d, e"),
        (list("abcdefgh"), ", ", None, "a, b, c, d, e and 3 more"),
        (range(1_006), "; ", None, "0; 1; 2; 3; 4; and 1,001 more"),
        (list("abcdef"), "\n", None, "a\nb\nc\nd\ne\nand 1 more"),
        (["a", "b"], ", ", 4, "a, b and 2 more"),
    ],
)
def test_a_list_names_its_first_items_and_counts_the_rest(
    items: Sequence[object], separator: str, total: int | None, expected: str
) -> None:
    assert list_first(iter(items), separator, total=total) == expected


def find_plurals(source: Source) -> Iterator[str]:
    """Find each `{len(x)} things` of a file's messages."""
    for node in source.nodes:
        if not isinstance(node, ast.JoinedStr):
            continue
        for (before, value), (_, after) in pairwise(pairwise([ast.Constant(""), *node.values])):
            is_length = isinstance(value, ast.FormattedValue) and (
                ast.unparse(value.value).startswith("len(")
            )
            is_part = isinstance(before, ast.Constant) and (
                str(before.value).endswith(("of ", "of its "))
            )
            if is_length and not is_part and isinstance(after, ast.Constant):
                if PLURAL.match(str(after.value)):
                    name = ast.unparse(value.value)[len("len(") : -1]
                    yield f"{source.path.as_posix()}: {name}"


def test_messages_use_the_function_for_counts_that_may_be_one() -> None:
    found = {place for source in read_package().values() for place in find_plurals(source)}
    assert found == NEVER_ONE
