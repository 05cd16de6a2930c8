"""What stands side by side in a table, and what it says of the models, the data and the scoring."""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evaluating import arguments, change, read_table
from published_datasets import write_coco_test

from modeling_llm2clip.__main__ import main
from modeling_llm2clip.configs.evaluation_config import EvaluatedModel, EvaluationConfig
from modeling_llm2clip.evaluation.evaluate import evaluate
from modeling_llm2clip.evaluation.plots import plot_lengths
from modeling_llm2clip.evaluation.results import read_results
from modeling_llm2clip.evaluation.tables import render_results


def test_two_models_of_one_name_are_two_rows(results: Path) -> None:
    found = {(r.model, r.task): replace(r, model="model") for r in read_results(results)}
    mixed = [found["clip", "retrieval"], found["siglip", "retrieval"], found["clip", "cra"]]
    table = render_results(mixed, style="markdown", details=True)
    rows = read_table(table, "what the scores hang on")
    fingerprint = {row["kind"]: row["fingerprint"] for row in rows}
    scored = read_table(table, "images by caption, and captions by image")
    assert [row["model"] for row in scored] == [
        *(f"model ({fingerprint[kind]})" for kind in ("clip", "siglip")),
        "chance",
    ]
    assert len(set(fingerprint.values())) == 2 and len(fingerprint["clip"]) == 8


def test_scores_of_two_versions_of_the_package_are_told_apart(results: Path) -> None:
    first, second = (r for r in read_results(results) if r.task == "cra")
    older = replace(second, versions={**second.versions, "modeling_llm2clip": "0.0.1"})
    title = "what the scores hang on"
    rows = read_table(render_results([first, older], style="markdown", details=True), title)
    assert [row["scored by version"] for row in rows] == [
        first.versions["modeling_llm2clip"], "0.0.1",
    ]  # fmt: skip
    alike = read_table(render_results([first, second], style="markdown", details=True), title)
    assert "scored by version" not in alike[0]


def test_two_scores_that_nothing_tells_apart_make_no_table(results: Path) -> None:
    (found,) = (r for r in read_results(results) if (r.model, r.task) == ("clip", "cra"))
    assert render_results([found, found]) == render_results([found])
    protocol = {**found.protocol, "model": {**found.protocol["model"], "dtype": "bfloat16"}}
    with pytest.raises(ValueError, match=r"Two results of clip for cra .*dtype was 'float32' and"):
        render_results([found, replace(found, protocol=protocol)])


def test_another_rule_for_ties_shares_no_column_and_no_plot(results: Path, tmp_path: Path) -> None:
    clip, siglip = (r for r in read_results(results) if r.task == "length")
    table = render_results([clip, siglip], style="markdown", details=True)
    (ties,) = (row for row in read_table(table, "how they were scored") if row["choice"] == "ties")
    assert ties["tasks"] == "length" and "ties count against the model" in ties["taken"]
    task = {**siglip.protocol["task"], "ties": "ties count for the model"}
    other = replace(siglip, protocol={**siglip.protocol, "task": task})
    table = render_results([clip, other], style="markdown", details=True)
    (title,) = (line.strip("*") for line in table.splitlines() if "queries: every caption" in line)
    first, second, _ = read_table(table, title)
    heads = [head for head in first if head.endswith(": R@1")]
    assert all(re.fullmatch(r"folder \(ties [0-9a-f]{8}\): R@1", head) for head in heads)
    assert [first[head] == "–" for head in heads] == [False, True]
    assert [second[head] == "–" for head in heads] == [True, False]
    with pytest.raises(
        ValueError, match=r"clip and siglip were scored in .*ties was 'ties count a"
    ):
        plot_lengths([clip, other], tmp_path / "lengths.png")


def test_captions_that_look_for_images_and_for_halves_are_two_tables(
    sources: Any, data: str, tmp_path: Path
) -> None:
    chosen = arguments(tmp_path, data, sources("clip"), tasks=("length",))
    for name, captions_only in (("shown", False), ("alone", True)):
        model = EvaluatedModel(source=sources("clip"), name=name)
        evaluate(**change(chosen, models=model, captions_only=captions_only))
    table = render_results(read_results(tmp_path), style="markdown", details=True)
    titles = [line.strip("*") for line in table.splitlines() if "; queries: " in line]
    assert [title.split("; ")[1:] for title in titles] == [
        [
            "queries: first half of every caption that can be cut",
            "candidates: second halves of the same captions",
        ],
        ["queries: every caption", "candidates: all images"],
    ]
    for title, name in zip(titles, ("alone", "shown"), strict=True):
        row, _ = read_table(table, title)
        assert row["model"] == name and "folder: R@1" in row
    samples = [row["samples"] for row in read_table(table, "the data")]
    assert samples == [
        "8 images, 16 captions; captions alone were read",
        "8 images, 16 captions",
    ]
    with pytest.raises(ValueError, match=r"\['alone'\] and \['shown'\] were shown other"):
        plot_lengths(read_results(tmp_path), tmp_path / "lengths.png")


def test_a_part_of_a_published_set_is_not_called_by_its_name_alone(
    sources: Any, tmp_path: Path
) -> None:
    coco = f"coco={write_coco_test(tmp_path / 'coco')}"
    config = EvaluationConfig(output=tmp_path / "out", skip_invalid=True)
    found = evaluate(sources("clip"), coco, config)
    table = render_results(found, style="markdown", details=True)
    scored, _ = read_table(table, "images by caption, and captions by image")
    assert list(scored)[1] == "coco (3 of 5,000 images, files differ): text to image R@1"
    (row,) = read_table(table, "the data")
    assert row["samples"] == "3 of 5,000 images, 15 of 25,000 captions"
    assert row["files"] == "coco_karpathy_test.json: not as published"
    assert row["split"] == "test (Karpathy)" and row["excluded"] == "0"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_line_is_wider_than_the_terminal_and_nothing_is_left_out(
    results: Path, width: int
) -> None:
    found = read_results(results)
    whole = render_results(found, details=True)
    fitted = render_results(found, width=width, details=True)
    assert max(map(len, whole.splitlines())) > 120
    assert max(map(len, fitted.splitlines())) <= width
    left_out = Counter(re.findall(r"\w", whole)) - Counter(re.findall(r"\w", fitted))
    assert not left_out  # what stands before each block is there more than once


def test_a_table_that_is_too_wide_has_a_column_a_model(results: Path) -> None:
    (found,) = (r for r in read_results(results) if (r.model, r.task) == ("clip", "retrieval"))
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
    found = read_results(results)
    for is_terminal, wanted in ((True, 70), (False, None)):
        monkeypatch.setattr(sys.stdout, "isatty", lambda is_terminal=is_terminal: is_terminal)
        assert main(["evaluate", "--table", "text", "--output", str(results)]) == 0
        assert render_results(found, width=wanted) in capsys.readouterr().out
