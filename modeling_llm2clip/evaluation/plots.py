"""R@1 against the length of the text, several models in one image; needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._extras import PLOTS, require
from .labels import disambiguate, list_digests, list_sides
from .results import Result, find_differences
from .tasks.clip_tokens import CLIP_TEXT_TOKENS

_ENDINGS = (".png", ".svg", ".pdf")


def plot_lengths(results: Sequence[Result], file: Path) -> None:
    """Draw the R@1 of every bucket with its interval, one line a model.

    Args:
        results: of the task `length`, all on one set.
        file: PNG, SVG or PDF, by its ending.
    Raises: ValueError for other results, results on different data or under different protocols
        of the task, another ending, a missing folder, or when matplotlib is not installed.
    """
    if not results or any("buckets" not in result.scores for result in results):
        raise ValueError("This plot takes results of the task 'length'.")
    _require_one_protocol(results)
    results = disambiguate(results)
    require_plot_file(file)
    plt = import_matplotlib()
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
    axes.set_title("\n".join([results[0].set, *list_sides(results[0])]))
    axes.legend()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _require_one_protocol(results: Sequence[Result]) -> None:
    if len(sets := {result.set for result in results}) > 1:
        raise ValueError(f"The results are of different sets, {sorted(sets)}; plot each by itself.")
    models_of: dict[tuple[str, ...], list[str]] = {}
    for result in results:
        models_of.setdefault(list_digests(result), []).append(result.model)
    if len(models_of) > 1:
        raise ValueError(
            f"The results are of different data of the set {results[0].set}: the models "
            f"{' and '.join(map(str, models_of.values()))} were shown other languages, captions or "
            "images. Evaluate all of them on the same data."
        )
    first = results[0].protocol["task"]
    for result in results:
        if differences := list(find_differences(first, result.protocol["task"])):
            raise ValueError(
                f"{results[0].model} and {result.model} were scored in different ways: "
                f"{'; '.join(differences)}. Evaluate both again in the same way."
            )


def require_plot_file(file: Path) -> None:
    """Raise ValueError for a file that no plot can be written into."""
    if file.suffix.lower() not in _ENDINGS:
        raise ValueError(f"{file} ends in none of {_ENDINGS}. Name an image of one of them.")
    if not file.parent.is_dir():
        raise ValueError(f"{file.parent} is no folder. Make it, or name the plot elsewhere.")


def import_matplotlib() -> Any:
    """Import matplotlib's pyplot, for files.

    Raises: MissingExtraError saying how to install it.
    """
    require(PLOTS)
    import matplotlib

    matplotlib.use("agg")  # draws into files, with or without a screen
    from matplotlib import pyplot

    return pyplot
