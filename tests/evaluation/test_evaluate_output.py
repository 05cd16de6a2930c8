"""What tables and plots show of a whole evaluation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evaluating import arguments, read_table
from PIL import Image

from modeling_llm2clip.__main__ import main
from modeling_llm2clip.evaluation.evaluate import evaluate
from modeling_llm2clip.evaluation.plots import plot_lengths
from modeling_llm2clip.evaluation.results import read_results
from modeling_llm2clip.evaluation.tables import render_results


def test_languages_are_scored_together(sources: Any, data: str, tmp_path: Path) -> None:
    chosen = arguments(tmp_path, data, sources("clip"), tasks=("cross-lingual",), languages=())
    (result,) = evaluate(**chosen)
    assert set(result.scores["languages"]) == {"en", "de"}
    assert set(result.protocol["data"]["languages"]) == {"en", "de"}
    starts = [line.split(" ")[0] for line in render_results([result]).splitlines()]
    first = starts.index("language")
    assert starts[first + 2 : first + 5] == ["en", "de", "mean"]


def test_models_stand_side_by_side_in_a_table(results: Path) -> None:
    found = read_results(results)
    table = render_results(found, style="markdown", details=True)
    rows = [line for line in table.splitlines() if line.startswith("| clip |")]
    score = {(r.model, r.task): r.scores for r in found}["clip", "retrieval"]
    for direction in ("t2i", "i2t"):
        interval = score[direction]["intervals"]["hit_rate_at_1"]
        shown = f"{100 * interval['value']:.1f} % [{100 * interval['low']:.1f}, "
        assert any(shown in row for row in rows)
    assert "| siglip | folder | cra, length, retrieval | siglip | none | 64 |" in table
    assert render_results(found).count("siglip") >= 3


def test_the_table_of_lengths_shows_what_77_tokens_lose(results: Path) -> None:
    found = [result for result in read_results(results) if result.task == "length"]
    assert "tokens   texts  beyond 77" in render_results(found)


def test_the_plot_has_a_line_a_model(results: Path, tmp_path: Path) -> None:
    found = [result for result in read_results(results) if result.task == "length"]
    plot_lengths(found, tmp_path / "lengths.png")
    assert Image.open(tmp_path / "lengths.png").size[0] > 400
    with pytest.raises(ValueError, match=r"takes results of the task 'length'"):
        plot_lengths(read_results(results), tmp_path / "other.png")
    other = replace(found[0], set="another")
    with pytest.raises(ValueError, match=r"different sets, \['another', 'folder'\]"):
        plot_lengths([found[1], other], tmp_path / "other.png")


def test_scores_on_different_data_of_one_set_share_no_column_and_no_plot(
    sources: Any, data: str, tmp_path: Path
) -> None:
    for kind, lang in (("clip", "en"), ("siglip", "de")):
        evaluate(**arguments(tmp_path, data, sources(kind), languages=(lang,), tasks=("length",)))
    found = read_results(tmp_path)
    rows = [
        line.split("|")[1:-1]
        for line in render_results(found, style="markdown", details=True).splitlines()
    ]
    heads, _, clip, siglip = (list(map(str.strip, row)) for row in rows[2:6])
    assert [head.split(":")[0] for head in heads[1:]] == [
        "folder (en, 8 images)" if column < 3 else "folder (de, 8 images)" for column in range(6)
    ]
    assert clip[4:] == siglip[1:4] == ["–"] * 3 and "–" not in clip[:4] + siglip[4:]
    with pytest.raises(ValueError, match=r"\['clip'\] and \['siglip'\] were shown other languages"):
        plot_lengths(found, tmp_path / "lengths.png")


def test_means_over_different_languages_share_no_column(
    sources: Any, data: str, tmp_path: Path
) -> None:
    for kind, languages in (("clip", ()), ("siglip", ("de",))):
        chosen = {"tasks": ("cross-lingual",), "languages": languages}
        evaluate(**arguments(tmp_path, data, sources(kind), **chosen))
    table = render_results(read_results(tmp_path), style="markdown", details=True)
    for name in ("folder (de+en, 8 images)", "folder (de, 8 images)"):
        assert f"{name}, text to image R@1 by language" in table.replace("Folder", "folder")


def test_the_table_tells_activations_and_excluded_samples(
    sources: Any, data: str, tmp_path: Path
) -> None:
    chosen = arguments(tmp_path, data, sources("clip"), sources("siglip"), tasks=("retrieval",))
    results = evaluate(**chosen)
    wanted = {"clip": "quick_gelu", "siglip": "gelu_pytorch_tanh"}
    models = read_table(
        render_results(results, style="markdown", details=True), "what the scores hang on"
    )
    assert {row["model"]: row["activation"] for row in models} == wanted
    errors = {"blank caption": 2, "image missing": 1}  # of two images
    for result in results:
        result.protocol["data"] |= {"excluded": errors, "skipped_samples": 2}
    (row,) = read_table(render_results(results, style="markdown", details=True), "the data")
    assert row["excluded"] == "2"


def test_scores_stand_with_interval_and_chance_and_what_they_hang_on_is_asked_for(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "--table", "markdown", "--output", str(results)]) == 0
    plain = capsys.readouterr()
    titles = ("what the scores hang on", "the data", "how they were scored")
    assert not any(f"**{title}**" in plain.out.lower() for title in titles)
    assert f"llm2clip evaluate --table text --details --output {results}" in plain.err
    rows = read_table(plain.out, "images by caption, and captions by image")
    scores = {r.model: r.scores for r in read_results(results) if r.task == "retrieval"}
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
