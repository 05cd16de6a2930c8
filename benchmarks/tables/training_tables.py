"""Tables of trainings: fine-tuning, alignment, the first run, sizes of the data, and their cost."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean
from typing import Any

from benchmarks.tables.markdown_tables import (
    draw_table,
    find_standard_error,
    percent,
    percent_with_error,
    show_range,
)
from modeling_llm2clip._suggestions import counted

_RECIPE, _CLOSED_FORM, _SMALL = "README's recipe", "closed form alone", ", embedded-small"
_IN_BFLOAT16 = ", texts in bfloat16"


def _render_finetuning(report: dict[str, Any]) -> str:
    names = {
        "causal": "SmolLM2-135M, causal, mean pooled",
        "bidirectional": "the same, made bidirectional",
        "before": "the same, after the first round",
        "tuned": "the same, fine-tuned on captions",
        "minilm": "all-MiniLM-L6-v2",
    }
    cra, training = dict(report["cra"]), ""
    if report.get("start") is None:
        cra.pop("before", None)  # it is the untuned one once more
    else:
        names["tuned"], training = "the same, after the second round", "second round: "
    rows = [[names[key], percent(value)] for key, value in cra.items()]
    trained = report.get("cra_on_trained_images")
    if trained is not None:
        rows.append(["the last fine-tuned one, on as many training images", percent(trained)])
    config = report["config"]
    note = (
        f"{report['data']}; {training}{config['max_steps']} steps of "
        f"{config['per_device_train_batch_size']} pairs in {report['seconds'] / 60:.0f} minutes"
        f"{', ' + str(report['peak_rss_gb']) + ' GB' if report['peak_rss_gb'] else ''}. "
        f"{report['hardware']}."
    )
    return draw_table(("text encoder", "CRA"), rows) + f"\n{note}\n"


def _render_alignment(report: dict[str, Any]) -> str:
    rows = [
        [name, show_range([run["unseen_t2i_r1"] for run in runs])]
        for name, runs in report["recalls"].items()
    ]
    seeds = len(next(iter(report["recalls"].values())))
    note = f"Mean of {seeds} seeds (lowest to highest); {report['data']}."
    return draw_table(("text encoder", "text to image R@1"), rows) + f"\n{note}\n"


def _render_first_run(report: dict[str, Any]) -> str:
    rows, counts = [], []
    of_all = report["datasets"]
    for name in (name for name in of_all if not name.endswith((_SMALL, _IN_BFLOAT16))):
        dataset, scores = of_all[name], of_all[name]["scores"]
        rows.append(
            [
                name,
                f"{dataset['num_images']:,}",
                _percent_with_error(scores[_RECIPE]["r1"]),
                _percent_with_error(scores[_CLOSED_FORM]["r1"]),
                _lead(of_all, name, name + _SMALL, _RECIPE),
                percent(dataset["chance_r1"]),
                "" if dataset["seconds"] is None else f"{dataset['seconds'] / 60:.0f}",
            ]
        )
        num_splits = counted(dataset["num_splits"], "split")
        counts.append(f"{dataset['num_test_images']} {name} ({num_splits})")
    heads = (
        "images", "trained on", "the recipe", "closed form only", "lead over `embedded-small`",
        "chance", "minutes",
    )  # fmt: skip
    return draw_table(heads, rows) + (
        f"\nR@1 on test images, the mean of both directions: {', '.join(counts)}. Means over the "
        f"splits with standard errors. {report['hardware']}.\n"
    )


def _render_first_run_precision(report: dict[str, Any]) -> str:
    of_all, rows = report["datasets"], []
    for rounded in (name for name in of_all if name.endswith(_IN_BFLOAT16)):
        name = rounded.removesuffix(_IN_BFLOAT16)
        rows.append([name])
        for setting in (_RECIPE, _CLOSED_FORM):
            scores = (of_all[each]["scores"][setting]["r1"]["mean"] for each in (name, rounded))
            rows[-1] += [*map(percent, scores), _lead(of_all, rounded, name, setting)]
    heads = (
        "images", "the recipe: texts in `auto`", "in bfloat16", "difference",
        "closed form only: in `auto`", "in bfloat16", "difference",
    )  # fmt: skip
    note = f"R@1 on the same test images, the mean of both directions. {report['hardware']}."
    return f"{draw_table(heads, rows)}\n{note}\n"


def _lead(of_all: dict[str, Any], name: str, other: str, setting: str) -> str:
    """Show by how much the first R@1 is higher, with its error; both are of the same splits."""
    pairs = (of_all[each]["scores"][setting]["r1"]["by_split"] for each in (name, other))
    leads = [score - baseline for score, baseline in zip(*pairs, strict=True)]
    return percent_with_error(mean(leads), find_standard_error(leads))


def _percent_with_error(score: dict[str, Any]) -> str:
    return percent_with_error(score["mean"], score["standard_error"])


def _render_training_efficiency(report: dict[str, Any]) -> str:
    heads = (
        "at each step", "images per second", "times LoRA", "with extraction, 4 epochs",
        "peak memory, GB", "vision trained: images per second",
    )  # fmt: skip
    modes = {
        "lora": "LLM with LoRA, vision tower",
        "frozen_online": "frozen LLM, vision tower",
        "stored_captions": "stored captions, vision tower",
        "stored_both": "stored captions and images",
    }
    amortized = report["times_as_fast_as_lora_with_extraction"]["4 epochs"]
    rows = [
        [
            label,
            f"{report[mode]['samples_per_second']:.1f}",
            f"{report['times_as_fast_as_lora'][mode]:.1f}",
            f"{amortized[mode]:.1f}" if mode in amortized else "–",
            f"{report[mode]['peak_rss_gb']:.1f}",
            f"{report['vision_trained'][mode]['samples_per_second']:.1f}"
            if mode in report["vision_trained"]
            else "–",
        ]
        for mode, label in modes.items()
    ]
    return draw_table(heads, rows) + f"\nCaptions: {report['captions']}. {report['hardware']}.\n"


def _render_training_set_size(report: dict[str, Any]) -> str:
    """A row per number of images: R@1, and its range where there are several splits."""
    by_size: dict[int, dict[str, list[float]]] = {}
    for name, dataset in report["datasets"].items():
        for run in dataset["runs"]:
            by_size.setdefault(run["num_images"], {}).setdefault(name, []).append(run["r1"])
    rows = [
        [f"{size:,}", *(show_range(by_size[size].get(name)) for name in report["datasets"])]
        for size in sorted(by_size)
    ]
    rows.append(
        ["chance", *(percent(dataset["chance_r1"]) for dataset in report["datasets"].values())]
    )
    splits = {run["split"] for dataset in report["datasets"].values() for run in dataset["runs"]}
    shown = f"Splits: {len(splits)}" + ("; mean, lowest and highest" if len(splits) > 1 else "")
    counts = ", ".join(
        f"{dataset['num_test_images']} {name}" for name, dataset in report["datasets"].items()
    )
    note = (
        f"R@1 on test images, the mean of both directions: {counts}. {shown}. "
        f"{report['hardware']}; commit {report['commit']}."
    )
    return f"{draw_table(('images to train on', *report['datasets']), rows)}\n{note}\n"


TRAINING_TABLES: dict[str, Callable[[Any], str]] = {
    "finetune_llm": _render_finetuning,
    "finetune_llm_hard": _render_finetuning,
    "alignment": _render_alignment,
    "first_run": _render_first_run,
    "first_run_precision": _render_first_run_precision,
    "training_set_size": _render_training_set_size,
    "training_efficiency": _render_training_efficiency,
}
