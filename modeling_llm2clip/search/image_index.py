"""Images that are encoded once and searched by any number of sentences and images."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias, overload

from torch import Tensor

from ..configs.search_config import IndexConfig
from ..configuration_llm2clip import LLM2CLIPConfig
from ..data.images.image_sources import (
    OPTIONAL_IMAGE_SUFFIXES,
    find_unreadable_images,
    list_readable_suffixes,
)
from ..encoding.devices import find_device
from ..encoding.encode import encode_images, encode_texts, project_images
from ..model_folders.fingerprint import fingerprint_vision
from ..model_folders.model_folder import find_model_folder
from ..model_folders.model_loading import load_model
from ..model_folders.model_types import require_own_model
from ..model_folders.training_state import require_trained
from ..modeling_llm2clip import LLM2CLIPModel
from ..processing_llm2clip import LLM2CLIPProcessor
from .embedding_cache import EmbeddingCache, find_default_file, read_notes, require_writable

Report: TypeAlias = Callable[[str], object]
Query: TypeAlias = str | Path

_SHOWN = 8
_REMEDIES = {
    "pip install pillow-heif": {"heic", "heif", "hif"},
    "pip install --upgrade pillow (11.3 or later)": {"avif"},
}


@dataclass(frozen=True)
class SearchResult:
    """A query and the images found for it, best first.

    Attributes:
        query: The sentence, or the path of the query image.
        hits: Path and cosine of each image.
        query_image: The query image, where there is one.
    """

    query: str
    hits: Sequence[tuple[Path, float]]
    query_image: Path | None = None

    def __str__(self) -> str:
        lines = [self.query, "  rank  cosine  image"]
        for rank, (path, cosine) in enumerate(self.hits, start=1):
            lines.append(f"  {rank:>4}  {cosine:>6.3f}  {path}")
        return "\n".join(lines)


class ImageIndex:
    """Images and their embeddings, searched by sentences and images.

    Args:
        model: A whole model, which encodes the queries.
        processor: Its processor.
        paths: N images.
        image_embeds: (N, P) float32 on the CPU, of unit length, in the order of the paths.

    Raises:
        ValueError: There is not one finite embedding per path.

    Examples:
        >>> index = ImageIndex.build("llm2clip-demo/model", "my-images", "my-index")
        >>> print(index.search("two dogs on a beach", top_k=1))  # doctest: +ELLIPSIS
        two dogs on a beach
          rank  cosine  image
             1  ...  my-images/...
        >>> len(ImageIndex.open("my-index"))
        20
    """

    def __init__(
        self,
        model: LLM2CLIPModel,
        processor: LLM2CLIPProcessor,
        paths: Sequence[Path],
        image_embeds: Tensor,
    ) -> None:
        if image_embeds.ndim != 2 or len(image_embeds) != len(paths) or not len(paths):
            raise ValueError(
                f"image_embeds has shape {tuple(image_embeds.shape)}; give one row for each of the "
                f"{len(paths)} images, and at least one."
            )
        _require_finite(image_embeds, "embeddings")
        self.model = model
        self.processor = processor
        self.paths = list(paths)
        self.image_embeds = image_embeds

    def __len__(self) -> int:
        """Number of images."""
        return len(self.paths)

    @classmethod
    def build(
        cls,
        model: str | Path,
        image_dir: str | Path,
        path: str | Path | None = None,
        config: IndexConfig | None = None,
        *,
        report: Report | None = None,
    ) -> ImageIndex:
        """Encode the images of a folder, or only those that the index does not have yet.

        Args:
            model: Folder or Hub id of a whole, trained model.
            image_dir: Folder of images; subfolders are included.
            path: File of the image embeddings, new or of an earlier call. Default: `config.index`;
                without it a file in the cache, one per model and folder.
            config: How images are encoded.
            report: Called with each line on what is skipped, known and kept. Default: what is
                skipped is warned of.

        Returns:
            The index. Embeddings are bound to the fingerprint of the vision tower; a file that was
            renamed or copied is not encoded again.

        Raises:
            ValueError: There is no such device, no image, an image cannot be read and
                `config.skip_invalid` is off, the model is not trained, or the file is of another
                model.
        """
        config = config or IndexConfig()
        find_device(config.device)  # before what takes long
        files = list_images(image_dir)
        if files.skipped:
            (report or _warn)(files.describe_skipped())
        require_own_model(model)
        folder = find_model_folder(model)
        require_trained(LLM2CLIPConfig.from_pretrained(folder), purpose="search", source=model)
        cache = _open_cache(folder, Path(image_dir), path, config, report or _warn)
        paths = _list_valid(files.readable, cache, config, report)
        loaded, processor = _load_whole(folder, device=config.device)
        try:
            vision_embeds = cache.encode(
                loaded,
                processor,
                paths,
                batch_size=config.batch_size,
                num_workers=config.num_workers,
                show_progress=config.show_progress,
            )
        except KeyboardInterrupt:
            if cache.file is not None and report is not None:
                report(f"What was encoded is kept in {cache.file}; the same call continues there.")
            raise
        return cls(loaded, processor, paths, project_images(loaded, vision_embeds))

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        model: str | Path | None = None,
        image_dir: str | Path | None = None,
        device: str = "auto",
    ) -> ImageIndex:
        """Open an index that `build` wrote, without encoding anything.

        Args:
            path: File of the index.
            model: Folder or Hub id of the model, if it is no longer where it was.
            image_dir: Folder of the images, if it is no longer where it was.
            device: Where the model runs; see `find_device`.

        Returns:
            The index of all images in the folder that were encoded. Others are warned of.

        Raises:
            ValueError: The file is not an index, is damaged or of another model, or has none of
                the images.
        """
        notes = read_notes(Path(path))
        model, image_dir = model or notes.get("model"), image_dir or notes.get("image_dir")
        if model is None or image_dir is None:
            raise ValueError(f"{path} does not name its model and its images. Give both.")
        folder = find_model_folder(model)
        cache = EmbeddingCache(Path(path), fingerprint_vision(folder))
        found = list_images(image_dir).readable
        new = set(cache.find_new(found))
        paths = [file for file in found if file not in new]
        if not paths:
            raise ValueError(f"{path} has none of the {len(found)} images in {image_dir}.")
        if new:
            _warn(
                f"{len(new)} of {len(found)} images in {image_dir} are not in {path}. "
                "ImageIndex.build adds them."
            )
        loaded, processor = _load_whole(folder, device=device)
        vision_embeds = cache.encode(loaded, processor, paths)
        return cls(loaded, processor, paths, project_images(loaded, vision_embeds))

    @overload
    def search(  # type: ignore[overload-overlap]  # a string is a sequence of strings, too
        self, query: Query, *, top_k: int = ...
    ) -> SearchResult: ...

    @overload
    def search(self, query: Sequence[Query], *, top_k: int = ...) -> list[SearchResult]: ...

    def search(
        self, query: Query | Sequence[Query], *, top_k: int = 6
    ) -> SearchResult | list[SearchResult]:
        """Find the images of the greatest cosine.

        Args:
            query: A sentence, or a `Path` of an image; or a list of both. An image of the index
                finds itself.
            top_k: Images per query; all of them where there are fewer.

        Returns:
            A result, which prints as a table; for a list of queries a list of results.

        Raises:
            ValueError: `top_k` is below 1, a sentence is blank, or a query image is missing or
                broken; all of them are named.
        """
        if isinstance(query, str | Path):
            return self.search([query], top_k=top_k)[0]
        texts = [one for one in query if not isinstance(one, Path)]
        images = [one for one in query if isinstance(one, Path)]
        of_texts: Iterator[SearchResult] = iter(())
        of_images: Iterator[SearchResult] = iter(())
        if texts or not images:  # an empty list is refused as one of texts
            cosines = encode_texts(self.model, self.processor, texts) @ self.image_embeds.T
            of_texts = iter(rank_images(texts, cosines, self.paths, top_k=top_k))
        if images:
            cosines = encode_images(self.model, self.processor, images) @ self.image_embeds.T
            results = rank_images(list(map(str, images)), cosines, self.paths, top_k=top_k)
            pairs = zip(results, images, strict=True)
            of_images = iter([replace(result, query_image=image) for result, image in pairs])
        return [next(of_images if isinstance(one, Path) else of_texts) for one in query]


def rank_images(
    queries: Sequence[str], cosines: Tensor, paths: Sequence[Path], *, top_k: int = 6
) -> list[SearchResult]:
    """Take for each query the images of the greatest cosine, best first.

    Args:
        queries: What the rows are called.
        cosines: (queries, images).
        paths: One per image.
        top_k: Images per query; all of them where there are fewer.

    Returns:
        One result per query.

    Raises:
        ValueError: `top_k` is below 1, or a cosine is not finite.
    """
    if top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1.")
    _require_finite(cosines, "cosines")  # a NaN would come first
    best = cosines.topk(min(top_k, len(paths)))
    return [
        SearchResult(query, [(paths[i], float(s)) for s, i in zip(scores, rows, strict=True)])
        for query, scores, rows in zip(queries, best.values, best.indices, strict=True)
    ]


@dataclass(frozen=True)
class ImageFiles:
    """The image files of a folder.

    Attributes:
        readable: Files of a format that can be decoded here, in order.
        skipped: Image files of any other format, in order.
    """

    readable: list[Path]
    skipped: list[Path]

    def describe_skipped(self) -> str:
        """Count and name the skipped files, and say how to read them.

        Returns:
            One line, which lists at most eight names; empty where no file is skipped.
        """
        if not self.skipped:
            return ""
        counts = Counter(map(_suffix, self.skipped))
        counted = ", ".join(f"{count:,} .{suffix}" for suffix, count in sorted(counts.items()))
        more = ", …" if len(self.skipped) > _SHOWN else ""
        named = ", ".join(map(str, self.skipped[:_SHOWN])) + more
        return (
            f"Skipped {len(self.skipped):,} image files that Pillow cannot read here ({counted}): "
            f"{named}. {_describe_remedies(set(counts))}"
        )


def list_images(image_dir: str | Path) -> ImageFiles:
    """List the image files in a folder and its subfolders by their suffixes.

    Args:
        image_dir: Folder of images.

    Returns:
        Its image files, those that cannot be decoded here apart.

    Raises:
        ValueError: There is no such folder, or no readable image in it.
    """
    folder = Path(image_dir)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder. Give one that holds images.")
    readable = list_readable_suffixes()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    found = ImageFiles(
        readable=[path for path in files if _suffix(path) in readable],
        skipped=[path for path in files if _suffix(path) in OPTIONAL_IMAGE_SUFFIXES - readable],
    )
    if not found.readable:
        suffixes = ", ".join(f".{suffix}" for suffix in sorted(readable))
        raise ValueError(
            f"{folder}: no image in it or below it ({suffixes}). {found.describe_skipped()}"
        )
    return found


def _open_cache(
    folder: Path, image_dir: Path, path: str | Path | None, config: IndexConfig, report: Report
) -> EmbeddingCache:
    """Open the file of the index; a default one that cannot be written is reported."""
    fingerprint = fingerprint_vision(folder)
    notes = {"model": str(folder.resolve()), "image_dir": str(image_dir.resolve())}
    if file := path or config.index:
        return EmbeddingCache(Path(file), fingerprint, notes=notes)
    if not config.keep_index:
        return EmbeddingCache()
    file = find_default_file(image_dir, fingerprint)
    try:
        require_writable(file)
    except ValueError as error:  # nobody asked for this file, so the search goes on
        report(f"The image embeddings are not kept: {error}")
        return EmbeddingCache()
    return EmbeddingCache(file, fingerprint, notes=notes)


def _list_valid(
    paths: list[Path], cache: EmbeddingCache, config: IndexConfig, report: Report | None
) -> list[Path]:
    """Decode the images that are not known once, and skip or refuse those that are broken."""
    new = cache.find_new(paths, show_progress=config.show_progress)
    if report is not None:
        place = f"embeddings in {cache.file}" if cache.file else "embeddings are not kept"
        report(f"{len(paths):,} images, {len(paths) - len(new):,} of them known; {place}.")
    unreadable = find_unreadable_images(new, show_progress=config.show_progress)
    if not unreadable:
        return paths
    errors = list(unreadable.values())
    shown = "\n".join(errors[:_SHOWN]) + ("\n…" if len(errors) > _SHOWN else "")
    readable = [path for path in paths if path not in unreadable]
    if not config.skip_invalid or not readable:
        raise ValueError(
            f"{len(errors)} of {len(paths)} images cannot be read:\n{shown}\nRepair or remove "
            "them, or skip them (--skip-invalid)."
        )
    (report or _warn)(f"Skipped {len(errors)} of {len(paths)} images:\n{shown}")
    return readable


def _load_whole(folder: Path, *, device: str) -> tuple[LLM2CLIPModel, LLM2CLIPProcessor]:
    model, processor = load_model(folder, device=device)
    if not isinstance(model, LLM2CLIPModel):
        raise ValueError(
            f"{folder} holds a {type(model).__name__}; a search needs a whole model, with both "
            "towers."
        )
    return model, processor


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)


def _require_finite(numbers: Tensor, name: str) -> None:
    if broken := int((~numbers.isfinite()).sum()):
        raise ValueError(
            f"{broken} of {numbers.numel()} {name} are NaN or infinite: the model gives broken "
            "embeddings. Check it with llm2clip doctor."
        )


def _suffix(path: Path) -> str:
    return path.suffix.lower().removeprefix(".")


def _describe_remedies(suffixes: set[str]) -> str:
    remedies = [
        f"To read {_list(suffixes & of_remedy)}: {remedy}."
        for remedy, of_remedy in _REMEDIES.items()
        if suffixes & of_remedy
    ]
    if others := suffixes.difference(*_REMEDIES.values()):
        remedies.append(f"Convert {_list(others)} to JPEG or PNG.")
    return " ".join(remedies)


def _list(suffixes: set[str]) -> str:
    return ", ".join(f".{suffix}" for suffix in sorted(suffixes))
