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


def test_details_name_the_values_of_all_languages(cross_lingual: Result) -> None:
    rows = read_table(render_results([cross_lingual], style="markdown", details=True), "the data")
    facts = {row["choice"]: row["value"] for row in rows}
    digests = [p["digest"][:8] for p in cross_lingual.protocol["data"]["languages"].values()]
    assert facts["languages"] == "de, en" and sorted(facts["digest"].split(", ")) == sorted(digests)


def test_scores_come_with_interval_and_chance_and_what_they_depend_on_is_optional(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "--table", "markdown", "--output", str(results)]) == 0
    plain = capsys.readouterr()
    titles = ("what the scores depend on", "the data", "how they were scored")
    assert not any(f"**{title}**" in plain.out.lower() for title in titles)
    assert f"llm2clip evaluate --table details --output {results}" in plain.err
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
    assert main(["evaluate", "--table", "text", "--output", str(results)]) == 0
    scored = capsys.readouterr().out.split("[low, high]")[0].rstrip()
    assert main(["evaluate", "--table", "details", "--output", str(results)]) == 0
    detailed = capsys.readouterr()
    # The scores come first, word for word.
    assert detailed.out.startswith(scored)
    assert all(f"\n{title}\n" in detailed.out[len(scored) :].lower() for title in titles)
    assert "--table details" not in detailed.err


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
    # Nor do two results of one model that differ; equal ones are one.
    assert render_results([clip, clip]) == render_results([clip])
    protocol = {**clip.protocol, "model": {**clip.protocol["model"], "dtype": "bfloat16"}}
    message = r"retrieval on folder, is of another run: .*dtype was 'float32' and"
    with pytest.raises(ValueError, match=message):
        render_results([clip, replace(clip, protocol=protocol)])


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
