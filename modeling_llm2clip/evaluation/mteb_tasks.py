"""A retrieval set as two tasks of mteb: images that look for texts, and texts for images.

Sets are found by name in the registry of `sets/registry.py`, the same as `llm2clip evaluate` has.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, Value
from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.languages.iso_mappings import _hf_langs_to_iso_lang_scripts

from ..data.image_sources import ImageSource
from .datasets.dataset_registry import find_dataset, list_datasets, load_dataset
from .datasets.schema import RetrievalDataset
from .metrics.correspondence import PositiveLists
from .results import hash_dataset

_SPLIT = "test"
_SHOWN_OF_DIGEST = 8
# R@1 as the CLIP papers count it.
_MAIN_SCORE = "hit_rate_at_1"
# Regions that write a language in another script than most of its readers (CLDR, likely subtags).
_SCRIPT_OF_REGION = {
    ("zh", "TW"): "Hant", ("zh", "HK"): "Hant", ("zh", "MO"): "Hant", ("yue", "CN"): "Hans",
    ("pa", "PK"): "Arab", ("uz", "AF"): "Arab", ("az", "IR"): "Arab", ("kk", "CN"): "Arab",
    ("mn", "CN"): "Mong", ("sr", "ME"): "Latn",
}  # fmt: skip


class SetRetrievalTask(AbsTaskRetrieval):  # type: ignore[misc]
    """One direction of a retrieval set.

    Args:
        data: with its images. Those packed in tar or Parquet files are read into memory.
        from_images: whether images are the queries; else texts are.
    Raises: ValueError for a set without images, or in a language whose code mteb does not know.
    """

    data_loaded: bool = False  # read and set by mteb too

    def __init__(self, data: RetrievalDataset, *, from_images: bool, **arguments: Any) -> None:
        if not data.images:
            raise ValueError(
                f"{data.name} was read without its images, which its tasks need. Read it with "
                "require_images=True."
            )
        self._set = data
        self._from_images = from_images
        super().__init__(**arguments)

    @cached_property
    def metadata(self) -> TaskMetadata:
        """What mteb is told of the task; made again after mteb has unloaded its data."""
        return _describe(self._set, from_images=self._from_images)

    def load_data(self, num_proc: int | None = None, **_: Any) -> None:  # noqa: ARG002
        """Lay out queries, corpus and relevance as mteb reads them; nothing is fetched."""
        if self.data_loaded:
            return
        pairs = self._set.correspondence
        images, texts = _tabulate_images(self._set.images), _tabulate_texts(self._set.captions)
        if self._from_images:
            split = _make_split(images, texts, pairs.texts_of_images())
        else:
            split = _make_split(texts, images, pairs.images_of_texts())
        self.dataset = {"default": {_SPLIT: split}}
        self.data_loaded = True


def make_mteb_tasks(
    data: RetrievalDataset | str, folder: str | Path | None = None, **how: Any
) -> tuple[SetRetrievalTask, SetRetrievalTask]:
    """Make the tasks of both directions, for `mteb.evaluate`: image to text, text to image.

        mteb.evaluate(model, make_mteb_tasks("docci", "my-docci"))
        mteb.evaluate(model, make_mteb_tasks("xm3600", "my-xm3600", lang="de"))

    Name and revision have a digest of the data, so that mteb's store of results cannot give the
    scores of other data for them.

    mteb's `hit_rate_at_k` and `recall_at_k` are those of `metrics.scores`, except where candidates
    tie: it then prefers the one with the greater id, right or wrong.

    Args:
        data: a set that was read, or the name of one in the registry (`list_mteb_datasets`).
        folder, how: where the named set lies, and how it is read, as `load_dataset` takes them.
    Raises: ValueError for an unknown name, a set of another kind, or what `load_dataset` refuses.
    """
    if isinstance(data, str):
        data = _read_named_dataset(data, folder, how)
    elif folder is not None or how:
        raise ValueError(
            f"{data.name} was read already and takes no folder={folder!r} and no {sorted(how)}. "
            "Give the name of a set to have it read."
        )
    return SetRetrievalTask(data, from_images=True), SetRetrievalTask(data, from_images=False)


def list_mteb_datasets() -> list[str]:
    """Names of the registry's sets that `make_mteb_tasks` reads: those for retrieval."""
    return [card.name for card in list_datasets() if card.kind == "retrieval"]


def _read_named_dataset(
    name: str, folder: str | Path | None, how: dict[str, Any]
) -> RetrievalDataset:
    kind = find_dataset(name).kind
    if kind != "retrieval":
        raise ValueError(
            f"{name} is of kind {kind}; mteb tasks are made of {', '.join(list_mteb_datasets())}."
        )
    data = load_dataset(name, folder, **how)
    assert isinstance(data, RetrievalDataset)
    return data


def _describe(data: RetrievalDataset, *, from_images: bool) -> TaskMetadata:
    direction = "image-to-text" if from_images else "text-to-image"
    digest = hash_dataset(data)[:_SHOWN_OF_DIGEST]
    return TaskMetadata(
        name=f"{data.name}-{data.lang}-{digest}-{direction}",
        description=f"{direction} retrieval on {data.name} ({data.lang}), "
        f"{len(data.images)} images and {len(data.captions)} texts.",
        type="Any2AnyRetrieval",
        category="i2t" if from_images else "t2i",
        modalities=["image", "text"],
        eval_splits=[_SPLIT],
        eval_langs=[_find_language(data.lang)],
        main_score=_MAIN_SCORE,
        dataset={"path": data.name, "revision": digest},
        bibtex_citation="",
    )


def _find_language(lang: str) -> str:
    """BCP 47 (`zh`, `zh-Hant`, `zh-TW`, `pt-BR`) to mteb's language and script (`zho-Hans`)."""
    language, *subtags = lang.split("-")
    found = _hf_langs_to_iso_lang_scripts(language)
    if not found:
        raise ValueError(
            f"mteb knows no language {language!r} (of {lang!r}). Languages are BCP 47, such as en."
        )
    scripts = [tag.capitalize() for tag in subtags if len(tag) == 4]
    scripts += [_SCRIPT_OF_REGION.get((language, tag.upper()), "") for tag in subtags]
    scripts = [script for script in scripts if script]
    return f"{found[0].split('-')[0]}-{scripts[0]}" if scripts else str(found[0])


def _tabulate_images(images: tuple[ImageSource, ...]) -> Dataset:
    rows = [
        {"bytes": None, "path": str(image)}
        if isinstance(image, Path)
        else {"bytes": image.read_bytes(), "path": None}
        for image in images
    ]
    return Dataset.from_dict(
        {"id": _name_rows("image", len(rows)), "image": rows},
        features=Features({"id": Value("string"), "image": Image()}),
    )


def _tabulate_texts(texts: tuple[str, ...]) -> Dataset:
    return Dataset.from_dict({"id": _name_rows("text", len(texts)), "text": list(texts)})


def _make_split(queries: Dataset, corpus: Dataset, positives: PositiveLists) -> RetrievalSplitData:
    candidates = corpus["id"][:]
    relevant = {
        query: {candidates[row]: 1 for row in positives.of(number).tolist()}
        for number, query in enumerate(queries["id"])
    }
    return RetrievalSplitData(
        queries=queries, corpus=corpus, relevant_docs=relevant, top_ranked=None
    )


def _name_rows(side: str, count: int) -> list[str]:
    return [f"{side}-{row}" for row in range(count)]
