"""The published sets that lie on this machine, read whole and compared with their cards.

`LLM2CLIP_PUBLISHED_SETS` names a folder with a folder for each set, called as the set and filled as
its card says; `images` in it holds the images. Captions are read where there are none.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from modeling_llm2clip.evaluation.datasets.dataset_registry import list_datasets, load_dataset
from modeling_llm2clip.evaluation.datasets.dataset_spec import DatasetSpec
from modeling_llm2clip.evaluation.datasets.schema import RetrievalDataset
from modeling_llm2clip.evaluation.datasets.validation import ReadingCache

FOLDER = Path(os.environ.get("LLM2CLIP_PUBLISHED_SETS", "no-folder-is-given"))
PUBLISHED = [card for card in list_datasets() if card.counts and not card.is_embedded]


@pytest.mark.slow
@pytest.mark.parametrize("card", PUBLISHED, ids=lambda card: card.name)
def test_a_published_set_has_the_counts_and_the_checksums_of_its_card(card: DatasetSpec) -> None:
    folder = FOLDER / card.name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; set LLM2CLIP_PUBLISHED_SETS")
    images = folder / "images" if (folder / "images").is_dir() else None
    has_texts_alone = card.kind in ("retrieval", "captions") and images is None
    cache = ReadingCache()
    for lang in card.languages:
        found = load_dataset(
            card,
            folder,
            image_dir=images,
            lang=lang,
            require_images=not has_texts_alone,
            allow_repeated_class_names=True,  # ImageNet's own: crane, maillot, cardigan
            cache=cache,
        )
        assert found.protocol["excluded"] == {}
        assert "differences_from_published" not in found.protocol
        assert set(found.protocol.get("checksums", {}).values()) <= {"published"}
        if isinstance(found, RetrievalDataset):
            assert len(found.captions) == card.published_counts(lang)["captions"]
            assert found.correspondence.num_pairs == len(found.captions)
