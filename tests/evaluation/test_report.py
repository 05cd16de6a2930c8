"""What is side by side in a table, and what it says of the models, the data and the scoring."""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evaluating import arguments, read_table, write_data
from published_datasets import write_coco_test

from modeling_llm2clip.__main__ import main
from modeling_llm2clip.configs.evaluation_config import (
    EvaluationConfig,
)
from modeling_llm2clip.evaluation.evaluate import evaluate
from modeling_llm2clip.evaluation.report import render_results
from modeling_llm2clip.evaluation.results import (
    read_evaluation_results,
)


def test_languages_are_scored_together(sources: Any, data: str, tmp_path: Path) -> None:
    chosen = arguments(tmp_path, data, sources("clip"), tasks=("cross-lingual",), languages=())
    (result,) = evaluate(**chosen)
    assert set(result.scores["languages"]) == {"en", "de"}
    assert set(result.protocol["data"]["languages"]) == {"en", "de"}
    starts = [line.split(" ")[0] for line in render_results([result]).splitlines()]
    first = starts.index("language")
    assert starts[first + 2 : first + 5] == ["en", "de", "mean"]


def test_models_are_side_by_side_in_a_table(results: Path) -> None:
    found = read_evaluation_results(results)
    table = render_results(found, style="markdown", details=True)
    rows = read_table(table, "images by caption, and captions by image")
    assert [row["model"] for row in rows] == ["clip", "siglip", "chance"]
    score = {(r.model, r.task): r.scores for r in found}["clip", "retrieval"]
    for direction, title in (("t2i", "text to image"), ("i2t", "image to text")):
        interval = score[direction]["intervals"]["hit_rate_at_1"]
        shown = f"{100 * interval['value']:.1f} % [{100 * interval['low']:.1f}, "
        assert rows[0][f"folder: {title} R@1"].startswith(shown)
    of_models = read_table(table, "what the scores depend on")
    wanted = {"model": "siglip", "dataset": "folder", "tasks": "cra, length, retrieval",
              "model type": "siglip", "prompt": "none", "max tokens": "64"}  # fmt: skip
    assert wanted.items() <= of_models[1].items()
    assert render_results(found).count("siglip") >= 3


def test_the_table_of_lengths_shows_what_77_tokens_lose(results: Path) -> None:
    found = [result for result in read_evaluation_results(results) if result.task == "length"]
    rows = read_table(
        render_results(found, style="markdown"), "folder, R@1 by length in CLIP's tokens"
    )
    assert list(rows[0]) == ["tokens", "texts", "beyond 77", "clip", "siglip"]
    assert rows[0]["tokens"] == "1 to 20" and rows[0]["beyond 77"] == "0.0 %"


def test_the_table_has_activations_and_skipped_samples(
    sources: Any, data: str, tmp_path: Path
) -> None:
    chosen = arguments(tmp_path, data, sources("clip"), sources("siglip"), tasks=("retrieval",))
    results = evaluate(**chosen)
    wanted = {"clip": "quick_gelu", "siglip": "gelu_pytorch_tanh"}
    models = read_table(
        render_results(results, style="markdown", details=True), "what the scores depend on"
    )
    assert {row["model"]: row["activation"] for row in models} == wanted
    errors = {"blank caption": 2, "image missing": 1}  # of two images
    for result in results:
        result.protocol["data"] |= {"excluded": errors, "skipped_samples": 2}
    (row,) = read_table(render_results(results, style="markdown", details=True), "the data")
    assert row["skipped"] == "2"


def test_scores_come_with_interval_and_chance_and_what_they_depend_on_is_optional(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "--table", "markdown", "--output", str(results)]) == 0
    plain = capsys.readouterr()
    titles = ("what the scores depend on", "the data", "how they were scored")
    assert not any(f"**{title}**" in plain.out.lower() for title in titles)
    assert f"llm2clip evaluate --table text --details --output {results}" in plain.err
    rows = read_table(plain.out, "images by caption, and captions by image")
    scores = {r.model: r.scores for r in read_evaluation_results(results) if r.task == "retrieval"}
    for row in rows[:-1]:
        found = scores[row["model"]]["t2i"]["intervals"]["hit_rate_at_1"]
        wanted = "{value:.1f} % [{low:.1f}, {high:.1f}]".format(
            **{name: 100 * share for name, share in found.items()}
        )
        assert row["folder: text to image R@1"] == wanted
    assert rows[-1]["model"] == "chance"
    assert rows[-1]["folder: text to image R@1"] == "12.5 %"  # one of eight images
    assert "95% confidence interval" in plain.out
    assert main(["evaluate", "--table", "markdown", "--details", "--output", str(results)]) == 0
    detailed = capsys.readouterr()
    # The scores come first, word for word.
    scored = plain.out.split("[low, high]")[0].rstrip()
    assert detailed.out.startswith(scored)
    assert all(f"**{title}**" in detailed.out[len(scored) :].lower() for title in titles)
    assert "--details" not in detailed.err


def test_a_mean_over_languages_has_the_interval_of_its_images(
    sources: Any, data: str, tmp_path: Path
) -> None:
    chosen: dict[str, Any] = {"tasks": ("cross-lingual",), "languages": ("en",)}
    (one,) = evaluate(**arguments(tmp_path / "one", data, sources("clip"), **chosen))
    # One language is its own mean, with the same draws.
    of_mean, of_language = one.scores["mean"], one.scores["languages"]["en"]
    for direction in ("t2i", "i2t"):
        for name, interval in of_mean[direction]["intervals"].items():
            assert interval == pytest.approx(of_language[direction]["intervals"][name])
    chosen = {"tasks": ("cross-lingual",), "languages": ()}
    (both,) = evaluate(**arguments(tmp_path / "both", data, sources("clip"), **chosen))
    for direction in ("t2i", "i2t"):
        mean = both.scores["mean"][direction]
        interval = mean["intervals"]["hit_rate_at_5"]
        assert interval["value"] == pytest.approx(mean["hit_rate_at_5"])
        assert interval["low"] <= interval["value"] <= interval["high"]


def test_results_that_cannot_be_compared_share_no_table(results: Path) -> None:
    found = {(r.model, r.task): r for r in read_evaluation_results(results)}
    clip, siglip = found["clip", "retrieval"], found["siglip", "retrieval"]
    with pytest.raises(
        ValueError, match=r"Two models are named clip: .*Give each a name of its own"
    ):
        render_results([clip, replace(siglip, model="clip")])
    data = {**siglip.protocol["data"], "digest": "0" * 64}
    other = replace(siglip, protocol={**siglip.protocol, "data": data})
    message = (
        r"clip and siglip cannot be compared in retrieval on folder: data\.digest was .* and is '0"
    )
    with pytest.raises(ValueError, match=message):
        render_results([clip, other])
    task = {**siglip.protocol["task"], "ties": "ties count for the model"}
    other = replace(siglip, protocol={**siglip.protocol, "task": task})
    with pytest.raises(ValueError, match=r"cannot be compared .*task\.ties was 'ties count"):
        render_results([clip, other])
    # What is stored elsewhere is the same data.
    data = {**siglip.protocol["data"], "source": "hub:owner/name@commit"}
    moved = replace(siglip, protocol={**siglip.protocol, "data": data})
    assert render_results([clip, moved]) == render_results([clip, siglip])


def test_the_choices_of_the_scoring_are_listed_once(results: Path) -> None:
    lengths = [r for r in read_evaluation_results(results) if r.task == "length"]
    table = render_results(lengths, style="markdown", details=True)
    (ties,) = (row for row in read_table(table, "how they were scored") if row["choice"] == "ties")
    assert ties["tasks"] == "length" and "ties count against the model" in ties["taken"]
    (title,) = (line.strip("*") for line in table.splitlines() if "queries: every caption" in line)
    assert title.endswith("; queries: every caption; candidates: all images")


def test_scores_of_two_versions_of_the_package_are_marked(results: Path) -> None:
    first, second = (r for r in read_evaluation_results(results) if r.task == "cra")
    older = replace(second, versions={**second.versions, "modeling_llm2clip": "0.0.1"})
    title = "what the scores depend on"
    rows = read_table(render_results([first, older], style="markdown", details=True), title)
    assert [row["scored by version"] for row in rows] == [
        first.versions["modeling_llm2clip"], "0.0.1",
    ]  # fmt: skip
    alike = read_table(render_results([first, second], style="markdown", details=True), title)
    assert "scored by version" not in alike[0]


def test_two_results_that_differ_where_they_must_not_make_no_table(results: Path) -> None:
    (found,) = (r for r in read_evaluation_results(results) if (r.model, r.task) == ("clip", "cra"))
    assert render_results([found, found]) == render_results([found])
    protocol = {**found.protocol, "model": {**found.protocol["model"], "dtype": "bfloat16"}}
    with pytest.raises(ValueError, match=r"Two results of clip for cra .*dtype was 'float32' and"):
        render_results([found, replace(found, protocol=protocol)])


def test_a_part_of_a_published_dataset_is_labeled_as_such(sources: Any, tmp_path: Path) -> None:
    coco = f"coco={write_coco_test(tmp_path / 'coco')}"
    config = EvaluationConfig(output=tmp_path / "out", skip_invalid=True)
    found = evaluate(sources("clip"), coco, config)
    table = render_results(found, style="markdown", details=True)
    scored, _ = read_table(table, "images by caption, and captions by image")
    assert list(scored)[1] == "coco (3 of 5,000 images, files differ): text to image R@1"
    (row,) = read_table(table, "the data")
    assert row["samples"] == "3 of 5,000 images, 15 of 25,000 captions"
    assert row["files"] == "coco_karpathy_test.json: not as published"
    assert row["split"] == "test (Karpathy)" and row["skipped"] == "0"


def test_texts_of_several_images_are_counted_beside_the_samples(
    sources: Any, tmp_path: Path
) -> None:
    folder = write_data(tmp_path / "data")
    captions = folder / "captions.jsonl"
    captions.write_text(captions.read_text("utf-8").replace("again night", "again a dog"))
    config = EvaluationConfig(output=tmp_path / "out", languages=("en",))
    results = evaluate(sources("clip"), str(folder), config, tasks=["retrieval"])
    shared = results[0].protocol["data"]["captions_of_several_images"]
    (row,) = read_table(render_results(results, style="markdown", details=True), "the data")
    assert shared == 1 and row["samples"].endswith("; 1 text of several images")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_line_is_wider_than_the_terminal_and_nothing_is_left_out(
    results: Path, width: int
) -> None:
    found = read_evaluation_results(results)
    whole = render_results(found, details=True)
    fitted = render_results(found, width=width, details=True)
    assert max(map(len, whole.splitlines())) > 120
    assert max(map(len, fitted.splitlines())) <= width
    left_out = Counter(re.findall(r"\w", whole)) - Counter(re.findall(r"\w", fitted))
    assert not left_out  # the text before each block occurs more than once


def test_a_table_that_is_too_wide_has_a_column_a_model(results: Path) -> None:
    (found,) = (
        r for r in read_evaluation_results(results) if (r.model, r.task) == ("clip", "retrieval")
    )
    lines = render_results([found], width=60).splitlines()
    heads = next(number for number, line in enumerate(lines) if line.startswith("model "))
    assert lines[heads].split() == ["model", "clip", "chance"]
    row = lines[heads + 2]
    assert row.startswith("folder: text to image R@1 ")
    assert f" {100 * found.scores['t2i']['hit_rate_at_1']:.1f} % [" in row


def test_the_command_fits_its_tables_to_a_terminal_and_not_to_a_file(
    results: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    found = read_evaluation_results(results)
    for is_terminal, wanted in ((True, 70), (False, None)):
        monkeypatch.setattr(sys.stdout, "isatty", lambda is_terminal=is_terminal: is_terminal)
        assert main(["evaluate", "--table", "text", "--output", str(results)]) == 0
        assert render_results(found, width=wanted) in capsys.readouterr().out
