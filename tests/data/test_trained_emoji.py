"""What a model was trained on of the package's emoji is in its folder, and beside its scores."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from published_datasets import write_own_folder
from tiny_folders import export_tiny_model, save_tiny_llm, save_tiny_vision

from modeling_llm2clip.__main__ import main
from modeling_llm2clip.data.record_loading import find_example_data, load_records
from modeling_llm2clip.data.records import CaptionedImage
from modeling_llm2clip.data.splits import split_records
from modeling_llm2clip.data.trained_emoji import (
    TRAINED_FILE,
    TrainedEmoji,
    find_trained_emoji,
    match_emoji,
    read_trained_emoji,
    write_trained_emoji,
)
from modeling_llm2clip.evaluation.arguments import (
    EvaluatedDataset,
    EvaluatedModel,
    EvaluationArguments,
)
from modeling_llm2clip.evaluation.contamination import count_trained
from modeling_llm2clip.evaluation.datasets.dataset_registry import load_dataset
from modeling_llm2clip.evaluation.encoders.auto import load_encoder
from modeling_llm2clip.evaluation.evaluate import evaluate
from modeling_llm2clip.evaluation.tables import render_results
from modeling_llm2clip.model_folders.model_card_data import read_card_facts, read_results
from modeling_llm2clip.publishing.assemble import assemble_folder
from modeling_llm2clip.publishing.export_model import ExportArguments, export_model
from modeling_llm2clip.publishing.vision_tower_export import export_vision_tower

EMOJI = find_example_data() / "emoji"
KEYS = ("1f34e", "1f355", "1f3bb")


@pytest.fixture(scope="module")
def records() -> list[CaptionedImage]:
    """The English ones, as the demo reads them."""
    return [r for r in load_records(EMOJI, require_images=False) if r.lang == "en"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny_model(tmp_path_factory.mktemp("model") / "plain")


@pytest.fixture()
def seen(model: Path, tmp_path: Path) -> Path:
    """The model, which says that it has seen the first two of three things."""
    folder = tmp_path / "seen"
    shutil.copytree(model, folder)
    write_trained_emoji(folder, TrainedEmoji(frozenset(KEYS[:2])))
    return folder


@pytest.fixture()
def three_emoji(tmp_path: Path) -> Path:
    folder = tmp_path / "three"
    (folder / "images" / "noto").mkdir(parents=True)
    lines = []
    for line in (EMOJI / "captions.jsonl").read_text(encoding="utf-8").splitlines():
        fields = json.loads(line)
        if fields["group_id"] in KEYS and fields["lang"] == "en" and "noto" in fields["image"]:
            lines.append({"image": fields["image"], "captions": fields["captions"]})
            shutil.copy(EMOJI / fields["image"], folder / fields["image"])
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return folder


@pytest.mark.parametrize(("seed", "num_trained", "lang"), [(0, 0, "en"), (1, 249, "ja")])
def test_the_demos_split_of_another_seed_trains_on_what_the_set_tests(
    seed: int, num_trained: int, lang: str, records: list[CaptionedImage]
) -> None:
    held_out = split_records(records, seed=seed)
    trained = find_trained_emoji(r for r in records if r.group_id not in held_out)
    assert trained.is_complete and trained.keys.isdisjoint(held_out)
    # Trained on English names, a thing is no test in Japanese either.
    counted = count_trained(load_dataset("emoji", lang=lang), trained)
    assert counted == {"images": num_trained, "of": 300, "is_complete": True}


def test_a_numbered_image_of_something_else_is_no_emoji() -> None:
    assert match_emoji(["1f34e"], ["red apple"]) == "1f34e"
    assert match_emoji(["mine", "images/noto/1f34e.png"], ["roter Apfel"]) == "1f34e"
    assert match_emoji(["2615.jpg"], ["a street in Rome"]) is None
    assert match_emoji(["apple.png"], ["red apple"]) is None


def test_an_emoji_is_known_by_its_key_too(three_emoji: Path) -> None:
    lines = (three_emoji / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    renamed = []
    for number, fields in enumerate(map(json.loads, lines)):
        key, name = Path(fields["image"]).stem, f"{number}.png"
        shutil.move(three_emoji / fields["image"], three_emoji / name)
        renamed.append({**fields, "image": name, "group_id": key})
    (three_emoji / "captions.jsonl").write_text("\n".join(map(json.dumps, renamed)), "utf-8")
    trained = find_trained_emoji(load_records(three_emoji))
    assert trained.keys == set(KEYS)
    counted = count_trained(load_dataset("folder", three_emoji, lang="en"), trained)
    assert counted == {"images": 3, "of": 3, "is_complete": True}


def test_what_a_tower_has_seen_goes_with_it_into_a_new_model(seen: Path, tmp_path: Path) -> None:
    tower = export_vision_tower(seen, tmp_path / "tower")
    assert read_trained_emoji(tower) == TrainedEmoji(frozenset(KEYS[:2]))
    llm = save_tiny_llm(tmp_path / "llm")
    command = ["build", str(tower), str(llm), str(tmp_path / "new"), "--prompt", "none"]
    assert main(command) == 0
    assert read_trained_emoji(tmp_path / "new") == TrainedEmoji(frozenset(KEYS[:2]))
    plain = save_tiny_vision(tmp_path / "plain")
    assert main(["build", str(plain), str(llm), str(tmp_path / "clean"), "--prompt", "none"]) == 0
    assert read_trained_emoji(tmp_path / "clean") == TrainedEmoji()


def test_a_set_without_emoji_says_nothing_of_them(tmp_path: Path) -> None:
    data = load_dataset("folder", write_own_folder(tmp_path), lang="en")
    assert count_trained(data, TrainedEmoji(frozenset(KEYS))) is None


def test_a_folder_written_anew_has_seen_what_its_source_has(seen: Path, tmp_path: Path) -> None:
    again = export_model(seen, tmp_path / "again")
    assert read_trained_emoji(again) == TrainedEmoji(frozenset(KEYS[:2]))


def test_a_further_training_adds_to_what_was_seen(seen: Path, model: Path, tmp_path: Path) -> None:
    more = TrainedEmoji(frozenset(KEYS[2:]))
    assemble_folder(seen, {}, tmp_path / "more", trained_emoji=more)
    assert read_trained_emoji(tmp_path / "more") == TrainedEmoji(frozenset(KEYS))
    # What is not known is never told as nothing.
    assemble_folder(seen, {}, tmp_path / "unsaid")
    assert read_trained_emoji(tmp_path / "unsaid") == TrainedEmoji(frozenset(KEYS[:2]), False)
    assert not (model / TRAINED_FILE).exists()
    assemble_folder(model, {}, tmp_path / "old", trained_emoji=more)
    assert read_trained_emoji(tmp_path / "old") == replace(more, is_complete=False)
    assemble_folder(model, {}, tmp_path / "unknown")
    assert read_trained_emoji(tmp_path / "unknown") is None


def test_a_damaged_record_of_what_was_seen_is_refused(seen: Path) -> None:
    (seen / TRAINED_FILE).write_text('{"keys": []}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"trained_emoji\.json is damaged"):
        load_encoder(seen).describe()


def test_scores_on_what_was_trained_on_are_warned_of_and_marked(
    seen: Path, model: Path, three_emoji: Path, tmp_path: Path
) -> None:
    chosen = EvaluationArguments(
        models=(EvaluatedModel(str(seen), "seen"), EvaluatedModel(str(model), "unsaid")),
        data=(EvaluatedDataset("folder", str(three_emoji)),),
        tasks=("retrieval", "cross-lingual"),
        output=tmp_path / "out",
    )
    with pytest.warns(UserWarning, match=r"^seen was trained on 2 of 3 images of folder"):
        results = evaluate(chosen)
    told = {(r.model, r.task): r.protocol["data"] for r in results}
    two = {"images": 2, "of": 3, "is_complete": True}
    assert told["seen", "retrieval"]["trained_on"] == two
    assert told["seen", "cross-lingual"]["languages"]["en"]["trained_on"] == two
    assert told["unsaid", "retrieval"]["trained_on"]["images"] is None
    table = render_results(results, style="markdown", details=True)
    assert "| 2 of 3 |" in table and "| unknown |" in table
    (on_card,) = read_results([tmp_path / "out" / "seen" / "folder.retrieval.json"])
    assert on_card.dataset == "folder [trained on 2 of 3 images]"
    written = export_model(seen, tmp_path / "new", facts={"results": (on_card,)})
    assert read_card_facts(written).results == (on_card,)
    with pytest.raises(ValueError, match=r"\(weights, dtype\): not measured with the model"):
        export_model(
            seen, tmp_path / "half", ExportArguments(dtype="float16"), facts={"results": (on_card,)}
        )
