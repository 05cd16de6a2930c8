"""The whole evaluation: several models on several datasets, resumed and refused."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluating import TASKS, arguments, change, write_data
from read_only import read_only
from tiny_encoders import save_named_embeddings, save_tiny_encoder, save_tiny_images
from transformers import CLIPModel

from modeling_llm2clip.configs.evaluation_config import (
    EvaluatedDataset,
    EvaluatedModel,
    EvaluationConfig,
)
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.data.validation_errors import DataValidationError
from modeling_llm2clip.evaluation import evaluate as evaluation
from modeling_llm2clip.evaluation.datasets.dataset_registry import load_dataset
from modeling_llm2clip.evaluation.encoders.encoder import KnownRows
from modeling_llm2clip.evaluation.evaluate import evaluate
from modeling_llm2clip.evaluation.report import EvaluationResults, render_results
from modeling_llm2clip.evaluation.results import (
    Result,
    read_evaluation_results,
    read_result,
    write_result,
)


def no_model(*_: object) -> Any:
    pytest.fail("a model was loaded")


@pytest.fixture
def _refuse_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be encoded: what fails must fail before."""
    monkeypatch.setattr(evaluation, "_run", no_model)


@pytest.fixture
def finished(results: Path, tmp_path: Path) -> Path:
    """A copy of what two models scored, which a test may continue or change."""
    return Path(shutil.copytree(results, tmp_path / "finished"))


def read_scores(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return {(r.model, r.task): r.scores for r in read_evaluation_results(folder)}


@pytest.mark.usefixtures("_refuse_models")
def test_one_or_several_models_and_datasets_are_taken(
    sources: Any, data: str, finished: Path
) -> None:
    config = EvaluationConfig(output=finished, languages=("en",), show_progress=False)
    one = evaluate(sources("clip"), Path(data), config, tasks=["cra"])
    several = evaluate(
        [EvaluatedModel(source=sources("clip")), sources("siglip")], [f"folder={data}"], config,
        tasks=["cra"],
    )  # fmt: skip
    assert [result.model for result in several] == ["clip", "siglip"]
    assert list(one) == list(several[:1])
    with pytest.raises(ValueError, match="Got no models"):
        evaluate([], data)
    with pytest.raises(ValueError, match="Got no datasets"):
        evaluate(sources("clip"), [])
    with pytest.raises(ValueError, match=r"must be a name, .*not a RetrievalDataset"):
        evaluate(sources("clip"), [load_dataset(data, lang="en")])


def test_records_have_the_scores_of_their_folder(
    sources: Any, data: str, results: Path, tmp_path: Path
) -> None:
    records = [record for record in load_records(data) if record.lang == "en"]
    config = EvaluationConfig(output=tmp_path, show_progress=False)
    [scored] = evaluate(sources("clip"), records, config)
    expected = read_result(results / "clip" / "folder.retrieval.json")
    assert scored.scores == expected.scores and scored.dataset.startswith("records-")
    assert scored.protocol["data"]["digest"] == expected.protocol["data"]["digest"]


def test_a_result_has_everything_that_its_score_depends_on(results: Path) -> None:
    file = results / "clip" / "folder.retrieval.json"
    result = json.loads(file.read_text(encoding="utf-8"))
    protocol = result["protocol"]
    assert protocol["data"]["split"] == "all" and protocol["data"]["lang"] == "en"
    assert (protocol["data"]["images"], protocol["data"]["captions"]) == (8, 16)
    assert protocol["data"]["skipped"] == {}
    assert protocol["model"]["text"]["max_tokens"] == 77
    assert protocol["model"]["text"]["prompt"] is None
    assert protocol["model"]["images"]["crop"] == {"height": 32, "width": 32}
    assert protocol["model"]["images"]["mean"][0] == pytest.approx(0.48145466)
    assert protocol["model"]["dtype"] == "float32"
    assert "ties count against the model" in protocol["task"]["ties"]
    assert result["counts"] == {"images": 8, "texts": 16, "texts_truncated": 0}
    assert result["run"]["images_per_batch"] == 8 and result["run"]["device"] == "cpu"
    assert len(result["fingerprint"]["weights"]) == 64
    assert result["versions"]["torch"] == version("torch")  # some builds have another __version__
    assert result["seconds"] >= 0
    # Seconds are those of what was encoded for this task: the others take it from memory.
    encoded = {r.task: r.run["encoded"] for r in read_evaluation_results(results)}
    nothing = {"texts": 0, "images": 0}
    assert encoded == {
        "retrieval": {"texts": 16, "images": 8}, "cra": nothing, "length": nothing,
    }  # fmt: skip


def test_batch_size_and_order_of_tasks_change_no_score_and_results_print_as_a_table(
    sources: Any, data: str, results: Path, tmp_path: Path
) -> None:
    chosen = arguments(tmp_path, data, sources("siglip"), sources("llm2clip"), batch_size=3)
    scored = evaluate(**change(chosen, tasks=TASKS[::-1]))
    for task, result in zip(TASKS[::-1], scored, strict=False):
        assert result.scores == read_scores(results)["siglip", task]
    assert "<|start_header_id|>" in scored[-1].protocol["model"]["text"]["prompt"]["before"]
    assert isinstance(scored, EvaluationResults) and len(scored) == 6
    assert str(scored) == render_results(list(scored))
    assert str(scored[:1]) == render_results([scored[0]])
    assert scored._repr_markdown_() == render_results(scored, style="markdown")


def test_a_stopped_evaluation_continues_where_it_stopped(
    sources: Any, data: str, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = arguments(tmp_path, data, sources("clip"))

    def stop(_: Result) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(**chosen, on_result=stop)
    [file] = (tmp_path / "clip").iterdir()
    assert file.name == "folder.retrieval.json"
    before = file.read_bytes(), file.stat().st_mtime_ns
    computed: list[str] = []
    run = evaluation._run

    def count(*args: Any) -> Result:
        computed.append(args[1].task.name)
        return run(*args)

    monkeypatch.setattr(evaluation, "_run", count)
    # Another batch size changes no score, so it is not another run.
    resumed = evaluate(**change(chosen, batch_size=3))
    assert computed == ["cra", "length"]
    assert (file.read_bytes(), file.stat().st_mtime_ns) == before
    assert {("clip", r.task): r.scores for r in resumed}.items() <= read_scores(results).items()


@pytest.mark.skipif(not hasattr(os, "setreuid"), reason="needs the users of POSIX")
def test_finished_results_are_taken_from_a_folder_that_may_not_be_written(
    sources: Any, data: str, finished: Path
) -> None:
    (finished / "clip" / "folder.retrieval.json").unlink()
    chosen = arguments(finished, data, sources("clip"), tasks=("cra",))
    with read_only(finished / "clip"), read_only(finished):
        assert list(evaluate(**chosen)) == [read_result(finished / "clip" / "folder.cra.json")]
        with pytest.raises(PermissionError, match="may not write into"):
            evaluate(**change(chosen, tasks=("retrieval",)))


@pytest.mark.usefixtures("_refuse_models")
def test_a_file_of_another_run_is_refused_with_what_differs(
    sources: Any, data: str, finished: Path
) -> None:
    chosen = arguments(finished, data, sources("clip"), tasks=("retrieval",))
    with pytest.raises(ValueError, match=r"another run: .*dtype was 'float32' and is 'bfloat16'"):
        evaluate(**change(chosen, dtype="bfloat16"))
    with pytest.raises(ValueError, match=r"another run: .*protocol\.data\.lang was 'en' and is"):
        evaluate(**change(chosen, languages=("de",)))
    other = EvaluatedModel(source=sources("siglip"), name="clip")
    message = r"retrieval\.json comes from another model: .*fingerprint\.weights was .* and is "
    for tasks in (("retrieval",), ("length",)):  # one name is one model, whatever its tasks
        with pytest.raises(ValueError, match=message):
            evaluate(**change(chosen, models=other, tasks=tasks))


@pytest.mark.usefixtures("_refuse_models")
def test_scores_that_would_share_a_column_must_be_comparable(
    sources: Any, data: str, finished: Path
) -> None:
    shutil.rmtree(finished / "siglip")
    other = arguments(finished, data, sources("siglip"), tasks=("cra",), languages=("de",))
    message = r"cra\.json comes from another dataset or protocol: .*data\.lang was 'en' and is 'de'"
    with pytest.raises(ValueError, match=message):
        evaluate(**other)
    other = arguments(finished, data, sources("siglip"), tasks=("length",), captions_only=True)
    with pytest.raises(ValueError, match=r"task\.candidates was 'all images' and is 'second parts"):
        evaluate(**other)


@pytest.mark.usefixtures("_refuse_models")
def test_a_moved_folder_is_the_same_run(
    sources: Any, data: str, finished: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(data, tmp_path / "elsewhere")
    same = evaluate(**arguments(finished, data, sources("clip")))
    assert list(evaluate(**arguments(finished, str(moved), sources("clip")))) == list(same)


@pytest.mark.usefixtures("_refuse_models")
def test_a_result_of_another_version_is_another_run_or_causes_a_warning(
    sources: Any, data: str, finished: Path
) -> None:
    chosen = arguments(finished, data, sources("clip"), tasks=("cra",))
    file = finished / "clip" / "folder.cra.json"
    result = read_result(file)
    older = replace(result, versions={**result.versions, "transformers": "4.0"})
    write_result(file, older)
    with pytest.warns(UserWarning, match=r"folder\.cra\.json .*transformers was '4\.0' and is"):
        assert list(evaluate(**chosen)) == [older]
    file.unlink()
    write_result(file, replace(result, versions={**result.versions, "modeling_llm2clip": "0.0.1"}))
    with pytest.raises(ValueError, match=r"versions\.modeling_llm2clip was '0\.0\.1' and is"):
        evaluate(**chosen)


def test_a_result_that_another_process_wrote_meanwhile_stays(finished: Path) -> None:
    file = finished / "clip" / "folder.cra.json"
    theirs = read_result(file)
    write_result(file, replace(theirs, seconds=0.5))  # of the same run
    ours = replace(theirs, protocol={**theirs.protocol, "model": {"dtype": "another"}})
    with pytest.raises(
        ValueError, match=r"cra\.json comes from another run: .*Choose another output"
    ):
        write_result(file, ours)
    assert read_result(file) == replace(theirs, seconds=0.5)


@pytest.mark.usefixtures("_refuse_models")
def test_a_result_with_another_score_than_was_written_is_refused(
    sources: Any, data: str, finished: Path
) -> None:
    file = finished / "clip" / "folder.cra.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["scores"]["cra"]["value"] = 0.99
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"folder\.cra\.json is not .*modified after it was written"
    ):
        evaluate(**arguments(finished, data, sources("clip"), tasks=("cra",)))


def test_several_datasets_of_ones_own_are_distinguished_by_their_names(
    sources: Any, data: str, tmp_path: Path
) -> None:
    config = EvaluationConfig(output=tmp_path / "out", languages=("en",), show_progress=False)
    both = [f"photos={data}", f"drawings={data}"]
    results = evaluate(sources("clip"), both, config, tasks=["cra"])
    assert [result.dataset for result in results] == ["photos", "drawings"]
    assert results[0].scores == results[1].scores
    table = render_results(results, style="text")
    assert "photos" in table and "drawings" in table
    several = replace(config, languages=(), output=tmp_path / "new")
    with pytest.raises(
        ValueError, match=r"one language at a time, but got en, de for photos.*=en,"
    ):
        evaluate(sources("clip"), both[0], several, tasks=["cra"])


def test_bad_data_fails_before_a_model_is_loaded_or_is_skipped_and_counted_on_request(
    sources: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_data(tmp_path / "data")
    (folder / "2.png").unlink()
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:40])
    captions = folder / "captions.jsonl"
    text = captions.read_text(encoding="utf-8").replace('"x en"', '" "')
    captions.write_text(text, encoding="utf-8")
    chosen = arguments(tmp_path / "out", str(folder), sources("clip"), tasks=("retrieval",))
    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "_run", no_model)
        with pytest.raises(DataValidationError) as error:
            evaluate(**chosen)
    for message in ("image missing: 2", "image unreadable: 1 (", "3.png", "blank caption: 1"):
        assert message in str(error.value)
    assert not (tmp_path / "out").exists()
    (result,) = evaluate(**change(chosen, skip_invalid=True))
    assert result.counts["images"] == 5
    assert sum(result.protocol["data"]["skipped"].values()) == 3
    assert result.protocol["data"]["skipped_samples"] == 3


def test_broken_images_are_all_named_when_a_model_meets_one_and_results_stay(
    sources: Any, data: str, tmp_path: Path
) -> None:
    folder = write_data(tmp_path / "broken")
    contents = {file: file.read_bytes() for file in (folder / "2.png", folder / "5.png")}
    for file, content in contents.items():
        file.write_bytes(content[:40])
    both = [EvaluatedDataset(name=name, folder=str(place))
            for name, place in (("folder", data), ("broken", folder))]  # fmt: skip
    chosen = arguments(tmp_path / "out", data, sources("clip"), tasks=("retrieval",), data=both)
    finished: list[Any] = []
    message = r"(?s)broken in .*image unreadable: 2 \(.*2\.png.*5\.png"
    with pytest.raises(DataValidationError, match=message):
        evaluate(**chosen, on_result=finished.append)
    for file, content in contents.items():
        file.write_bytes(content)
    results = list(evaluate(**chosen))
    assert [result.dataset for result in results] == ["folder", "broken"]
    assert results[:1] == finished


@pytest.mark.usefixtures("_refuse_models")
def test_what_does_not_fit_together_fails_before_a_model_is_loaded(
    sources: Any, data: str, tmp_path: Path
) -> None:
    clip = sources("clip")
    embeddings = str(save_named_embeddings(tmp_path / "embeddings", {"a": [1.0]}, {}))
    for models, changes, message in (
        ([clip], {"tasks": ["choices"]}, r"No dataset has the type .*choices \(choice"),
        ([clip, clip], {}, "Models must have different names"),
        (
            [clip],
            {"data": [data, data]},
            rf"Datasets must .*: folder \({data}\), folder.*Name your",
        ),
        ([clip], {"tasks": ["recall"]}, "There is no task 'recall'"),
        ([clip], {"data": f"flickr={data}"}, "'flickr' is too similar .* flickr30k"),
        ([embeddings], {}, "embeddings cannot encode images, which retrieval"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(**arguments(tmp_path / "out", data, *models, **changes))


@pytest.mark.usefixtures("_refuse_models")
def test_captions_that_a_task_cannot_use_fail_before_a_model_is_loaded(
    sources: Any, tmp_path: Path
) -> None:
    captions = ["two words", *"abcdefg"]
    pairs = zip(save_tiny_images(tmp_path, 8), captions, strict=True)
    lines = [json.dumps({"image": path.name, "captions": [text]}) for path, text in pairs]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    changes: dict[str, Any] = {"languages": (), "captions_only": True}
    chosen = arguments(tmp_path / "out", str(tmp_path), sources("clip"), **changes)
    for task, message in (
        ("cra", "8 of 8 images have only one"), ("length", "1 of 8 captions can be split"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            evaluate(**change(chosen, tasks=(task,)))


def test_a_missing_embedding_is_reported_before_a_model_is_loaded(
    sources: Any, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No image caused the error, so that none is decoded because of it."""
    monkeypatch.setattr(
        evaluation, "check_eval_data", lambda *_, **__: pytest.fail("decodes images")
    )
    embeddings = save_named_embeddings(tmp_path / "embeddings", {"a": [1.0]}, {"0.png": [1.0]})
    models = sources("clip"), str(embeddings)
    with pytest.raises(ValueError, match=r"embeddings has no embedding for 16 of 16 texts"):
        evaluate(**arguments(tmp_path / "out", data, *models, tasks=("retrieval",)))
    assert not (tmp_path / "out").exists()


def test_a_classification_has_the_class_names_and_templates_given(
    sources: Any, tmp_path: Path
) -> None:
    for name in ("cat", "dog"):
        save_tiny_images(tmp_path / "data" / name, 3)
    folder = EvaluatedDataset(name="image-folder", folder=str(tmp_path / "data"))
    chosen = arguments(
        tmp_path / "out", "", sources("clip"), data=folder, tasks=(), languages=(),
        templates=("a photo of a {}", "{}"), class_names=("Katze", "Hund"),
    )  # fmt: skip
    (result,) = evaluate(**chosen)
    assert result.counts == {"images": 6, "classes": 2, "texts": 4, "texts_truncated": 0}
    assert set(result.scores["top_1_of_class"]) == {"Katze", "Hund"}
    assert result.protocol["data"]["templates"] == ["a photo of a {}", "{}"]


@pytest.mark.usefixtures("_refuse_models")
def test_an_output_that_cannot_take_the_results_is_refused_first(
    sources: Any, data: str, tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(NotADirectoryError, match=r"taken is not a folder\. Choose another folder"):
        evaluate(**arguments(tmp_path / "taken", data, sources("clip")))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.json").write_text("[]")
    with pytest.raises(ValueError, match=r"notes\.json is not an evaluation result"):
        evaluate(**arguments(tmp_path, data, sources("clip")))


def test_rows_encoded_in_several_calls_are_those_of_their_inputs() -> None:
    known, embeds = KnownRows(), torch.randn(5, 3)
    for part in ([0, 1, 2], [3, 4]):
        assert known.list_new([*part, *part[:1]]) == part
        known.add(part, embeds[part[0] : part[-1] + 1])
    for rows in ((0, 1, 2), (3, 4), (4, 3), (1, 4, 1), (0, 1, 2, 3, 4)):
        assert torch.equal(known.take(rows), embeds[list(rows)])


def test_embeddings_that_are_not_finite_score_nothing(data: str, tmp_path: Path) -> None:
    # NaN is greater than nothing: a task that counts nearer candidates would call it right.
    folder = save_tiny_encoder("clip", tmp_path / "clip")
    model = CLIPModel.from_pretrained(folder)
    torch.nn.init.constant_(model.visual_projection.weight, torch.nan)
    model.save_pretrained(folder)
    chosen = arguments(tmp_path / "out", data, str(folder), tasks=("retrieval",))
    with pytest.raises(ValueError, match=r"^clip, retrieval on folder: .*NaN or infinity for 8"):
        evaluate(**chosen)
    assert not (tmp_path / "out" / "clip" / "folder.retrieval.json").exists()
