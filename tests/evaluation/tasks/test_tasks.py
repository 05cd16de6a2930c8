"""Each task on embeddings whose scores are known by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_encoders import save_named_embeddings, save_tiny_encoder, save_tiny_images
from transformers import CLIPModel

from modeling_llm2clip.data.caption_groups import CaptionGroup
from modeling_llm2clip.evaluation.datasets.schema import (
    ChoiceDataset,
    ChoiceItem,
    ClassificationDataset,
    RetrievalDataset,
)
from modeling_llm2clip.evaluation.encoders.auto import load_encoder
from modeling_llm2clip.evaluation.encoders.encoder import Encoder
from modeling_llm2clip.evaluation.encoders.remembering import RememberingEncoder
from modeling_llm2clip.evaluation.metrics.correspondence import Correspondence
from modeling_llm2clip.evaluation.metrics.ranking import TIE_TOLERANCE
from modeling_llm2clip.evaluation.tasks.caption_retrieval import run_cra
from modeling_llm2clip.evaluation.tasks.caption_retrieval_accuracy import measure_caption_retrieval
from modeling_llm2clip.evaluation.tasks.choices import CHANCES, run_choices
from modeling_llm2clip.evaluation.tasks.classification import (
    find_tied,
    rank_classes,
    run_classification,
)
from modeling_llm2clip.evaluation.tasks.clip_tokens import count_clip_tokens, share_beyond_clip
from modeling_llm2clip.evaluation.tasks.confusion import plot_confusion
from modeling_llm2clip.evaluation.tasks.cross_lingual import run_cross_lingual
from modeling_llm2clip.evaluation.tasks.retrieval import run_retrieval
from modeling_llm2clip.evaluation.tasks.task_registry import TASKS, find_task
from modeling_llm2clip.evaluation.tasks.text_length import run_lengths, split_in_half

EAST, NORTH, WEST = (1.0, 0.0), (0.0, 1.0), (-1.0, 0.0)
NORTH_EAST = (1.0, 1.0)

Embeddings = Mapping[str, Sequence[float]]


def open_embeddings(folder: Path, texts: Embeddings, images: Embeddings | None = None) -> Encoder:
    return load_encoder(save_named_embeddings(folder, dict(texts), dict(images or {})))


def retrieval_set(
    captions: Sequence[str], image_of_text: Sequence[int], *, lang: str = "en", shown: bool = True
) -> RetrievalDataset:
    number = max(image_of_text) + 1
    names = tuple(f"p{i}" for i in range(number))
    return RetrievalDataset(
        name="by-hand",
        images=tuple(Path(name) for name in names) if shown else (),
        image_names=names,
        captions=tuple(captions),
        correspondence=Correspondence.from_image_of_text(image_of_text, number),
        lang=lang,
        protocol={"excluded": {}},
    )


def test_directions_are_not_swapped(tmp_path: Path) -> None:
    # Both captions are nearest to p0, so text to image finds one of two; each image is
    # nearest to its own caption, so image to text finds both.
    texts = {"first": EAST, "second": (1.0, 0.2)}
    images = {"p0": EAST, "p1": NORTH}
    encoder = open_embeddings(tmp_path, texts, images)
    found = run_retrieval(encoder, (retrieval_set(list(texts), [0, 1]),)).scores
    assert found["t2i"]["hit_rate_at_1"] == 0.5
    assert found["i2t"]["hit_rate_at_1"] == 1.0
    assert found["t2i"]["chance_hit_rate_at_1"] == 0.5


def test_chance_among_n_images_is_one_in_n_to_the_last_bit(tmp_path: Path) -> None:
    names = [str(number) for number in range(3)]  # 1 / 3 has no end in binary
    embeddings = {name: torch.eye(3)[row].tolist() for row, name in enumerate(names)}
    images = {f"p{name}": embedding for name, embedding in embeddings.items()}
    encoder = open_embeddings(tmp_path, embeddings, images)
    data = retrieval_set(names, [0, 1, 2])
    found = run_retrieval(encoder, (data,)).scores
    assert found["t2i"]["chance_hit_rate_at_1"] == 1 / 3
    assert run_lengths(encoder, (data,)).scores["chance"] == 1 / 3


def test_several_captions_of_an_image_are_one_hit_and_half_a_recall(tmp_path: Path) -> None:
    texts = {"near": EAST, "far": WEST, "other": NORTH}
    images = {"p0": EAST, "p1": NORTH}
    encoder = open_embeddings(tmp_path, texts, images)
    found = run_retrieval(encoder, (retrieval_set(list(texts), [0, 0, 1]),))
    to_text = found.scores["i2t"]
    assert to_text["hit_rate_at_1"] == 1.0
    assert to_text["recall_at_1"] == 0.75  # p0 finds one of two, p1 one of one
    assert to_text["chance_hit_rate_at_1"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert found.counts == {"images": 2, "texts": 3, "texts_truncated": None}


def test_an_interval_surrounds_its_score(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    texts = {f"t{i}": torch.randn(8, generator=generator).tolist() for i in range(60)}
    images = {f"p{i}": torch.randn(8, generator=generator).tolist() for i in range(30)}
    encoder = open_embeddings(tmp_path, texts, images)
    data = retrieval_set(list(texts), [i // 2 for i in range(60)])
    found = run_retrieval(encoder, (data,)).scores["t2i"]
    interval = found["intervals"]["hit_rate_at_5"]
    assert interval["value"] == found["hit_rate_at_5"]
    assert 0 <= interval["low"] < interval["value"] < interval["high"] <= 1


def test_every_language_counts_the_same_in_the_mean(tmp_path: Path) -> None:
    texts = {"east": EAST, "north": NORTH, "Norden": EAST, "Osten": NORTH, "ost": EAST}
    encoder = open_embeddings(tmp_path, texts, {"p0": EAST, "p1": NORTH})
    english = retrieval_set(["east", "north"], [0, 1])
    german = retrieval_set(["Norden", "Osten", "ost"], [1, 0, 0], lang="de")
    found = run_cross_lingual(encoder, (english, german)).scores
    rate = {lang: s["t2i"]["hit_rate_at_1"] for lang, s in found["languages"].items()}
    assert rate == {"en": 1.0, "de": pytest.approx(1 / 3)}
    assert found["mean"]["t2i"]["hit_rate_at_1"] == pytest.approx(2 / 3)
    alone = run_retrieval(encoder, (german,)).scores
    assert found["languages"]["de"] == alone


def test_cra_is_what_caption_tuning_measures(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    texts = {f"t{i}": torch.randn(6, generator=generator).tolist() for i in range(40)}
    data = retrieval_set(list(texts), [i // 2 for i in range(40)], shown=False)
    found = run_cra(open_embeddings(tmp_path, texts), (data,)).scores
    groups = [CaptionGroup(f"p{i}", (f"t{2 * i}", f"t{2 * i + 1}")) for i in range(20)]
    wanted = measure_caption_retrieval(
        lambda captions: torch.tensor([texts[c] for c in captions]), groups
    )
    assert found["cra"]["value"] == pytest.approx(wanted)
    assert found["chance"] == 1 / 20


def test_cra_needs_two_captions_an_image(tmp_path: Path) -> None:
    texts = {"a": EAST, "b": NORTH, "c": WEST}
    data = retrieval_set(list(texts), [0, 0, 1], shown=False)
    with pytest.raises(ValueError, match=r"1 of 2 have one only: \['p1'\]"):
        run_cra(open_embeddings(tmp_path, texts), (data,))


def test_cra_asks_no_text_for_itself(tmp_path: Path) -> None:
    texts = {"a": EAST, "b": NORTH, "c": WEST}
    twice = retrieval_set(["a", "a", "b", "b"], [0, 0, 1, 1], shown=False)
    with pytest.raises(ValueError, match=r"2 of 2 have one only: \['p0', 'p1'\]"):
        run_cra(open_embeddings(tmp_path, texts), (twice,))
    third = retrieval_set(["a", "a", "b", "b", "c"], [0, 0, 0, 1, 1], shown=False)
    assert [group.captions for group in third.group_captions()] == [("a", "b"), ("b", "c")]


def classification_set(labels: Sequence[int], names: Sequence[str], **fields: Any) -> Any:
    images = tuple(f"p{i}" for i in range(len(labels)))
    return ClassificationDataset(
        name="by-hand",
        images=tuple(map(Path, images)),
        image_names=images,
        labels=tuple(labels),
        class_names=tuple(names),
        templates=fields.get("templates", ("{}",)),
        lang="en",
        protocol={},
    )


def test_a_class_is_the_mean_of_its_prompts_at_unit_length(tmp_path: Path) -> None:
    # Prompts of unlike length: their unit embeddings count, so that class A points north-east.
    texts = {"an A": (100.0, 0.0), "the A": (0.0, 0.01), "an B": WEST, "the B": WEST}
    images = {"p0": NORTH_EAST, "p1": WEST, "p2": (-1.0, 0.9)}
    data = classification_set([0, 1, 0], ["A", "B"], templates=("an {}", "the {}"))
    found = run_classification(open_embeddings(tmp_path, texts, images), (data,)).scores
    assert found["top_1"]["value"] == pytest.approx(2 / 3)
    assert found["mean_per_class_top_1"] == 0.75  # A: one of two, B: one of one
    assert found["top_1_of_class"] == {"A": 0.5, "B": 1.0}
    assert found["most_confused"] == [{"class": "A", "taken_for": "B", "count": 1}]
    assert "top_5" not in found  # of two classes it would always be 1


def test_classes_that_tie_are_a_wrong_answer(tmp_path: Path) -> None:
    texts = {"A": EAST, "B": EAST, "C": NORTH}
    data = classification_set([0, 2], ["A", "B", "C"])
    encoder = open_embeddings(tmp_path, texts, {"p0": EAST, "p1": NORTH})
    found = run_classification(encoder, (data,)).scores
    assert found["top_1"]["value"] == 0.5
    assert found["classes_with_tied_embeddings"] == ["A", "B"]
    assert found["most_confused"] == [{"class": "A", "taken_for": "B", "count": 1}]


def test_the_diagonal_of_the_confusion_is_what_top_1_counts() -> None:
    # Images of class 0: nearest to it, in a tie with class 1, nearest to class 2.
    classes = F.normalize(torch.tensor([[1.0, 0, 0], [1, 0, 0.5], [0, 1, 0]]), dim=-1)
    images = F.normalize(torch.tensor([[1.0, 0, -1], [0, 0, 0], [0, 1, 0]]), dim=-1)
    labels = torch.zeros(3, dtype=torch.long)
    ranks, taken_for = rank_classes(images, classes, labels)
    assert (ranks == 1).tolist() == (taken_for == labels).tolist() == [True, False, False]
    assert taken_for.tolist() == [0, 1, 2]


def test_classes_whose_embeddings_tie_are_found_among_near_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    classes = torch.nn.functional.normalize(torch.randn(1500, 16, generator=generator), dim=-1)
    classes[1400] = classes[3]
    # Ten times the width of a tie away: near in a cosine of float32, and yet another class.
    shifted = classes[7].double() + 10 * TIE_TOLERANCE * torch.eye(16, dtype=torch.float64)[0]
    assert find_tied(classes) == [3, 1400]
    near = torch.cat([classes.double(), shifted[None]])
    assert find_tied(near) == [3, 1400]


def test_top_5_finds_what_top_1_misses(tmp_path: Path) -> None:
    names = [str(i) for i in range(7)]
    texts = {name: torch.eye(7)[i].tolist() for i, name in enumerate(names)}
    # Class i is liked less the higher i is: the image's own class 4 is fifth, class 5 sixth.
    liking = [7.0, 6, 5, 4, 3, 2, 1]
    data = classification_set([4, 5], names)
    encoder = open_embeddings(tmp_path, texts, {"p0": liking, "p1": liking})
    found = run_classification(encoder, (data,)).scores
    assert (found["top_1"]["value"], found["top_5"]["value"]) == (0.0, 0.5)


def test_the_confusion_image_is_dark_where_classes_were_taken() -> None:
    sheet = plot_confusion(torch.tensor([[3, 0], [1, 1]]), ["A", "B"]).convert("L")
    cell = 24
    left, top = sheet.width - 2 * cell, sheet.height - 2 * cell

    def shade(row: int, column: int) -> int:
        return int(sheet.getpixel((left + column * cell + 12, top + row * cell + 12)))  # type: ignore[arg-type]

    assert [shade(0, 0), shade(0, 1), shade(1, 0), shade(1, 1)] == [0, 255, 128, 128]


def test_a_thousand_classes_still_make_an_image() -> None:
    assert plot_confusion(torch.eye(1000).long(), ["x"] * 1000).size == (1000, 1000)


def test_the_true_caption_must_be_nearer_and_a_tie_is_wrong(tmp_path: Path) -> None:
    texts = {"true": EAST, "false": NORTH, "same": EAST}
    items = (
        ChoiceItem("p0", "swap", ("true", "false"), (Path("p0"),)),
        ChoiceItem("p1", "swap", ("true", "false"), (Path("p1"),)),
        ChoiceItem("p0b", "replace", ("true", "same"), (Path("p0"),)),
    )
    encoder = open_embeddings(tmp_path, texts, {"p0": EAST, "p1": NORTH, "p0b": EAST})
    found = run_choices(encoder, (ChoiceDataset("by-hand", "image", items, "en"),))
    assert found.scores["accuracy"]["value"] == pytest.approx(1 / 3)
    assert found.scores["categories"]["swap"] == {"items": 2, "accuracy": 0.5}
    assert found.counts["items"] == 3 and found.counts["images"] == 2


def test_an_anchor_stands_for_the_image(tmp_path: Path) -> None:
    texts = {"true": EAST, "false": NORTH, "anchor": (1.0, 0.1), "misleading": (0.1, 1.0)}
    items = tuple(
        ChoiceItem(anchor, "swap", ("true", "false"), anchor=anchor)
        for anchor in ("anchor", "misleading")
    )
    encoder = open_embeddings(tmp_path, texts)
    found = run_choices(encoder, (ChoiceDataset("by-hand", "text", items, "en"),)).scores
    assert found["accuracy"]["value"] == 0.5


@pytest.mark.parametrize(
    ("images", "wanted"),
    [
        ((EAST, NORTH), {"text": 1, "image": 1, "group": 1}),
        # Both images find their captions, but the first is nearer to both captions.
        (((0.9, 0.8, 0.0), (0.1, 0.2, 1.0)), {"text": 1, "image": 0, "group": 0}),
        # Each caption finds its image, but the first caption is nearer to both.
        (((0.9, 0.1), (0.8, 0.6)), {"text": 0, "image": 1, "group": 0}),
        ((NORTH, EAST), {"text": 0, "image": 0, "group": 0}),
    ],
)
def test_winoground_scores_have_their_directions(
    images: Any, wanted: dict[str, int], tmp_path: Path
) -> None:
    width = len(images[0])
    texts = {"c0": torch.eye(width)[0].tolist(), "c1": torch.eye(width)[1].tolist()}
    items = (ChoiceItem("w", "swap", ("c0", "c1"), (Path("a"), Path("b"))),)
    encoder = open_embeddings(tmp_path, texts, {"w/0": images[0], "w/1": images[1]})
    found = run_choices(encoder, (ChoiceDataset("by-hand", "images", items, "en"),)).scores
    assert {name: found[name]["value"] for name in wanted} == wanted


def test_winoground_chances_are_those_of_random_scores() -> None:
    # Four independent numbers a question, as embeddings without meaning give them.
    scores = torch.rand(400_000, 2, 2, generator=torch.Generator().manual_seed(0))
    text = (scores[:, 0, 0] > scores[:, 0, 1]) & (scores[:, 1, 1] > scores[:, 1, 0])
    image = (scores[:, 0, 0] > scores[:, 1, 0]) & (scores[:, 1, 1] > scores[:, 0, 1])
    found = {"text": text, "image": image, "group": text & image}
    for name, right in found.items():
        # Six standard deviations of a share of 400,000 draws: 0.005 at most.
        assert float(right.double().mean()) == pytest.approx(CHANCES[name], abs=0.005)


def test_clip_tokens_are_those_of_clips_tokenizer() -> None:
    assert count_clip_tokens(["a dog", "A  dog ", "a photo of a dog."]) == [2, 2, 6]


def test_the_share_beyond_clip_is_what_lies_behind_the_75th_token() -> None:
    assert share_beyond_clip([75, 10]) == 0.0
    assert share_beyond_clip([100, 100, 50]) == pytest.approx(50 / 250)


def test_the_length_task_scores_each_bucket_by_itself(tmp_path: Path) -> None:
    short, long = "a dog", " ".join(["dog"] * 100)
    texts = {short: EAST, long: EAST}
    encoder = open_embeddings(tmp_path, texts, {"p0": EAST, "p1": NORTH})
    found = run_lengths(encoder, (retrieval_set([short, long], [0, 1]),)).scores
    first, second = found["buckets"]
    assert (first["from_clip_tokens"], first["to_clip_tokens"]) == (1, 20)
    assert (second["from_clip_tokens"], second["to_clip_tokens"]) == (76, 110)
    assert first["hit_rate_at_1"]["value"] == 1.0 and second["hit_rate_at_1"]["value"] == 0.0
    assert second["share_of_tokens_beyond_clip"] == 0.25
    assert found["all"]["queries"] == 2 and found["all"]["hit_rate_at_1"]["value"] == 0.5
    assert found["all"]["share_of_tokens_beyond_clip"] == pytest.approx(25 / 102)
    assert found["all"]["share_cut_by_this_encoder"] is None


@pytest.mark.parametrize(
    ("text", "halves"),
    [
        ("One dog. Two cats sleep here. Three.", ("One dog.", "Two cats sleep here. Three.")),
        ("a dog on a mat", ("a dog", "on a mat")),
        ("狗在叫。猫在睡。", ("狗在叫。", "猫在睡。")),
        ("dog", None),
        ("dog.", None),
    ],
)
def test_a_text_is_cut_near_its_middle(text: str, halves: tuple[str, str] | None) -> None:
    assert split_in_half(text) == halves


def test_without_images_a_first_half_looks_for_its_second(tmp_path: Path) -> None:
    texts = {"One.": EAST, "Two.": EAST, "Three.": NORTH, "Four.": WEST}
    data = retrieval_set(["One. Two.", "Three. Four."], [0, 1], shown=False)
    found = run_lengths(open_embeddings(tmp_path, texts), (data,))
    # "Three." is as far from "Two." as from nothing else: north is nearer to east than to west.
    assert found.scores["all"]["hit_rate_at_1"]["value"] == 0.5
    assert found.counts["queries"] == 2 and found.counts["texts"] == 4


def test_what_was_encoded_is_not_encoded_again(tmp_path: Path) -> None:
    texts = {"a": EAST, "b": NORTH}
    inner = open_embeddings(tmp_path, texts, {"p0": EAST})
    encoder = RememberingEncoder(inner)
    first = encoder.encode_texts(["a", "b", "a"]).embeds
    image = encoder.encode_images([None], names=["p0"])
    asked: list[Any] = []
    inner.encode_texts = asked.append  # type: ignore[method-assign, assignment]
    inner.encode_images = asked.append  # type: ignore[method-assign, assignment]
    assert torch.equal(encoder.encode_texts(["b", "a"]).embeds, first[[1, 0]])
    assert torch.equal(encoder.encode_images([None], names=["p0"]), image)
    assert asked == []


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    """A CLIP whose embeddings of images are NaN, as an evaluation asks it."""
    folder = save_tiny_encoder("clip", tmp_path_factory.mktemp("damaged") / "clip")
    model = CLIPModel.from_pretrained(folder)
    torch.nn.init.constant_(model.visual_projection.weight, torch.nan)
    model.save_pretrained(folder)
    return RememberingEncoder(load_encoder(folder))


def test_embeddings_that_are_not_finite_score_nothing(damaged: Encoder, tmp_path: Path) -> None:
    images = tuple(save_tiny_images(tmp_path, 2))
    classes = classification_set([0, 1], ["A", "B"])
    message = r"gives 2 of 2 images embeddings with NaN or infinity, in float32: \['p0', 'p1'\]"
    with pytest.raises(ValueError, match=message):
        run_classification(damaged, (replace(classes, images=images),))
    items = (ChoiceItem("first", "swap", ("a dog", "a cat"), images[:1]),)
    with pytest.raises(ValueError, match=r"gives 1 of 1 images .*\['first'\]"):
        run_choices(damaged, (ChoiceDataset("by-hand", "image", items, "en"),))


def test_tasks_go_by_their_names() -> None:
    assert all(find_task(name).name == name for name in TASKS)
    with pytest.raises(ValueError, match=r"No task is called 'recall'; known are \['retrieval'"):
        find_task("recall")
