"""What an image index is of, and the table of its database that says so; without torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]

from ..data.atomic_files import list_differences

FORMAT_VERSION = 2
ABOUT = "about"  # name of the table
HOW_TO_INDEX = "Make one: llm2clip index MODEL IMAGES DB."
# Candidates per result with a filter, against without: in the worst case that was measured, images
# of 24 topics and queries about 36 others, recall@10 is 0.945 with as many, and 0.992 with these.
_REFINED_MORE = 4
# What LanceDB raises.
ERRORS = (RuntimeError, ValueError, OSError, KeyError)


class IndexUnavailableError(ValueError):
    """An index that cannot be searched, whatever the query: gone, damaged or of another model."""


@dataclass(frozen=True, kw_only=True)
class AnnIndex:
    """An approximate index, and what was measured when it was built.

    Attributes:
        num_rows: Images when its partitions were trained.
        num_partitions: Partitions of the images.
        nprobes: Partitions that a query visits.
        refine_factor: Candidates per result that are compared exactly.
        recall_at_10: Share of the ten nearest images that it finds, over `num_queries` texts.
        num_queries: Texts that it was measured with.
        query_ms: Median milliseconds of a query.
        exact_query_ms: The same without the index.
        build_s: Seconds that training took.
        is_used: Whether searches use it: it finds enough, and is faster than no index.
    """

    num_rows: int
    num_partitions: int
    nprobes: int
    refine_factor: int
    recall_at_10: float
    num_queries: int
    query_ms: float
    exact_query_ms: float
    build_s: float
    is_used: bool

    def widen(self) -> AnnIndex:
        """Return how to search with a filter: all partitions, and more candidates.

        Partitions were counted without one. Images that pass a filter are often alike, such as
        those of one folder, and may be in none of the partitions that are nearest to the query; and
        among images that are alike, one bit per dimension misses more.
        """
        return dataclasses.replace(
            self,
            nprobes=self.num_partitions,
            refine_factor=_REFINED_MORE * self.refine_factor,
        )


@dataclass(frozen=True, kw_only=True)
class StoredTally:
    """What an `ImageTally` has added up.

    Attributes:
        num_images: Images, at least one.
        total: The sum of their embeddings before the projection, each of unit length.
    """

    num_images: int
    total: list[float]


@dataclass(frozen=True, kw_only=True)
class About:
    """What an index is of.

    Attributes:
        model: Folder or Hub id of the model.
        fingerprint: What decides its embeddings.
        model_files: Digest of names, sizes and times of the model's files: while it stays the
            same, the fingerprint need not be computed again.
        image_dir: Folder of the images.
        width: P of the embeddings.
        ann: The approximate index; None where none was built.
        tally: The images that were encoded into it, of a model that has a summary of the images
            that it was trained on; what was removed since is still among them.
    """

    model: str
    fingerprint: Mapping[str, str]
    model_files: str
    image_dir: str
    width: int
    ann: AnnIndex | None = None
    tally: StoredTally | None = None


def join_fingerprints(by_modality: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Join what decides the embeddings of each modality, as an `About` holds it."""
    return {
        f"{modality} {name}": value
        for modality, fingerprint in by_modality.items()
        for name, value in fingerprint.items()
    }


def require_same_fingerprint(
    location: str, about: About, source: object, by_modality: Mapping[str, Mapping[str, str]]
) -> None:
    """Refuse a model that is not the one of an index."""
    indexed = {
        name: value
        for name, value in about.fingerprint.items()
        if name.partition(" ")[0] in by_modality
    }
    if differences := list_differences(indexed, join_fingerprints(by_modality)):
        raise ValueError(
            f"{location} is an index of the model {about.model}, and {source} gives other "
            f"embeddings: {'; '.join(differences)}. Search with the model of the index, or index "
            "the images with this one into a new database."
        )


def list_tables(connection: Any) -> list[str]:
    """List the tables of a database."""
    return list(connection.list_tables().tables)


def write_about(connection: Any, about: About, *, mode: str) -> None:
    """Write the table."""
    content = json.dumps(dataclasses.asdict(about))
    rows = pa.table({"format_version": [FORMAT_VERSION], "content": [content]})
    connection.create_table(ABOUT, data=rows, mode=mode)


def read_about(location: str, connection: Any) -> About | None:
    """Read the table; None where there is none."""
    with explained(location, "read"):
        if ABOUT not in list_tables(connection):
            return None
        found = connection.open_table(ABOUT).to_arrow()
    if not {"format_version", "content"} <= set(found.column_names) or len(found) != 1:
        raise IndexUnavailableError(
            f"{location} is not a database of llm2clip index. {HOW_TO_INDEX}"
        )
    version = found["format_version"][0].as_py()
    if version != FORMAT_VERSION:
        raise IndexUnavailableError(
            f"{location} has format_version {version}, and this package reads {FORMAT_VERSION}. "
            "Index the images again into a new database, or use the version that wrote it."
        )
    try:
        values = json.loads(found["content"][0].as_py())
        ann, tally = values.pop("ann"), values.pop("tally", None)
        return About(
            **values,
            ann=None if ann is None else AnnIndex(**ann),
            tally=None if tally is None else StoredTally(**tally),
        )
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise IndexUnavailableError(
            f"{location} is damaged: the table `{ABOUT}` cannot be read ({error}). Remove it, "
            "and index the images again."
        ) from error


@contextmanager
def explained(location: str, what: str) -> Iterator[None]:
    """Turn an error of LanceDB into one that names the database and what to do."""
    try:
        yield
    except ERRORS as error:
        if isinstance(error, IndexUnavailableError):
            raise
        raise IndexUnavailableError(
            f"{location} cannot be {what}: {shorten(error)}. If it is damaged, remove it, and "
            "index the images again."
        ) from error


def shorten(error: BaseException) -> str:
    """Take the first sentence of LanceDB's error, which goes on with places in its source."""
    text = " ".join(str(error).split())
    return text.split(", /")[0].split(" at /")[0][:300].rstrip(". ")
