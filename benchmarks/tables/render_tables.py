"""Writes the tables of the documents from the records of the benchmarks.

Run `python -m benchmarks.tables.render_tables` after a file in `benchmarks/results` has changed.
Text between `<!-- table: NAME -->` and `<!-- end -->` is replaced; nothing else is touched. The
sections of every model card come from the template that the package fills.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.tables.effect_tables import EFFECT_TABLES
from benchmarks.tables.gpu_tables import GPU_TABLES
from benchmarks.tables.markdown_tables import draw_table, list_versions, percent
from benchmarks.tables.product_tables import PRODUCT_TABLES
from benchmarks.tables.training_tables import TRAINING_TABLES

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (
    *sorted((ROOT / "docs" / "benchmarks").glob("*.md")),
    ROOT / "README.md",
    ROOT / "MODEL_CARD.md",
    RESULTS / "README.md",
    ROOT / "docs" / "build.md",
    ROOT / "docs" / "choose-a-model.md",
    ROOT / "docs" / "reproduce-the-paper.md",
    ROOT / "examples" / "data" / "caption_lora" / "README.md",
)
CARD_TEMPLATE = ROOT / "modeling_llm2clip" / "model_folders" / "model_card_template.md"
NOT_RECORDED = "not yet recorded"
# A record keeps the words of its time and details of its machine; tables use the documents' words.
_RECORDED_WORDS: dict[str, str | Callable[[re.Match[str]], str]] = {
    r"\bpictures\b": "images",
    r" \(avx[\w, ]*\)|, x86_64\b|\bx86_64, ": "",
    r"\b1 threads\b": "1 thread",
    r"\['([\w-]+)'(?:, '([\w-]+)')?\]": lambda names: " and ".join(filter(None, names.groups())),
}
_WEAKER_BASELINE = "ordinary CLIP, 100 steps"  # no better than the one of 300 steps, which is shown
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
_SCORES = (
    "unseen_t2i_r1",
    "unseen_t2i_r10",
    "unseen_i2t_r1",
    "chance_r1",
)


def render_document(text: str, results: Path) -> str:
    """Return the document with every table written anew.

    Args:
        results: folder with one `NAME.json` per table; a missing file gives "not yet recorded".
    Raises: ValueError for a table that has no renderer, or has no end.
    """
    if text.count("<!-- table:") != len(_TABLE.findall(text)):
        raise ValueError("A table has no '<!-- end -->', or its name is not one word.")
    return _TABLE.sub(lambda match: match[1] + _render(match[2], results) + match[4], text)


def _render(name: str, results: Path) -> str:
    if name == "model_card_sections":
        return _read_card_sections()
    if name not in _RENDERERS:
        raise ValueError(f"No table is called {name!r}; known are {sorted(_RENDERERS)}.")
    file = results / f"{name}.json"
    if not file.is_file():
        return f"\n{NOT_RECORDED}\n\n"
    table = _RENDERERS[name](json.loads(file.read_text(encoding="utf-8")))
    for recorded, word in _RECORDED_WORDS.items():
        table = re.sub(recorded, word, table)
    return f"\n{table}\n"


def _read_card_sections() -> str:
    """Read the sections that every model card has, so that they are written once."""
    text = CARD_TEMPLATE.read_text(encoding="utf-8")
    start, end = text.index("## Intended use"), text.index("## Training data")
    return f"\n{text[start:end]}"


def _render_demo(reports: Sequence[dict[str, Any]]) -> str:
    heads = (
        "seed", "text to image R@1", "R@10", "image to text R@1", "chance", "seconds",
        "peak memory, GB",
    )  # fmt: skip
    rows = [[str(report["seed"]), *_demo_cells([report])] for report in reports]
    if len(reports) > 1:
        rows.append(["mean", *_demo_cells(reports)])
    counts = (
        f"Seed {reports[0]['seed']}: {reports[0]['num_images']:,} images to train on, "
        f"{reports[0]['num_held_out']} held out. {reports[0].get('hardware', 'unknown hardware')}. "
        f"{list_versions(reports[0]['versions'], 'torch', 'transformers')}."
    )
    return f"{draw_table(heads, rows)}\n{counts}\n"


def _demo_cells(reports: Sequence[dict[str, Any]]) -> list[str]:
    def mean(name: str, form: str, *, factor: float = 1) -> str:
        values = [factor * report[name] for report in reports if name in report]
        return format(fmean(values), form) if values else "–"

    scores = [f"{mean(name, '.1f', factor=100)} %" for name in _SCORES]
    return [*scores, mean("seconds_after_download", ".0f"), mean("peak_rss_gb", ".1f")]


def _render_encoding_speed(report: dict[str, Any]) -> str:
    heads = ("method", "captions per second", "of fp32 peak", "peak memory, GB", "smallest cosine")
    rows = [
        [
            row["name"],
            f"{row['captions_per_second']:.1f}",
            f"{row['share_of_peak']:.0%}",
            f"{row['peak_rss_gb']:.2f}",
            f"{row['min_cosine']:.4f}" if "min_cosine" in row else "",
        ]
        for row in report["rows"]
        if row["name"] != "ours, everything on"  # compiled, and nothing else
    ]
    notes = [
        f"{label}{report[name]}."
        for name, label in (
            ("captions", "Captions: "),
            ("hardware", "Machine: "),
            ("min_cosine_against", "The cosine compares with the embeddings of: "),
        )
        if name in report
    ]
    return draw_table(heads, rows) + (f"\n{' '.join(notes)}\n" if notes else "")


def _render_retrieval_ranking(report: dict[str, Any]) -> str:
    heads = (
        "embeddings", "images × texts", "products, s", "ranks of both directions, s", "ratio",
    )  # fmt: skip
    cases = {
        "large": "related",
        "all_positives": "related, ranks of all positives",
        "all_positives_small": "related, ranks of all positives",
        "unrelated": "unrelated",
    }
    cases = {case: label for case, label in cases.items() if case in report}
    rows = [
        [
            label,
            f"{report[case]['images']:,} × {report[case]['texts']:,}",
            f"{median(report[case]['bare_products_s']):.1f}",
            f"{median(report[case]['ranks_s']):.1f}",
            f"{report[case]['median_ratio']:.2f}",
        ]
        for case, label in cases.items()
    ]
    note = (
        f"Width {report['width']:,}; {report['repeats']} pairs of runs, medians; "
        f"{_highest_resident_mb(report) / 1000:.1f} GB resident in total. "
        f"{report['hardware']}."
    )
    return draw_table(heads, rows) + f"\n{note}\n"


def _highest_resident_mb(report: dict[str, Any]) -> float:
    cases = [case for case in report.values() if isinstance(case, dict)]
    return max(case["highest_resident_mb"] for case in cases if "highest_resident_mb" in case)


def _render_evaluation(report: dict[str, Any]) -> str:
    left_out = [*report.get("tiny", {"models": []})["models"], _WEAKER_BASELINE]
    results = [result for result in report["results"] if result["model"] not in left_out]
    emoji = [result for result in results if result["task"] == "cross-lingual"]
    models = [result["model"] for result in emoji]
    languages = [result["scores"]["languages"] for result in emoji]
    path = ("t2i", "hit_rate_at_1")
    rows = [
        [lang, *(percent(_follow(scores[lang], path)) for scores in languages)]
        for lang in languages[0]
    ]
    means = [percent(_follow(result["scores"]["mean"], path)) for result in emoji]
    table = draw_table(("language", *models), [*rows, ["mean", *means]])
    images = next(iter(emoji[0]["counts"]["languages"].values()))["images"]
    chances = (scores["t2i"]["chance_hit_rate_at_1"] for scores in languages[0].values())
    chance = " or ".join(dict.fromkeys(map(percent, chances)))
    note = (
        f"Text to image R@1 among {images} emoji unseen in training, which was in English; "
        f"chance {chance}."
    )
    others = _draw_lengths(report, results) + _draw_cra(results)
    return f"{table}\n{note} {report['hardware']}.\n{others}"


def _draw_lengths(report: dict[str, Any], results: Sequence[dict[str, Any]]) -> str:
    results = [result for result in results if result["task"].startswith("length")]
    if not results:
        return ""
    rows = [
        [
            f"{bucket['from_clip_tokens']} to {bucket['to_clip_tokens'] or '…'}",
            str(bucket["queries"]),
            *(
                percent(result["scores"]["buckets"][number]["hit_rate_at_1"]["value"])
                for result in results
            ),
        ]
        for number, bucket in enumerate(results[0]["scores"]["buckets"])
    ]
    heads = ("tokens", "texts", *(result["model"] for result in results))
    note = (
        f"First half of a long caption finds its second half, R@1 ({report['long_captions']}); "
        f"no image is used; chance {percent(results[0]['scores']['chance'])}. "
        "Lengths are in CLIP's tokens."
    )
    return f"\n{draw_table(heads, rows)}\n{note}\n"


def _draw_cra(results: Sequence[dict[str, Any]]) -> str:
    results = [result for result in results if result["task"] == "cra"]
    if not results:
        return ""
    rows = [
        [result["model"], percent(result["scores"]["cra"]["value"]),
         f"{result['counts']['texts_truncated']} of {result['counts']['texts']}"]
        for result in results
    ]  # fmt: skip
    images = results[0]["counts"]["images"]
    note = (
        f"A long caption finds the other one of its image among {images} "
        f"({results[0]['dataset']}); no image is used; chance "
        f"{percent(results[0]['scores']['chance'])}."
    )
    return f"\n{draw_table(('text encoder', 'CRA', 'texts truncated'), rows)}\n{note}\n"


def _follow(scores: Any, path: Sequence[str]) -> float:
    for name in path:
        scores = scores[name]
    return float(scores)


def _render_mllm_captioning(report: dict[str, Any]) -> str:
    seeds = [str(run["seed"]) for run in next(iter(report["runs"].values()))]
    heads = ("tower", "after", *(f"seed {seed}" for seed in seeds), "mean", "other image")
    names = {"before": "original", "after": "aligned"}
    rows = []
    for step in ("projector", "instructions"):
        for tower, runs in report["runs"].items():
            losses = [run[step]["caption_loss"] for run in runs]
            others = [run[step]["caption_loss_other_image"] for run in runs]
            cells = [f"{loss:.3f}" for loss in (*losses, fmean(losses), fmean(others))]
            rows.append([names[tower], f"step {1 + (step == 'instructions')}", *cells])
    steps, instruction_steps = report["recipe"]["steps"]
    note = (
        f"Nats per token of held-out names. {report['data']}; {steps} and {instruction_steps} "
        f"steps of {report['recipe']['batch_size']}, {report['recipe']['pixels']} pixels. "
        f"Alignment: {report['alignment']['steps']} steps of {report['alignment']['batch_size']}, "
        f"held-out text to image R@1 {percent(report['alignment']['unseen_t2i_r1'])}, chance "
        f"{percent(report['alignment']['chance_r1'])}. {report['hardware']}."
    )
    return f"{draw_table(heads, rows)}\n{note}\n"


def _render_conversion(report: dict[str, Any]) -> str:
    heads = ("source, GB", "written, GB", "seconds", "peak memory, GB", "times the source")
    row = [
        f"{report['source_gb']:.2f}",
        f"{report['written_gb']:.2f}",
        f"{report['seconds']:.0f}",
        f"{report['peak_rss_gb']:.2f}",
        f"{report['times_the_source']:.2f} (bound {report['bound']})",
    ]
    return draw_table(heads, [row]) + f"\n{report['hardware']}.\n"


def _render_llm2vec_parity(report: dict[str, Any]) -> str:
    names = {"plain": "alone", "instructed": "with an instruction"}
    rows = [
        [
            label,
            str(report[key]["same_ids"]),
            str(report[key]["same_spans"]),
            f"{report[key]['smallest_cosine']:.7f}",
            f"{report[key]['smallest_cosine_given_their_span']:.7f}",
        ]
        for key, label in names.items()
    ]
    heads = (
        "captions", "same ids", "same span", "smallest cosine of these",
        "smallest cosine of the others, with LLM2Vec's span",
    )  # fmt: skip
    versions = list_versions(report["versions"])
    return draw_table(heads, rows) + f"\nCaptions: {report['captions']}. {versions}.\n"


def _render_datasets_read(rows: Sequence[dict[str, Any]]) -> str:
    heads = ("files", "dataset", "languages", "samples read in all languages", "checksums")
    return draw_table(
        heads,
        [
            [
                row["title"],
                f"`{row['dataset']}`",
                str(row["languages"]),
                ", ".join(
                    f"{number:,} {what}"
                    for what, number in row["summed_over_languages"].items()
                    if number and what != "captions_of_several_images"
                ),
                " and ".join(sorted(set(row["checksums"].values()))) or "none known",
            ]
            for row in rows
            if row["dataset"] != "folder"
        ],
    )


def _render_vision_towers(report: dict[str, Any]) -> str:
    heads = ["vision towers", "text encoder in the same model", "`--vision-pooling`", "result"]
    alike: dict[tuple[str, ...], list[str]] = {}  # names by the other columns
    for row in report["rows"]:
        result = row.get("error") or ", ".join(row["failed_checks"]) or "ok"
        columns = ("yes" if row["text_encoder"] else "–", row["pooling"], result)
        alike.setdefault(columns, []).append(row["name"])
    rows = [[", ".join(names), *columns] for columns, names in alike.items()]
    if all(row[-1] == "ok" for row in rows):
        heads, rows = heads[:-1], [row[:-1] for row in rows]
    largest = max((row.get("largest_difference", 0.0) for row in report["rows"]), default=0.0)
    versions = list_versions(report["versions"])
    note = (
        "Tiny random towers, each built, trained for a step with `--vision-training full`, saved, "
        "loaded and checked with `llm2clip doctor`. "
        f"{'All passed. ' if len(heads) == 3 else ''}Embeddings by AutoModel and "
        f"sentence-transformers differ by at most {largest:.0e}. {versions}."
    )
    return f"{draw_table(heads, rows)}\n{note}\n"


def _render_code_size(report: dict[str, Any]) -> str:
    walks = {
        "caption": "`extract` to the stored row", "image": "`index` to the row of the table",
        "request": "a request to its answer", "pair": "`align` to the optimizer step",
    }  # fmt: skip
    measures: dict[str, Callable[[dict[str, Any]], str]] = {
        "lines of code proper": lambda entry: f"{entry['code_lines']:,}",
        "files": lambda entry: str(entry["files"]),
        **{
            f"functions / files from {way}": partial(_show_walk, name=name)
            for name, way in walks.items()
        },
        "import circles": lambda entry: str(len(entry["folder_circles"])),
        "lines of the tests": lambda entry: f"{entry['test_lines']:,}",
        "tests, except slow and GPU tests": lambda entry: f"{entry['num_tests']:,}",
        "seconds to run the tests, two processes": lambda entry: _or_dash(entry["test_seconds"]),
        "seconds of `import modeling_llm2clip`": lambda entry: f"{entry['import_seconds']:.3f}",
        "seconds of `llm2clip --help`": lambda entry: f"{entry['help_seconds']:.2f}",
    }
    labels = [label for label in ("before", "after") if label in report]
    heads = ("", *(f"{label} ({report[label]['commit']})" for label in labels))
    rows = [[name, *(show(report[label]) for label in labels)] for name, show in measures.items()]
    hardware = " and ".join(dict.fromkeys(report[label]["hardware"] for label in labels))
    return draw_table(heads, rows) + f"\n{hardware}.\n"


def _show_walk(entry: dict[str, Any], name: str) -> str:
    walk = entry["walks"][name]
    shown = f"{walk['functions']} / {walk['files']}"
    if "moves" in walk:  # earlier records lack them
        shown += f", {walk['moves']} moves, {walk['re_entries']} re-entries"
    return shown


def _or_dash(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds:.0f}"


_RENDERERS: dict[str, Callable[[Any], str]] = {
    **GPU_TABLES,
    **PRODUCT_TABLES,
    **EFFECT_TABLES,
    **TRAINING_TABLES,
    "demo": _render_demo,
    "encoding_speed": _render_encoding_speed,
    "retrieval_ranking": _render_retrieval_ranking,
    "evaluation": _render_evaluation,
    "mllm_captioning": _render_mllm_captioning,
    "conversion": _render_conversion,
    "llm2vec_parity": _render_llm2vec_parity,
    "datasets_read": _render_datasets_read,
    "code_size": _render_code_size,
    "vision_towers": _render_vision_towers,
}


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(render_document(document.read_text(encoding="utf-8"), RESULTS), "utf-8")
        print(f"Wrote the tables of {document.relative_to(ROOT)}.")
