"""Images that are encoded once and searched by any number of sentences and images.

The index is a LanceDB database, in a folder or on object storage, of one model and one folder.
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
)
from .search_results import SearchResult, require_top_k

if TYPE_CHECKING:
    from torch import Tensor

Report: TypeAlias = Callable[[str], object]

# Of so few images that pass a filter, all are compared. On two cores that takes about a second for
# 768 dimensions, most of it for reading the table, so that fewer images take no less.
_MOST_COMPARED = 250_000
_UNINDEXED = "The index holds no image. Index a folder into it: llm2clip index MODEL IMAGES DB."


class ImageIndex:
    """Images and their embeddings, searched by sentences and images.

    Several threads may search at once. What another process changes is seen within five seconds:
    images, and how the approximate index is searched. If it puts an index of another model in the
    place of this one, or removes it, searches fail until that is set right.

    Args:
        database: The open database.
        image_dir: Folder of the images; None for where the database says that they are.
        encoder: Encodes queries; by default the model is found when the first query needs it.
        device: Where the model runs.

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
            where: As in `search`. A filter reads values, so that missing files are noticed.

        Raises:
            ValueError: The filter is not one, or names an unknown column.
            IndexUnavailableError: The index is gone, cannot be read any more, or is of another
                model than when it was opened.
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
        """Model, folder, width of the embeddings, and approximate index."""
        return self._database.about

    @property
    def columns(self) -> Mapping[str, str]:
        """Names and types of the columns that `where` may use."""
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
        """Index a folder of images, or bring an index in line with its folder.

        Only new and changed images are encoded; those that are gone are removed. A file that was
        renamed or copied is not encoded again. Images that cannot be read are left out and
        reported. What a stopped call has encoded is kept, and the same call continues there.

        Args:
            model: Folder or Hub id of a whole, trained model.
            image_dir: Folder of images; subfolders are included.
            path: Folder of the database, or a URI on object storage such as `s3://bucket/index`;
                new, or of an earlier call.
            config: How images are encoded, and when an approximate index is built.
            report: Called with each line on what was done. Default: images that are left out are
                warned of.

        Returns:
            The index.

        Raises:
            ValueError: There is no such device, no image, or none that can be read; the model is
                not trained; or the database is of another model or folder, is damaged, or is
                being written by another process.
            OSError: The database cannot be written, before anything is read.
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
            model: Folder or Hub id of the model, if it is no longer where it was. It must give the
                same embeddings. A folder of ONNX graphs of that model needs no torch.
            image_dir: Folder of the images, if it is no longer where it was.
            device: Where the model runs; see `find_device`.
            precision: Dtype of its towers; see `SearchConfig`.

        Returns:
            The index. Its model is found and compared when the first query needs it, or now if
            `model` is given.

        Raises:
            ValueError: The database is missing, something else, damaged, of another version or of
                another model; or there is no such folder.
        """
        folder = None if image_dir is None else Path(image_dir).resolve()
        if folder is not None and not folder.is_dir():
            raise ValueError(f"image_dir={str(image_dir)!r}: no such folder.")
        database = IndexDatabase(path)
        encoder = None if model is None else _open_encoder(database, model, device, precision)
        return cls(database, folder, encoder, device=device, precision=precision)

    @property
    def encoder(self) -> IndexEncoder:
        """Encodes queries; its model is found and compared with the index on first use."""
        with self._lock:
            if self._encoder is None:
                self._encoder = _open_encoder(
                    self._database, self.model, self._device, self._precision
                )
            return self._encoder

    @overload
    def search(  # type: ignore[overload-overlap]  # a string is a sequence of strings, too
        self, query: Part, *, top_k: int = ..., where: str | None = ..., exact: bool = ...
    ) -> SearchResult: ...

    @overload
    def search(
        self,
        query: Sequence[Query] | np.ndarray[Any, Any] | Tensor,
        *,
        top_k: int = ...,
        where: str | None = ...,
        exact: bool = ...,
    ) -> list[SearchResult]: ...

    def search(
        self,
        query: Part | Sequence[Query] | np.ndarray[Any, Any] | Tensor,
        *,
        top_k: int = 6,
        where: str | None = None,
        exact: bool = False,
    ) -> SearchResult | list[SearchResult]:
        """Find the images of the greatest cosine.

        Args:
            query: A sentence, a `Path` of an image, or a PIL image; or a list of these, in which a
                list is one query of several parts, by the mean of their embeddings. Or embeddings
                of queries, (Q, P), of any length. An image of the index finds itself.
            top_k: Images per query; all of them where there are fewer.
            where: Filter over `columns`, such as `"width > 2000 AND path LIKE '2024/%'"`:
                comparisons of SQL, joined by AND, OR, NOT and parentheses.
            exact: Compare with every image, even if there is an approximate index.

        Returns:
            A result, which prints as a table; for a list or for embeddings a list of results. It
            is without hits where no image passes the filter.

        Raises:
            ValueError: `top_k` is below 1, the filter is not one or names an unknown column, a
                sentence is blank, a query image is missing or broken, embeddings are of another
                shape, or the model is no longer that of the index.
            IndexUnavailableError: As `count`, or the index is empty.
        """
        require_top_k(top_k)
        if isinstance(query, str | Path | Image.Image):
            return self.search([query], top_k=top_k, where=where, exact=exact)[0]
        num_rows = self.count(where)
        if where is None and num_rows == 0:
            raise IndexUnavailableError(f"{self._database.location}: {_UNINDEXED}")
        if hasattr(query, "shape"):
            embeds = check_embeddings(query, width=self.about.width)
            named = [NamedQuery(f"embedding {row}", (), None) for row in range(len(embeds))]
        else:
            named = name_queries(query)
            embeds = self.encoder.encode(named)
        ann, most = self._choose_ann(where, exact, num_rows), min(top_k, num_rows)
        results = []
        for entry, embedding in zip(named, embeds, strict=True):
            find = partial(self._database.search, embedding, top_k=most, where=where)
            rows = find(ann=ann) if most else []
            if ann is not None and len(rows) < most:  # the visited partitions have no more
                rows = find()
            hits = [(self._image_dir / row["path"], row["cosine"]) for row in rows]
            columns = [{name: row[name] for name in COLUMNS} for row in rows]
            results.append(SearchResult(entry.name, hits, entry.image, columns))
        self._require_same_model()  # it may have been replaced meanwhile
        return results

    def iterate_embeddings(self) -> Iterator[tuple[list[Path], np.ndarray[Any, Any]]]:
        """Read all images and their embeddings in parts.

        Yields:
            Paths, and their embeddings, (rows, P) float32 of unit length.
        """
        for names, embeds in self._database.iterate_embeddings():
            yield [self._image_dir / name for name in names], embeds

    @property
    def _image_dir(self) -> Path:
        return self._given_dir or Path(self.about.image_dir)

    def _require_same_model(self) -> None:
        """Refuse to compare embeddings of one model with images of another."""
        opened, about = self._opened, self._database.about
        if differences := list_differences(about.fingerprint, opened.fingerprint):
            raise IndexUnavailableError(
                f"{self._database.location} was replaced by an index of the model {about.model}, "
                f"and was opened for {opened.model}, which gives other embeddings: "
                f"{'; '.join(differences)}. Put back an index of that model, or open this one anew."
            )

    def _choose_ann(self, where: str | None, exact: bool, num_rows: int) -> AnnIndex | None:
        """Return the approximate index to use, if any; `num_rows` images pass the filter."""
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
            raise ValueError(f"precision={precision}: {source} has graphs of one precision.")
        database.require_same_fingerprint(source, read_onnx_record(Path(source))["source"])
        return OnnxQueryEncoder(Path(source))
    # Not above: it imports torch, which an index is opened without.
    from .model_identity import find_whole_model, name_model, require_same_model

    model = database.about.model
    try:
        folder = find_whole_model(source)
    except (ValueError, OSError) as error:
        if name_model(source) != model:
            raise
        raise ValueError(
            f"{database.location} is an index of the model {model}, which cannot be used "
            f"any more: {error} If it was moved, say where it is (model, --model)."
        ) from error
    require_same_model(database, source, folder)
    decoding = "scaled" if "jpeg decoding" in database.about.precision else "full"
    return IndexEncoder(folder, device, None if precision == "auto" else precision, decoding)
