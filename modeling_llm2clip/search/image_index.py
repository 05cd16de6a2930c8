"""Encode images once, then search them with any number of sentences and images.

The index is a LanceDB database for one model and one image folder, on disk or on object storage.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import numpy as np
from PIL import Image

from ..configs.config_fields import Precision
from ..configs.encoding_config import IndexConfig
from ..data.sealed_manifest import list_differences
from ..model_folders.model_folder import holds_graphs
from ..model_folders.onnx_folder import read_onnx_record
from .index_about import COLUMNS, About, AnnIndex, IndexUnavailableError
from .index_database import IndexDatabase
from .index_encoding import (
    IndexEncoder,
    NamedQuery,
    OnnxQueryEncoder,
    Part,
    Query,
    check_embeddings,
    name_queries,
    subtract_negatives,
)
from .search_results import SearchResult, require_top_k

if TYPE_CHECKING:
    from torch import Tensor

Report: TypeAlias = Callable[[str], object]

# If at most this many images pass a filter, all of them are compared. On two cores, that takes
# about a second at 768 dimensions, mostly to read the table, so fewer images are hardly faster.
_MOST_COMPARED = 250_000
_UNINDEXED = "The index holds no images. Add a folder with: llm2clip index MODEL IMAGES DB."


class ImageIndex:
    """Images and their embeddings, searchable by sentences and images.

    Several threads may search at once. Changes that another process makes to the images or to the
    settings of the approximate index are visible within five seconds. If another process removes
    the index or replaces it with an index for another model, searches fail until the original is
    restored.

    Args:
        database: The open database.
        image_dir: Folder of the images; by default, the folder recorded in the database.
        encoder: Encoder for queries; by default, the index's model, located when a query first
            needs it.
        device: Device to run the model on.
        precision: Dtype of the towers; see `SearchConfig`.

    Examples:
        >>> index = ImageIndex.build("my-model", "my-images", "my-index")
        >>> print(index.search("two dogs on a beach", top_k=1))  # doctest: +ELLIPSIS
        two dogs on a beach
          rank  cosine  image
             1  ...my-images/...
        >>> len(ImageIndex.open("my-index").search("a dog", where="width > height").hits)
        6
    """

    def __init__(
        self,
        database: IndexDatabase,
        image_dir: Path | None = None,
        encoder: IndexEncoder | None = None,
        *,
        device: str = "auto",
        precision: Precision = "auto",
    ) -> None:
        self._database = database
        self._opened = database.about
        self._given_dir = image_dir
        self._encoder = encoder
        self._device, self._precision = device, precision
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Number of images."""
        return self.count()

    def count(self, where: str | None = None) -> int:
        """Count the images that pass a filter.

        Args:
            where: Filter, as in `search`. Counting with a filter reads values, so missing database
                files are noticed.

        Raises:
            ValueError: The filter is invalid, or names an unknown column.
            IndexUnavailableError: Since it was opened, the index was removed, became unreadable or
                was replaced by an index for another model.
        """
        num_rows = self._database.count(where)
        self._require_same_model()
        return num_rows

    @property
    def model(self) -> str:
        """Folder or Hub id of the model."""
        return self._database.about.model

    @property
    def about(self) -> About:
        """Model, image folder, embedding dimension and approximate index."""
        return self._database.about

    @property
    def columns(self) -> Mapping[str, str]:
        """Names and types of the columns available in `where`."""
        return {name: str(kind) for name, kind in COLUMNS.items()}

    @classmethod
    def build(
        cls,
        model: str | Path,
        image_dir: str | Path,
        path: str | Path,
        config: IndexConfig | None = None,
        *,
        report: Report | None = None,
    ) -> ImageIndex:
        """Index a folder of images, or bring an existing index up to date with its folder.

        Only new and changed images are encoded, and deleted images are removed. Files that were
        renamed or copied are not encoded again. Unreadable images are skipped and reported. If the
        call is interrupted, the images encoded so far are kept, and repeating the call continues
        from there.

        Args:
            model: Folder or Hub id of a trained model with both towers.
            image_dir: Folder of images, including its subfolders.
            path: Folder of the database, or a URI on object storage such as `s3://bucket/index`.
                The database is created if it does not exist.
            config: Options for encoding images and for building an approximate index.
            report: Called with each progress message. By default, only warnings are shown,
                such as skipped images.

        Returns:
            The index.

        Raises:
            ValueError: The device does not exist; there are no readable images; the model is not
                trained; or the database belongs to another model or folder, is damaged, or is
                being written by another process.
            OSError: The database cannot be written. Raised before any image is read.
        """
        from .index_update import build_index

        database, encoder = build_index(
            model, Path(image_dir), str(path), config or IndexConfig(), report=report
        )
        return cls(database, encoder=encoder)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        model: str | Path | None = None,
        image_dir: str | Path | None = None,
        device: str = "auto",
        precision: Precision = "auto",
    ) -> ImageIndex:
        """Open an index that `build` wrote, without loading its model.

        Args:
            path: Folder or URI of the database.
            model: Folder or Hub id of the model, if it has moved. The model must produce the same
                embeddings. With a folder of the model's ONNX graphs, torch is not needed.
            image_dir: Folder of the images, if it has moved.
            device: Device to run the model on; see `find_device`.
            precision: Dtype of the towers; see `SearchConfig`.

        Returns:
            The index. If `model` is passed, it is checked immediately; otherwise the model is
            located and checked when the first query needs it.

        Raises:
            ValueError: `path` is missing, is not an index, is damaged, or was written by another
                version of this package or with another model; or `image_dir` does not exist.
        """
        folder = None if image_dir is None else Path(image_dir).resolve()
        if folder is not None and not folder.is_dir():
            raise ValueError(f"image_dir={str(image_dir)!r}: no such folder.")
        database = IndexDatabase(path)
        encoder = None if model is None else _open_encoder(database, model, device, precision)
        return cls(database, folder, encoder, device=device, precision=precision)

    @property
    def encoder(self) -> IndexEncoder:
        """The query encoder; its model is located and checked against the index on first use."""
        with self._lock:
            if self._encoder is None:
                self._encoder = _open_encoder(
                    self._database, self.model, self._device, self._precision
                )
            return self._encoder

    @overload
    def search(  # type: ignore[overload-overlap]  # a string is also a sequence of strings
        self,
        query: Part,
        *,
        negative: Query | None = ...,
        top_k: int = ...,
        threshold: float | None = ...,
        where: str | None = ...,
        exact: bool = ...,
    ) -> SearchResult: ...

    @overload
    def search(
        self,
        query: Sequence[Query] | np.ndarray[Any, Any] | Tensor,
        *,
        negative: Query | None = ...,
        top_k: int = ...,
        threshold: float | None = ...,
        where: str | None = ...,
        exact: bool = ...,
    ) -> list[SearchResult]: ...

    def search(
        self,
        query: Part | Sequence[Query] | np.ndarray[Any, Any] | Tensor,
        *,
        negative: Query | None = None,
        top_k: int = 6,
        threshold: float | None = None,
        where: str | None = None,
        exact: bool = False,
    ) -> SearchResult | list[SearchResult]:
        """Find the images with the highest cosine similarity to a query.

        Args:
            query: A sentence, a `Path` of an image or a PIL image; or a list of queries, in which
                a nested list is one query whose parts' embeddings are averaged; or an array of
                query embeddings, (Q, P), of any norm. A query image that is indexed is among its
                own hits.
            negative: What the images should not show: a sentence, an image or a list of these; an
                empty list has no effect. Each query embedding q becomes q - n / 2, rescaled to unit
                length, where n is the mean of the negatives' embeddings, also rescaled. Cosines are
                then to this embedding.
            top_k: Number of images to return per query; all images if there are fewer.
            threshold: Lowest cosine of a hit, from -1 to 1; None to return all `top_k` images.
            where: SQL filter over `columns`, such as `"width > 2000 AND path LIKE '2024/%'"`:
                comparisons combined with AND, OR, NOT and parentheses.
            exact: Compare queries with every image, even if there is an approximate index.

        Returns:
            A result, which prints as a table. For a list of queries or an array of embeddings, a
            list of results. A result has no hits if no image passes the filter or reaches the
            threshold; its `note` gives the reason.

        Raises:
            ValueError: `top_k` is below 1, `threshold` is not a cosine, the filter is invalid or
                names an unknown column, a sentence is blank, a query image is missing or broken,
                embeddings have the wrong shape, or the model no longer matches the index.
            IndexUnavailableError: The index is empty, or unavailable for a reason listed under
                `count`.
        """
        require_top_k(top_k)
        if threshold is not None and not -1 <= threshold <= 1:
            raise ValueError(f"threshold={threshold} is not a cosine. Choose one from -1 to 1.")
        if isinstance(query, str | Path | Image.Image):
            return self.search(
                [query], negative=negative, top_k=top_k, threshold=threshold, where=where,
                exact=exact,
            )[0]  # fmt: skip
        num_rows = self.count(where)
        if where is None and num_rows == 0:
            raise IndexUnavailableError(f"{self._database.location}: {_UNINDEXED}")
        excluded = [negative] if isinstance(negative, str | Path | Image.Image) else negative
        negatives = (
            []
            if excluded is None or (isinstance(excluded, list | tuple) and not excluded)
            else name_queries(excluded, noun="Negative")
        )
        if hasattr(query, "shape"):
            embeds = check_embeddings(query, width=self.about.width)
            named = [NamedQuery(f"embedding {row}", (), None) for row in range(len(embeds))]
        else:
            named = name_queries(query)
            embeds = self.encoder.encode(named)
        if negatives:
            embeds = subtract_negatives(embeds, self.encoder.encode(negatives))
        without = "".join(f" - {entry.name}" for entry in negatives)
        ann, most = self._choose_ann(where, exact, num_rows), min(top_k, num_rows)
        results = []
        for entry, embedding in zip(named, embeds, strict=True):
            find = partial(self._database.search, embedding, top_k=most, where=where)
            rows = find(ann=ann) if most else []
            if ann is not None and len(rows) < most:  # the visited partitions hold too few images
                rows = find()
            best = rows[0]["cosine"] if rows else None
            rows = [row for row in rows if threshold is None or row["cosine"] >= threshold]
            hits = [(self._image_dir / row["path"], row["cosine"]) for row in rows]
            columns = [{name: row[name] for name in COLUMNS} for row in rows]
            results.append(SearchResult(entry.name + without, hits, entry.image, columns, best))
        self._require_same_model()  # the index may have been replaced during the search
        return results

    def iterate_embeddings(self) -> Iterator[tuple[list[Path], np.ndarray[Any, Any]]]:
        """Iterate over all images and their embeddings in batches.

        Yields:
            Paths and their unit-length embeddings, (rows, P) float32.
        """
        for names, embeds in self._database.iterate_embeddings():
            yield [self._image_dir / name for name in names], embeds

    @property
    def _image_dir(self) -> Path:
        return self._given_dir or Path(self.about.image_dir)

    def _require_same_model(self) -> None:
        """Raise an error if the index was replaced by an index for another model since opening."""
        opened, about = self._opened, self._database.about
        if differences := list_differences(about.fingerprint, opened.fingerprint):
            raise IndexUnavailableError(
                f"{self._database.location} was opened as an index for the model {opened.model}, "
                f"but was since replaced by one for {about.model}, whose embeddings differ: "
                f"{'; '.join(differences)}. Restore the old index, or reopen this one."
            )

    def _choose_ann(self, where: str | None, exact: bool, num_rows: int) -> AnnIndex | None:
        """Return the approximate index to use, or None to search the `num_rows` images exactly."""
        ann = self.about.ann
        if exact or ann is None or not ann.is_used:
            return None
        if where is None:
            return ann
        return None if num_rows <= _MOST_COMPARED else ann.widen()


def _open_encoder(
    database: IndexDatabase, source: str | Path, device: str, precision: Precision
) -> IndexEncoder:
    if holds_graphs(source):
        if precision != "auto":
            raise ValueError(
                f"precision={precision} has no effect: the precision of the ONNX graphs in "
                f"{source} is fixed. Omit it."
            )
        database.require_same_fingerprint(source, read_onnx_record(Path(source))["source"])
        return OnnxQueryEncoder(Path(source))
    # Imported here because it imports torch, and an index opens without torch.
    from .model_identity import find_whole_model, name_model, require_same_model

    model = database.about.model
    try:
        folder = find_whole_model(source)
    except (ValueError, OSError) as error:
        if name_model(source) != model:
            raise
        raise ValueError(
            f"{database.location} is an index for the model {model}, which can no longer be "
            f"loaded: {error} If it has moved, pass its new location (model, --model)."
        ) from error
    require_same_model(database, source, folder)
    decoding = "scaled" if "jpeg decoding" in database.about.precision else "full"
    return IndexEncoder(folder, device, None if precision == "auto" else precision, decoding)
