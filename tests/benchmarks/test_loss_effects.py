"""Losses are compared on the same images, and a table shows how far each is from the plain one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy import loss_effects, training_set_size
from benchmarks.tables.effect_tables import EFFECT_TABLES
from modeling_llm2clip import load_records


def write_dataset(folder: Path, lines: list[dict[str, Any]]) -> str:
    folder.mkdir()
    for line in lines:
        (folder / line["image"]).write_bytes(b"")
    text = "\n".join(json.dumps(line) for line in lines)
    (folder / "captions.jsonl").write_text(f"{text}\n", encoding="utf-8")
    return str(folder)


def test_joined_datasets_are_in_english_and_share_no_name_or_group(tmp_path: Path) -> None:
    line = {"image": "1.png", "captions": ["a dog"], "group_id": "dog"}
    german = {**line, "captions": ["ein Hund"], "lang": "de"}
    sources = {
        "one": write_dataset(tmp_path / "one", [line, german]),
        "two": write_dataset(tmp_path / "two", [line, {**line, "image": "2.png"}]),
    }
    loss_effects.join_datasets(sources, tmp_path / "joined")
    records = load_records(tmp_path / "joined")
    assert {record.lang for record in records} == {"en"}
    assert sorted(record.name for record in records) == ["one/1.png", "two/1.png", "two/2.png"]
    assert {record.group_id for record in records} == {"one/dog", "two/dog"}


@pytest.mark.slow
def test_cut_embeddings_are_scored_by_their_first_dimensions(prepared: Any) -> None:
    items = list(range(len(prepared.records)))
    captions, images = (
        training_set_size.read_first(store, items)
        for store in (prepared.caption_store, prepared.image_store)
    )
    head = training_set_size.load_head(prepared.model)
    whole = training_set_size.score(head, captions, images)
    assert training_set_size.score(head, captions, images, dim=head.config.projection_dim) == whole
    # Of one dimension only the sign is left: all but one of many are ties, which are misses.
    assert training_set_size.score(head, captions, images, dim=1)["r1"] == 0.0


def make_run(loss: str, split: int, r1: float, start: str = "closed form") -> dict[str, Any]:
    scores = {"8": {"r1": r1}, "4": {"r1": r1 / 2}}
    return {"start": start, "num_images": 1_000, "loss": loss, "split": split, "scores": scores}


def test_a_row_shows_its_distance_from_the_plain_loss_of_the_same_start_and_splits() -> None:
    runs = [
        make_run("contrastive", 0, 0.40), make_run("sigmoid", 0, 0.42),
        make_run("contrastive", 0, 0.10, "random"), make_run("sigmoid", 0, 0.08, "random"),
        make_run("contrastive", 1, 0.20), make_run("sigmoid", 1, 0.26),
    ]  # fmt: skip
    report = {
        "hardware": "a machine", "commit": "abc", "num_test_images": 50, "chance_r1": 0.02,
        "config": {"max_steps": 9, "global_batch_size": 5}, "runs": runs,
    }  # fmt: skip
    shown = EFFECT_TABLES["loss_effects"](report)
    assert "| start | images | loss | splits | 8 dimensions | 4 dimensions |" in shown
    assert "| closed form | 1,000 | contrastive | 2 | 30.0 % | 15.0 % |" in shown
    # Gains of 2 and 6 points: their standard deviation is 2.83, of the mean of two 2.
    assert (
        "| closed form | 1,000 | sigmoid | 2 | 34.0 % (+4.0 ± 2.0) | 17.0 % (+2.0 ± 1.0) |" in shown
    )
    assert "| random | 1,000 | sigmoid | 1 | 8.0 % (-2.0) | 4.0 % (-1.0) |" in shown
    assert "among 50 images (chance 2.0 %), after at most 9 steps of 5." in shown
