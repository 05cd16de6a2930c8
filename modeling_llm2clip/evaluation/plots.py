"""Plots of results; they need matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .._extras import PLOTS, require
from ..data.atomic_files import require_writable
from .report import label_dataset, list_comparable, list_sides
from .results import Result
from .tasks.text_length import CLIP_TEXT_TOKENS

_SUFFIXES = (".png", ".svg", ".pdf")


def plot_lengths(results: Sequence[Result], file: Path) -> None:
    """Plot R@1 against the length of the text, with intervals, one line per model."""
    if not results or any("buckets" not in result.scores for result in results):
        raise ValueError("This plot takes results of the task 'length'.")
    if len(names := {result.dataset for result in results}) > 1:
        raise ValueError(
            f"The results are on different datasets: {', '.join(sorted(names))}. Plot each by "
            "itself."
        )
    results = list_comparable(results)
    require_plot_file(file)
    require(PLOTS)
    import matplotlib

    matplotlib.use("agg")  # draws into files, with or without a screen
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for result in results:
        buckets = result.scores["buckets"]
        lengths = [bucket["mean_clip_tokens"] for bucket in buckets]
        rates = [100 * bucket["hit_rate_at_1"]["value"] for bucket in buckets]
        errors = [
            [100 * abs(bucket["hit_rate_at_1"]["value"] - bucket["hit_rate_at_1"][end])
             for bucket in buckets]
            for end in ("low", "high")
        ]  # fmt: skip
        axes.errorbar(lengths, rates, yerr=errors, marker="o", capsize=3, label=result.model)
    axes.axvline(CLIP_TEXT_TOKENS, color="0.6", linestyle=":", label="end of a 77-token encoder")
    axes.axhline(100 * results[0].scores["chance"], color="0.6", linewidth=0.8, label="chance")
    axes.set_xlabel("length of the text, tokens of CLIP's vocabulary")
    axes.set_ylabel("R@1, %")
    axes.set_ylim(bottom=0)
    axes.set_title("\n".join([label_dataset(results[0]), *list_sides(results[0])]))
    axes.legend()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def require_plot_file(file: Path) -> None:
    if file.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"{file} must end in one of {', '.join(_SUFFIXES)}.")
    if not file.parent.is_dir():
        raise ValueError(f"{file.parent} is not a folder. Make it, or name the plot elsewhere.")
    require_writable(file.parent)
