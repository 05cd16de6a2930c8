"""Published datasets on this machine are read whole and compared with their specs.

`LLM2CLIP_PUBLISHED_DATASETS` names a folder with a subfolder for each dataset, named and filled as
its spec says; its subfolder `images` contains the images. Without it only captions are read.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from modeling_llm2clip.evaluation.datasets.dataset_registry import list_datasets, load_dataset
from modeling_llm2clip.evaluation.datasets.dataset_spec import DatasetSpec, ReadingCache
from modeling_llm2clip.evaluation.datasets.retrieval_dataset import RetrievalDataset

FOLDER = Path(os.environ.get("LLM2CLIP_PUBLISHED_DATASETS", "no-folder-is-given"))
PUBLISHED = [spec for spec in list_datasets() if spec.counts and spec.origin == "files"]


@pytest.mark.slow
@pytest.mark.parametrize("spec", PUBLISHED, ids=lambda spec: spec.name)
def test_a_published_dataset_has_the_counts_and_checksums_of_its_spec(spec: DatasetSpec) -> None:
    folder = FOLDER / spec.name
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist; set LLM2CLIP_PUBLISHED_DATASETS")
    images = folder / "images" if (folder / "images").is_dir() else None
    has_only_texts = spec.dataset_type in ("retrieval", "captions") and images is None
    cache = ReadingCache()
    for lang in spec.languages:
        found = load_dataset(
            spec,
            folder,
            image_dir=images,
            lang=lang,
            require_images=not has_only_texts,
            cache=cache,
        )
        assert found.protocol["skipped"] == {}
        assert "differences_from_published" not in found.protocol
        assert set(found.protocol.get("checksums", {}).values()) <= {"published"}
        if isinstance(found, RetrievalDataset):
            assert len(found.captions) == spec.list_published_counts(lang)["captions"]
            assert found.correspondence.num_pairs == len(found.captions)
