"""What is side by side in a table, and what it says of the models, the data and the scoring."""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evaluating import arguments, read_table
from PIL import Image
from published_datasets import write_coco_test

from modeling_llm2clip.__main__ import main
from modeling_llm2clip.configs.evaluation_config import (
    EvaluationConfig,
)
from modeling_llm2clip.evaluation.evaluate import evaluate
from modeling_llm2clip.evaluation.report import plot_lengths, render_results
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
    assert render_results(found).count("siglip") >= 3


def test_the_table_of_lengths_shows_what_77_tokens_lose(results: Path) -> None:
    found = [result for result in read_evaluation_results(results) if result.task == "length"]
    rows = read_table(
        render_results(found, style="markdown"), "folder, R@1 by length in CLIP's tokens"
    )
    assert list(rows[0]) == ["tokens", "texts", "beyond 77", "clip", "siglip"]
    assert rows[0]["tokens"] == "1 to 20" and rows[0]["beyond 77"] == "0.0 %"


def test_details_have_every_value_once_with_all_that_share_it(results: Path) -> None:
    found = read_evaluation_results(results)
    found[-1] = replace(found[-1], versions={"modeling_llm2clip": "0.0.1"})
    table = render_results(found, style="markdown", details=True)
    titles = {
        "what the scores depend on": "models", "the data": "datasets",
        "how they were scored": "tasks",
    }  # fmt: skip
    facts = {
        (row["choice"], row[subjects]): row["value"]
        for title, subjects in titles.items()
        for row in read_table(table, title)
    }
    assert facts["text max tokens", "siglip"] == "64"
    assert facts["text prompt", "clip, siglip"] == "none"
    assert facts["text activation", "clip"] == "quick_gelu"
    assert facts["text activation", "siglip"] == "gelu_pytorch_tanh"
    assert facts["texts truncated, cra on folder", "clip, siglip"] == "0 of 16"
    assert facts["fingerprint", "clip"] != facts["fingerprint", "siglip"]
    assert facts["scored by version", "siglip"] == "0.0.1"
    data = found[0].protocol["data"]
    assert facts["digest", "folder"] == data["digest"][:8]
    for name in ("split", "images", "captions", "skipped_samples", "captions_of_several_images"):
        assert facts[name.replace("_", " "), "folder"] == str(data[name])
    assert "ties count against the model" in facts["ties", "cra, length, retrieval"]
    assert "queries: every caption; candidates: all images" in table  # a question, in its title


def test_details_name_the_values_of_all_languages(sources: Any, data: str, tmp_path: Path) -> None:
    chosen = arguments(tmp_path, data, sources("clip"), tasks=("cross-lingual",), languages=())
    results = evaluate(**chosen)
    rows = read_table(render_results(results, style="markdown", details=True), "the data")
    facts = {row["choice"]: row["value"] for row in rows}
    digests = [p["digest"][:8] for p in results[0].protocol["data"]["languages"].values()]
    assert facts["languages"] == "de, en" and sorted(facts["digest"].split(", ")) == sorted(digests)


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
    with pytest.raises(ValueError, match=r"of another model: .*Give each model a name of its own"):
        render_results([clip, replace(siglip, model="clip")])
    data = {**siglip.protocol["data"], "digest": "0" * 64}
    other = replace(siglip, protocol={**siglip.protocol, "data": data})
    message = r"siglip, retrieval on folder, is of another data .*: data\.digest was .* and is '0"
    with pytest.raises(ValueError, match=message):
        render_results([clip, other])
    task = {**siglip.protocol["task"], "ties": "ties count for the model"}
    other = replace(siglip, protocol={**siglip.protocol, "task": task})
    with pytest.raises(ValueError, match=r"in another way: task\.ties was 'ties count"):
        render_results([clip, other])
    # What is stored elsewhere is the same data.
    data = {**siglip.protocol["data"], "source": "hub:owner/name@commit"}
    moved = replace(siglip, protocol={**siglip.protocol, "data": data})
    assert render_results([clip, moved]) == render_results([clip, siglip])


def test_two_results_that_differ_where_they_must_not_make_no_table(results: Path) -> None:
    (found,) = (r for r in read_evaluation_results(results) if (r.model, r.task) == ("clip", "cra"))
    assert render_results([found, found]) == render_results([found])
    protocol = {**found.protocol, "model": {**found.protocol["model"], "dtype": "bfloat16"}}
    with pytest.raises(
        ValueError, match=r"cra on folder, is of another run: .*dtype was 'float32' and"
    ):
        render_results([found, replace(found, protocol=protocol)])


def test_a_part_of_a_published_dataset_is_labeled_as_such(sources: Any, tmp_path: Path) -> None:
    coco = f"coco={write_coco_test(tmp_path / 'coco')}"
    config = EvaluationConfig(output=tmp_path / "out", skip_invalid=True)
    found = evaluate(sources("clip"), coco, config)
    table = render_results(found, style="markdown", details=True)
    scored, _ = read_table(table, "images by caption, and captions by image")
    assert list(scored)[1] == "coco (3 of 5,000 images, files differ): text to image R@1"
    facts = {row["choice"]: row["value"] for row in read_table(table, "the data")}
    assert (facts["images"], facts["published images"]) == ("3", "5000")
    assert facts["checksums coco karpathy test.json"] == "differs"
    assert facts["split"] == "test (Karpathy)" and facts["skipped samples"] == "0"


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


def test_the_plot_has_a_line_per_model(results: Path, tmp_path: Path) -> None:
    found = [result for result in read_evaluation_results(results) if result.task == "length"]
    plot_lengths(found, tmp_path / "lengths.png")
    assert Image.open(tmp_path / "lengths.png").size[0] > 400
    with pytest.raises(ValueError, match=r"takes results of the task 'length'"):
        plot_lengths(read_evaluation_results(results), tmp_path / "other.png")
    other = replace(found[0], dataset="another")
    with pytest.raises(ValueError, match=r"different datasets: another, folder"):
        plot_lengths([found[1], other], tmp_path / "other.png")


def test_results_on_different_data_or_of_different_scoring_share_no_plot(
    results: Path, tmp_path: Path
) -> None:
    clip, siglip = (r for r in read_evaluation_results(results) if r.task == "length")
    task = {**siglip.protocol["task"], "ties": "ties count for the model"}
    other = replace(siglip, protocol={**siglip.protocol, "task": task})
    with pytest.raises(ValueError, match=r"in another way: .*ties was 'ties count"):
        plot_lengths([clip, other], tmp_path / "lengths.png")
    data = {**siglip.protocol["data"], "lang": "de"}
    other = replace(siglip, protocol={**siglip.protocol, "data": data})
    with pytest.raises(ValueError, match=r"of another data .*data\.lang was 'en' and is 'de'"):
        plot_lengths([clip, other], tmp_path / "lengths.png")
