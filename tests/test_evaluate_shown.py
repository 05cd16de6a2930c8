"""What tables and plots show of a whole evaluation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evaluating import arguments, read_table
from PIL import Image

from modeling_llm2clip.evaluation.evaluate import evaluate
from modeling_llm2clip.evaluation.plots import plot_lengths
from modeling_llm2clip.evaluation.results import read_results
from modeling_llm2clip.evaluation.tables import render_results


def test_languages_are_scored_together(sources: Any, data: str, tmp_path: Path) -> None:
    chosen = arguments(tmp_path, data, sources("clip"), tasks=("cross-lingual",), languages=())
    (result,) = evaluate(chosen)
    assert set(result.scores["languages"]) == {"en", "de"}
    assert set(result.protocol["data"]["languages"]) == {"en", "de"}
    starts = [line.split(" ")[0] for line in render_results([result]).splitlines()]
    first = starts.index("language")
    assert starts[first + 2 : first + 5] == ["en", "de", "mean"]


def test_models_stand_side_by_side_in_a_table(results: Path) -> None:
    found = read_results(results)
    table = render_results(found, style="markdown")
    rows = [line for line in table.splitlines() if line.startswith("| clip |")]
    score = {(r.model, r.task): r.scores for r in found}["clip", "retrieval"]
    cells = [f"{100 * score[d]['hit_rate_at_1']:.1f} %" for d in ("text_to_image", "image_to_text")]
    assert f"| clip | {' | '.join(cells)} |" in rows
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
        evaluate(arguments(tmp_path, data, sources(kind), languages=(lang,), tasks=("length",)))
    found = read_results(tmp_path)
    rows = [line.split("|")[1:-1] for line in render_results(found, style="markdown").splitlines()]
    heads, _, clip, siglip = (list(map(str.strip, row)) for row in rows[2:6])
    assert [head.split(":")[0] for head in heads[1:]] == [
        "folder (en, 8 pictures)" if column < 3 else "folder (de, 8 pictures)"
        for column in range(6)
    ]
    assert clip[4:] == siglip[1:4] == ["–"] * 3 and "–" not in clip[:4] + siglip[4:]
    with pytest.raises(ValueError, match=r"\['clip'\] and \['siglip'\] were shown other languages"):
        plot_lengths(found, tmp_path / "lengths.png")


def test_means_over_different_languages_share_no_column(
    sources: Any, data: str, tmp_path: Path
) -> None:
    for kind, languages in (("clip", ()), ("siglip", ("de",))):
        chosen = {"tasks": ("cross-lingual",), "languages": languages}
        evaluate(arguments(tmp_path, data, sources(kind), **chosen))
    table = render_results(read_results(tmp_path), style="markdown")
    for name in ("folder (de+en, 8 pictures)", "folder (de, 8 pictures)"):
        assert f"{name}, text to picture R@1 by language" in table.replace("Folder", "folder")


def test_the_table_tells_activations_and_excluded_samples(
    sources: Any, data: str, tmp_path: Path
) -> None:
    chosen = arguments(tmp_path, data, sources("clip"), sources("siglip"), tasks=("retrieval",))
    results = evaluate(chosen)
    wanted = {"clip": "quick_gelu", "siglip": "gelu_pytorch_tanh"}
    models = read_table(render_results(results, style="markdown"), "what the scores hang on")
    assert {row["model"]: row["activation"] for row in models} == wanted
    faults = {"blank caption": 2, "picture missing": 1}  # of two pictures
    for result in results:
        result.protocol["data"] |= {"excluded": faults, "excluded_samples": 2}
    (row,) = read_table(render_results(results, style="markdown"), "the data")
    assert row["excluded"] == "2"
