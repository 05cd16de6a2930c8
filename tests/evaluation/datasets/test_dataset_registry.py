"""Laws of the registry: what every card says, and what a set refuses to be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from published_datasets import tiny_card, write_coco_test

from modeling_llm2clip.data.atomic_files import hash_file
from modeling_llm2clip.evaluation.datasets.dataset_registry import (
    find_dataset,
    list_datasets,
    load_dataset,
)
from modeling_llm2clip.evaluation.datasets.dataset_spec import DatasetSpec
from modeling_llm2clip.evaluation.datasets.schema import (
    ChoiceDataset,
    ChoiceItem,
    ClassificationDataset,
    RetrievalDataset,
)
from modeling_llm2clip.evaluation.datasets.templates import IMAGENET_TEMPLATES
from modeling_llm2clip.evaluation.metrics.correspondence import Correspondence

OWN = {"folder", "folder-long", "image-folder"}
every_card = pytest.mark.parametrize("card", list_datasets(), ids=lambda card: card.name)


@every_card
def test_every_card_says_whose_it_is_where_it_is_and_what_was_chosen(card: DatasetSpec) -> None:
    assert find_dataset(card.name) is card
    for text in (card.title, card.license, card.citation, card.source, card.files):
        assert text and text == text.strip()
    assert "split" in card.protocol
    assert json.loads(json.dumps(dict(card.protocol))) == card.protocol
    assert "\n" not in card.describe() and card.describe().startswith(f"{card.name}: ")


@every_card
def test_every_published_set_has_counts_in_every_language(card: DatasetSpec) -> None:
    if card.name in OWN:
        assert not card.counts and not card.languages
        return
    wanted = {"choice": {"items"}, "classification": {"images", "classes"}}
    for lang in card.languages:
        counts = card.published_counts(lang)
        assert set(counts) == wanted.get(card.kind, {"images", "captions"})
        assert all(count > 0 for count in counts.values())


@every_card
def test_every_checksum_is_a_digest_of_its_algorithm(card: DatasetSpec) -> None:
    lengths = {"md5": 32, "sha256": 64}
    for published in card.checksums.values():
        algorithm, _, digest = published.partition(":")
        assert len(bytes.fromhex(digest)) * 2 == lengths[algorithm]


def test_the_cards_are_listed_by_name() -> None:
    names = [card.name for card in list_datasets()]
    assert names == sorted(set(names))
    assert {"flickr30k", "coco", "xm3600", "imagenet", "winoground", "emoji"} <= set(names)


def test_the_captions_of_xm3600_are_as_many_as_its_paper_counts() -> None:
    # 261,375 captions in 36 languages (Thapliyal et al., EMNLP 2022, abstract).
    counts = find_dataset("xm3600").counts_of_language
    assert len(counts) == 36
    assert sum(count["captions"] for count in counts.values()) == 261_375


def test_imagenet_has_eighty_different_templates() -> None:
    assert len(set(IMAGENET_TEMPLATES)) == len(IMAGENET_TEMPLATES) == 80
    assert all(text.count("{}") == 1 for text in IMAGENET_TEMPLATES)
    # Spelt as published, with their grammar: the score hangs on it.
    assert {"itap of my {}.", "a origami {}.", "a embroidered {}."} <= set(IMAGENET_TEMPLATES)
    assert {"a photo of the hard to see {}.", "the {} in a video game."} <= set(IMAGENET_TEMPLATES)


def test_a_file_with_the_published_checksum_is_reported_as_such(tmp_path: Path) -> None:
    folder = write_coco_test(tmp_path)
    file = folder / "coco_karpathy_test.json"
    # The digest of `md5sum`, of bytes that are known.
    file_of_known_digest = tmp_path / "known"
    file_of_known_digest.write_bytes(b"abc")
    assert hash_file(file_of_known_digest, "md5") == "900150983cd24fb0d6963f7d28e17f72"
    card = tiny_card("coco", images=3, captions=15)
    good = replace(card, checksums={file.name: f"md5:{hash_file(file, 'md5')}"})
    assert load_dataset(good, folder).protocol["checksums"] == {file.name: "published"}
    bad = replace(card, checksums={file.name: "md5:900150983cd24fb0d6963f7d28e17f72"})
    with pytest.raises(ValueError, match=r"not the published one: 1 \(coco_karpathy_test.json"):
        load_dataset(bad, folder)


def test_a_protocol_can_be_written_as_json_and_names_no_folder_of_this_machine(
    tmp_path: Path,
) -> None:
    found = load_dataset(tiny_card("coco", images=3, captions=15), write_coco_test(tmp_path))
    assert str(tmp_path) not in json.dumps(dict(found.protocol))
    wanted = {"set", "lang", "split", "source", "images", "captions", "published", "excluded"}
    assert wanted <= set(found.protocol)


def test_a_retrieval_set_refuses_a_correspondence_of_other_counts() -> None:
    pairs = Correspondence.from_image_of_text([0, 1], 2)
    with pytest.raises(ValueError, match=r"2 images and 2 captions, the set has 2 and 3"):
        RetrievalDataset("own", (), ("a", "b"), ("one", "two", "three"), pairs, "en", {})
    with pytest.raises(ValueError, match=r"names of images repeat: \['a'\]"):
        RetrievalDataset("own", (), ("a", "a"), ("one", "two"), pairs, "en", {})
    with pytest.raises(ValueError, match="1 images and 2 names"):
        RetrievalDataset("own", (Path("a"),), ("a", "b"), ("one", "two"), pairs, "en", {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_names": ("cat", "cat")}, r"class names repeat: \['cat'\]"),
        ({"labels": (0, 2)}, "labels from 0 to 2 do not fit 2 classes"),
        ({"labels": (0,)}, "2 images and 1 labels"),
        ({"templates": ("a photo",)}, r"without exactly one \{\}: \['a photo'\]"),
        ({"templates": ()}, "none given"),
    ],
)
def test_a_classification_set_refuses_what_has_no_meaning(
    changes: dict[str, Any], message: str
) -> None:
    good: dict[str, Any] = {
        "name": "own", "images": (Path("a"), Path("b")), "image_names": ("a", "b"),
        "labels": (0, 1), "class_names": ("cat", "dog"), "templates": ("a {}.",), "lang": "en",
        "protocol": {},
    }  # fmt: skip
    ClassificationDataset(**good)
    with pytest.raises(ValueError, match=message):
        ClassificationDataset(**{**good, **changes})


def test_a_choice_set_refuses_items_of_another_form() -> None:
    item = ChoiceItem("1", "all", ("one", "two"), anchor="three")
    ChoiceDataset("own", "text", (item,), "en", {})
    with pytest.raises(ValueError, match="0 images and anchor 'three'; form 'image' has 1"):
        ChoiceDataset("own", "image", (item,), "en", {})
    with pytest.raises(ValueError, match="there are no items"):
        ChoiceDataset("own", "text", (), "en", {})
    with pytest.raises(ValueError, match="form='words' is none of"):
        ChoiceDataset("own", "words", (item,), "en", {})  # type: ignore[arg-type]
