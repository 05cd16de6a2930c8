"""What is side by side in a table, and what it says of the models, the data and the scoring."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evaluating import arguments, read_table
from published_datasets import write_coco_test

from modeling_llm2clip.__main__ import main
from modeling_llm2clip.configs.evaluation_config import EvaluationConfig
from modeling_llm2clip.evaluation.evaluate import evaluate
from modeling_llm2clip.evaluation.report import render_results
from modeling_llm2clip.evaluation.results import Result, read_evaluation_results


@pytest.fixture(scope="module")
def cross_lingual(sources: Any, data: str, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The scores of CLIP in English and German."""
    chosen = {"tasks": ("cross-lingual",), "languages": ()}
    output = tmp_path_factory.mktemp("cross-lingual")
    (result,) = evaluate(**arguments(output, data, sources("clip"), **chosen))
    return result


def test_languages_are_scored_together(cross_lingual: Result) -> None:
    assert set(cross_lingual.scores["languages"]) == {"en", "de"}
    assert set(cross_lingual.protocol["data"]["languages"]) == {"en", "de"}
    starts = [line.split(" ")[0] for line in render_results([cross_lingual]).splitlines()]
    first = starts.index("language")
    assert starts[first + 2 : first + 5] == ["en", "de", "mean"]
    for direction in ("t2i", "i2t"):
        mean = cross_lingual.scores["mean"][direction]
        interval = mean["intervals"]["hit_rate_at_5"]
        assert interval["value"] == pytest.approx(mean["hit_rate_at_5"])
        assert interval["low"] <= interval["value"] <= interval["high"]


def test_the_table_of_lengths_shows_what_77_tokens_lose(results: Path) -> None:
    found = [result for result in read_evaluation_results(results) if result.task == "length"]
    rows = read_table(
        render_results(found, style="markdown"), "folder, R@1 by length in CLIP's tokens"
    )
    assert list(rows[0]) == ["tokens", "texts", "beyond 77", "clip", "siglip"]
    assert rows[0]["tokens"] == "1 to 20" and rows[0]["beyond 77"] == "0.0 %"


def test_scores_come_with_interval_and_chance(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "--table", "markdown", "--output", str(results)]) == 0
    plain = capsys.readouterr()
    assert f"The files in {results} record what the scores depend on." in plain.err
    rows = read_table(plain.out, "images by caption, and captions by image")
    scores = {r.model: r.scores for r in read_evaluation_results(results) if r.task == "retrieval"}
    assert [row["model"] for row in rows] == ["clip", "siglip", "chance"]
    for row in rows[:-1]:
        for direction, title in (("t2i", "text to image"), ("i2t", "image to text")):
            interval = scores[row["model"]][direction]["intervals"]["hit_rate_at_1"]
            percent = {name: 100 * share for name, share in interval.items()}
            expected = "{value:.1f} % [{low:.1f}, {high:.1f}]".format(**percent)
            assert row[f"folder: {title} R@1"] == expected
    assert rows[-1]["folder: text to image R@1"] == "12.5 %"  # one of eight images
    assert "95% confidence interval" in plain.out


def test_results_that_cannot_be_compared_share_no_table(results: Path) -> None:
    found = {(r.model, r.task): r for r in read_evaluation_results(results)}
    clip, siglip = found["clip", "retrieval"], found["siglip", "retrieval"]
    with pytest.raises(ValueError, match=r"from another model: .*Give each model a unique name"):
        render_results([clip, replace(siglip, model="clip")])
    data = {**siglip.protocol["data"], "digest": "0" * 64}
    other = replace(siglip, protocol={**siglip.protocol, "data": data})
    message = (
        r"siglip, retrieval on folder comes from another dataset .*: data\.digest was .* and is '0"
    )
    with pytest.raises(ValueError, match=message):
        render_results([clip, other])
    task = {**siglip.protocol["task"], "ties": "ties count for the model"}
    other = replace(siglip, protocol={**siglip.protocol, "task": task})
    with pytest.raises(ValueError, match=r"dataset or protocol: task\.ties was .ties count"):
        render_results([clip, other])
    # What is stored elsewhere is the same data.
    data = {**siglip.protocol["data"], "source": "hub:owner/name@commit"}
    moved = replace(siglip, protocol={**siglip.protocol, "data": data})
    assert render_results([clip, moved]) == render_results([clip, siglip])
    # Nor do two results of one model that differ; equal ones are one.
    assert render_results([clip, clip]) == render_results([clip])
    protocol = {**clip.protocol, "model": {**clip.protocol["model"], "dtype": "bfloat16"}}
    message = r"retrieval on folder comes from another run: .*dtype was 'float32' and"
    with pytest.raises(ValueError, match=message):
        render_results([clip, replace(clip, protocol=protocol)])


def test_a_part_of_a_published_dataset_is_labeled_as_such(sources: Any, tmp_path: Path) -> None:
    coco = f"coco={write_coco_test(tmp_path / 'coco')}"
    config = EvaluationConfig(output=tmp_path / "out", skip_invalid=True)
    found = evaluate(sources("clip"), coco, config)
    table = render_results(found, style="markdown")
    scored, _ = read_table(table, "images by caption, and captions by image")
    assert list(scored)[1] == "coco (3 of 5,000 images, files differ): text to image R@1"
