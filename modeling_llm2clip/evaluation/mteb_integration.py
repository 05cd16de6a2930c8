"""Run a saved model in mteb, and a retrieval dataset as two mteb tasks.

Published models do not need this: `mteb.get_model("owner/model")` learns from the repository that
the model is a sentence-transformers model for texts and images (pass `trust_remote_code=True` if
this package is not imported).

Local folders always need it, because mteb does not read their files. mteb looks up the path as a
name, first in its registry and then on the Hub, and raises "No model implementation is available
for this model". mteb has no entry points, so a folder cannot register itself. mteb treats a
`SentenceTransformer` object as a text-only model without a name or revision.

Datasets are looked up by name in the registry, as in `llm2clip evaluate`.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, Value
from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.languages.iso_mappings import _hf_langs_to_iso_lang_scripts
from mteb.models import SentenceTransformerEncoderWrapper
from sentence_transformers import SentenceTransformer

from .._suggestions import counted
from ..configuration_llm2clip import LLM2CLIPConfig
from ..data.images.image_sources import EncodedImage, decode_image
from ..loading_llm2clip import list_model_files
from ..model_folders.fingerprint import fingerprint_weights, hash_model_files
from ..model_folders.model_loading import warn_of_untrained
from .datasets.dataset_registry import find_dataset, list_datasets, load_dataset
from .datasets.retrieval_dataset import RetrievalDataset
from .metrics.correspondence import PositiveLists
from .results import hash_dataset

_SPLIT = "test"
_SHOWN_OF_DIGEST = 8
# R@1 in CLIP papers.
_MAIN_SCORE = "hit_rate_at_1"
# Regions that write a language in a less common script (CLDR, likely subtags).
_SCRIPT_OF_REGION = {
    ("zh", "TW"): "Hant", ("zh", "HK"): "Hant", ("zh", "MO"): "Hant", ("yue", "CN"): "Hans",
    ("pa", "PK"): "Arab", ("uz", "AF"): "Arab", ("az", "IR"): "Arab", ("kk", "CN"): "Arab",
    ("mn", "CN"): "Mong", ("sr", "ME"): "Latn",
}  # fmt: skip


def load_for_mteb(
    folder: str | Path, *, name: str | None = None, device: str | None = None
) -> SentenceTransformerEncoderWrapper:
    """Load a model folder for `mteb.evaluate`, for both texts and images.

    The revision is a digest of the weights and configuration, so mteb's result cache never returns
    scores of a different model with the same name. Tasks that combine an image and a text in one
    input are not supported.

    Args:
        folder: An LLM2CLIP model folder.
        name: `organization/model` in mteb's results. Default: `local/` plus the folder's name.
        device: Device to load the model on. Default: chosen by sentence-transformers.

    Raises:
        ValueError: The folder has no `modules.json`, or the name has no organization.
    """
    folder = Path(folder)
    if not (folder / "modules.json").is_file():
        raise ValueError(
            f"{folder} has no modules.json, which sentence-transformers needs. Use a folder "
            "written by this package, for example with `llm2clip export`."
        )
    name = f"local/{folder.resolve().name}" if name is None else name
    if name.count("/") != 1:
        raise ValueError(
            f"name={name!r} must be `organization/model`, because mteb stores results under it."
        )
    warn_of_untrained(LLM2CLIPConfig.from_pretrained(folder), folder)
    model = SentenceTransformer(
        str(folder), device=device, trust_remote_code=False, local_files_only=True
    )
    wrapper = SentenceTransformerEncoderWrapper(model)
    network = model[0].auto_model
    weights = fingerprint_weights(list_model_files(folder))["weights"]
    files = hash_model_files(folder, ["**/*.json"])
    wrapper.mteb_model_meta = wrapper.mteb_model_meta.model_copy(
        update={
            "name": name,
            # 40 hexadecimal digits, like a commit.
            "revision": hashlib.sha256(f"{weights} {files}".encode()).hexdigest()[:40],
            "modalities": sorted(model.modalities),
            "n_parameters": sum(weight.numel() for weight in network.parameters()),
            # mteb would multiply the vocabulary size by the width of the shared space.
            "n_embedding_parameters": network.text_model.get_input_embeddings().weight.numel(),
            "memory_usage_mb": sum(w.nbytes for w in network.parameters()) / 2**20,
            "use_instructions": any(prompt for prompt in model.prompts.values()),
        }
    )
    return wrapper


class RetrievalTask(AbsTaskRetrieval):  # type: ignore[misc]
    """An mteb task: one direction of a retrieval dataset. Packed images are read into memory."""

    data_loaded: bool = False  # mteb also reads and sets this

    def __init__(self, data: RetrievalDataset, *, from_images: bool, **options: Any) -> None:
        if not data.images:
            raise ValueError(
                f"{data.name} was read without its images, which the mteb tasks need. Read it with "
                "require_images=True."
            )
        self._data = data
        self._from_images = from_images
        super().__init__(**options)

    @cached_property
    def metadata(self) -> TaskMetadata:
        """mteb's description of the task; rebuilt after mteb unloads the data."""
        data = self._data
        direction = "image-to-text" if self._from_images else "text-to-image"
        digest = hash_dataset(data)[:_SHOWN_OF_DIGEST]
        return TaskMetadata(
            name=f"{data.name}-{data.lang}-{digest}-{direction}",
            description=f"{direction} retrieval on {data.name} ({data.lang}), "
            f"{counted(len(data.images), 'image')} and {counted(len(data.captions), 'text')}.",
            type="Any2AnyRetrieval",
            category="i2t" if self._from_images else "t2i",
            modalities=["image", "text"],
            eval_splits=[_SPLIT],
            eval_langs=[_find_language(data.lang)],
            main_score=_MAIN_SCORE,
            dataset={"path": data.name, "revision": digest},
            bibtex_citation="",
        )

    def load_data(self, num_proc: int | None = None, **_: Any) -> None:  # noqa: ARG002
        """Make queries, corpus and relevance in mteb's format; nothing is downloaded."""
        if self.data_loaded:
            return
        pairs = self._data.correspondence
        captions, sources = list(self._data.captions), self._data.images
        text_ids, image_ids = (
            [f"{side}-{row}" for row in range(len(rows))]
            for side, rows in (("text", captions), ("image", sources))
        )
        texts = Dataset.from_dict({"id": text_ids, "text": captions})
        rows = [
            {"bytes": None if isinstance(image, Path) else image.read_bytes(), "path": str(image)}
            for image in sources
        ]
        images = Dataset.from_dict(
            {"id": image_ids, "image": rows},
            features=Features({"id": Value("string"), "image": _Image()}),
        )
        if self._from_images:
            split = _make_split(images, texts, pairs.texts_of_images())
        else:
            split = _make_split(texts, images, pairs.images_of_texts())
        self.dataset = {"default": {_SPLIT: split}}
        self.data_loaded = True


def make_mteb_tasks(
    data: RetrievalDataset | str, folder: str | Path | None = None, **options: Any
) -> tuple[RetrievalTask, RetrievalTask]:
    """Make the tasks for both directions, image to text and text to image.

        mteb.evaluate(model, make_mteb_tasks("docci", "my-docci"))
        mteb.evaluate(model, make_mteb_tasks("xm3600", "my-xm3600", lang="de"))

    The name and revision contain a digest of the data, so mteb's result cache never returns scores
    of other data.

    mteb's `hit_rate_at_k` and `recall_at_k` equal those of `metrics.scores`, except if candidates
    tie: mteb then prefers the greater id, right or wrong.

    Args:
        data: A loaded dataset, or a dataset's name (see `list_mteb_datasets`).
        folder: Folder of the named dataset, as in `load_dataset`.
        options: Options of `load_dataset`.

    Raises:
        ValueError: The name is unknown, the dataset has another type, or `load_dataset` rejects it.
    """
    if isinstance(data, str):
        dataset_type = find_dataset(data).dataset_type
        if dataset_type != "retrieval":
            raise ValueError(
                f"{data} is a {dataset_type} dataset, which mteb tasks do not support. Choose from "
                f"{', '.join(list_mteb_datasets())}."
            )
        loaded = load_dataset(data, folder, **options)
        assert isinstance(loaded, RetrievalDataset)
        data = loaded
    elif folder is not None or options:
        raise ValueError(
            f"{data.name} is already loaded, so folder={folder!r} and "
            f"{', '.join(sorted(options)) or 'options'} have no effect. To load a dataset with "
            "them, pass its name."
        )
    return RetrievalTask(data, from_images=True), RetrievalTask(data, from_images=False)


def list_mteb_datasets() -> list[str]:
    """List the names of the datasets that `make_mteb_tasks` can load: all retrieval datasets."""
    return [spec.name for spec in list_datasets() if spec.dataset_type == "retrieval"]


def _find_language(lang: str) -> str:
    """Convert BCP 47 (`zh`, `zh-Hant`, `zh-TW`) to mteb's language and script (`zho-Hans`)."""
    language, *subtags = lang.split("-")
    scripts_of = _hf_langs_to_iso_lang_scripts(language)
    if not scripts_of:
        raise ValueError(
            f"mteb does not know the language {language!r} (from {lang!r}). Use a BCP 47 tag, such "
            "as en."
        )
    scripts = [tag.capitalize() for tag in subtags if len(tag) == 4]
    scripts += [_SCRIPT_OF_REGION.get((language, tag.upper()), "") for tag in subtags]
    scripts = [script for script in scripts if script]
    return f"{scripts_of[0].split('-')[0]}-{scripts[0]}" if scripts else str(scripts_of[0])


class _Image(Image):  # type: ignore[misc]
    """Decodes an image like the rest of the package; Pillow alone accepts any format and size."""

    def decode_example(self, value: dict[str, Any], token_per_repo_id: Any = None) -> Any:  # noqa: ARG002
        path, content = value["path"], value["bytes"]
        return decode_image(Path(path) if content is None else EncodedImage(path, content))


def _make_split(queries: Dataset, corpus: Dataset, positives: PositiveLists) -> RetrievalSplitData:
    candidates = corpus["id"][:]
    relevant = {
        query: {candidates[row]: 1 for row in positives.of(number).tolist()}
        for number, query in enumerate(queries["id"])
    }
    return RetrievalSplitData(
        queries=queries, corpus=corpus, relevant_docs=relevant, top_ranked=None
    )
