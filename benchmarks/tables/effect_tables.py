"""Tables of effects: how each part of the method changes the scores."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Any

from benchmarks.tables.markdown_tables import (
    draw_table,
    find_standard_error,
    percent,
    percent_with_error,
    show_range,
)


def _render_forgetting(report: dict[str, Any]) -> str:
    runs_of: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in report["runs"]:
        runs_of.setdefault((run["tower"] or "–", run["condition"]), []).append(run)
    columns = {
        "accuracy": "all classes", "named": "every second class",
        "unnamed": "the others", "short_queries": "short queries",
        "t2i_r1": "text to image", "i2t_r1": "image to text",
    }  # fmt: skip
    towers = ("–", "frozen", "trained")
    rows = [
        [condition, tower, *(show_range([run[name] for run in runs]) for name in columns)]
        for (tower, condition), runs in sorted(runs_of.items(), key=lambda i: towers.index(i[0][0]))
    ]
    counts, chosen = report["num_images"], report["chosen"]
    seeds = len({run["seed"] for run in report["runs"]} - {None})
    note = (
        f"Top-1 accuracy on {counts['labeled']} held-out drawings of {report['num_categories']} "
        "categories: on all, on those of every second category, and on the others. Short queries: "
        f"the share of {report['num_queries']:,} keywords of one or two words, categories left "
        "out, whose first drawing has the keyword. R@1 among "
        f"{counts['test']} held-out photographs. Means of {seeds} seeds (lowest to highest). Dual "
        f"encoder: {counts['all']:,} images at {report['image_size']} pixels, {report['epochs']} "
        f"epochs; alignment: {counts['aligned']:,} of these, {report['steps']} steps of 64, weight "
        f"{chosen['weight']:g}, {chosen['sample']} texts per step. {report['hardware']}; commit "
        f"{report['commit']}."
    )
    return f"{draw_table(('text side', 'tower', *columns.values()), rows)}\n{note}\n"


def _render_loss_effects(report: dict[str, Any]) -> str:
    scores_of: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for run in report["runs"]:
        key = (run["start"], run["num_images"], run["loss"])
        scores_of.setdefault(key, []).append(run["scores"])
    plain, dims = report["runs"][0]["loss"], list(report["runs"][0]["scores"])
    rows = []
    for (start, num_images, loss), scores in scores_of.items():
        others = scores_of[start, num_images, plain]
        cells = [
            _show_effect(
                [score[dim]["r1"] for score in scores],
                [] if loss == plain else [score[dim]["r1"] for score in others],
            )
            for dim in dims
        ]
        rows.append([start, f"{num_images:,}", loss, str(len(scores)), *cells])
    heads = ["start", "images", "loss", "splits", *(f"{dim} dimensions" for dim in dims)]
    counts = {row[3] for row in rows}
    if len(counts) == 1:
        for row in (heads, *rows):
            del row[3]
    splits = f"{counts.pop()} splits" if len(counts) == 1 else "the splits"
    config = report["config"]
    note = (
        f"R@1, mean of both directions and of {splits}, among {report['num_test_images']} images "
        f"(chance {percent(report['chance_r1'])}), after at most {config['max_steps']} steps of "
        f"{config['global_batch_size']}. In parentheses: percentage points more than {plain} on "
        f"the same splits, and their standard error. {report['hardware']}; commit "
        f"{report['commit']}."
    )
    return f"{draw_table(heads, rows)}\n{note}\n"


def _render_text_towers(report: dict[str, Any]) -> str:
    names = {
        "causal": "SmolLM2-135M, causal",
        "bidirectional": "the same, made bidirectional",
        "tuned": "the same, fine-tuned on captions (`embedded`)",
        "minilm": "all-MiniLM-L6-v2 as it is (`embedded --prompt own`)",
    }
    heads = (
        "text tower", "short, text to image", "image to text", "long, text to image",
        "image to text", "CRA",
    )  # fmt: skip
    rows = []
    for name in dict.fromkeys(run["tower"] for run in report["runs"]):
        runs = [run for run in report["runs"] if run["tower"] == name]
        scores = [
            _show_mean([run[length][way] for run in runs])
            for length in ("short", "long")
            for way in ("t2i_r1", "i2t_r1")
        ]
        rows.append([names[name], *scores, percent(report["cra"][name])])
    num_splits = len({run["split"] for run in report["runs"]})
    num_steps = report["alignment"]["max_steps"]
    steps = f"{num_steps} steps" if num_steps else "in closed form"
    note = (
        f"R@1, means of {num_splits} splits with standard errors. Trained on "
        f"{report['num_images']} photographs with {report['captions_per_image']} captions each, "
        f"{steps}. Short: the other "
        f"{report['num_test_images']}, chance {percent(1 / report['num_test_images'])}. Long: "
        f"{report['num_long_images']} photographs with a paragraph each, chance "
        f"{percent(1 / report['num_long_images'])}. CRA: {report['cra_data']}. "
        f"{report['hardware']}; commit {report['commit']}."
    )
    return f"{draw_table(heads, rows)}\n{note}\n"


def _render_precision_effect(report: dict[str, Any]) -> str:
    heads = (
        "images", "text tower", "smallest cosine (mean) of texts", "of images",
        "R@1, text to image: float32, bfloat16, `auto`", "image to text",
        "`auto` runs texts in", "images in",
    )  # fmt: skip
    names = {"minilm": "all-MiniLM-L6-v2", "tuned": "SmolLM2-135M, fine-tuned"}
    rows = []
    for run in report["runs"]:
        cosines = [
            "{min:.4f} ({mean:.4f})".format(**run["cosine"][name]) for name in ("text", "image")
        ]
        scores = [
            ", ".join(percent(run["r1"][name][way]) for name in ("float32", "bfloat16", "auto"))
            for way in ("t2i", "i2t")
        ]
        chosen = [
            "{dtype} ({cosine:.4f})".format(**run["guard"][name]) for name in ("text", "image")
        ]
        rows.append([run["dataset"], names[run["tower"]], *cosines, *scores, *chosen])
    counts = {run["dataset"]: run["num_test_images"] for run in report["runs"]}
    held_out = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    note = (
        f"Held-out images: {held_out}. In the last two columns: the smallest cosine of the "
        f"examples that are compared, of which {report['least_cosine']} is accepted. "
        f"{report['hardware']}; "
        f"commit {report['commit']}."
    )
    return f"{draw_table(heads, rows)}\n{note}\n"


def _render_loss_precision(report: dict[str, Any]) -> str:
    heads = ("products", "cosines of pairs, others", "largest error of a logit",
             "relative error of the loss", "of the gradients", "of the temperature's")  # fmt: skip
    rows = [
        [name, "{}, {}".format(*run["cosines"])]
        + [f"{errors[part]:.1g}" for part in (
            "largest_logit_error", "loss_error", "gradient_error", "scale_gradient_error"
        )]
        for run in report["runs"]
        for name, errors in run["errors"].items()
    ]  # fmt: skip
    note = (
        f"{report['count']:,} pairs of width {report['width']:,}, inverse temperature "
        f"{report['scale']:g}, beside float64. {report['hardware']}; commit {report['commit']}."
    )
    return f"{draw_table(heads, rows)}\n{note}\n"


def _show_effect(values: list[float], others: list[float]) -> str:
    """Show a mean, and its distance from that of others on the same splits if there are any."""
    if not others:
        return percent(fmean(values))
    # A run that was interrupted has fewer of the last losses.
    gains = [100 * (value - other) for value, other in zip(values, others, strict=False)]
    error = find_standard_error(gains)
    shown = "" if error is None else f" ± {error:.1f}"
    return f"{percent(fmean(values))} ({fmean(gains):+.1f}{shown})"


def _render_languages(report: dict[str, Any]) -> str:
    columns: dict[str, list[dict[str, Any]]] = {}
    for run in report["runs"]:
        columns.setdefault(run["tower"], []).append(run)
    heads = ("language", *columns)
    rows = [
        [lang, *(percent(fmean(run["languages"][lang]["t2i_r1"] for run in runs))
                 for runs in columns.values())]
        for lang in report["languages"]
    ]  # fmt: skip
    means = {
        "mean without English": "mean_of_others",
        "the same, each language centered": "centered_mean_of_others",
    }
    rows += [
        [shown, *(_show_mean([run[name]["t2i_r1"] for run in runs]) for runs in columns.values())]
        for shown, name in means.items()
    ]
    cra_of = {int(layer): cra["value"] for layer, cra in report["layers"]["cra"].items()}
    best = sorted(cra_of, key=lambda layer: -cra_of[layer])[:3]
    layers = ", ".join(
        f"{layer} {percent(cra_of[layer])}" for layer in sorted({*best, max(cra_of)})
    )
    splits = "; ".join(f"{name}: {len(runs)}" for name, runs in columns.items())
    note = (
        f"Text to image R@1 among {report['num_test_images']} emoji unseen in training, which was "
        f"in English; means over splits ({splits}), those of languages with standard errors; "
        f"chance {percent(report['chance_r1'])}. Translations of "
        f"{report['layers']['num_images']} other emoji that find the English name, in the best "
        f"layers and the last of Gemma 3 270M: {layers}. {report['hardware']}; commit "
        f"{report['commit']}."
    )
    return f"{draw_table(heads, rows)}\n{note}\n"


def _show_mean(values: list[float]) -> str:
    return percent_with_error(fmean(values), find_standard_error(values))


_IDEAS = {
    "all_images": "all images",
    "ceiling": "where the captions are ambiguous",
    "embedders": "the encoders as they are",
    "layers": "another last layer",
    "causal": "with the causal LLM",
    "joined_embedders": "with other embedders",
    "control": "more steps and nothing else (control)",
    "distilled": "distilled from all-mpnet-base-v2",
    "rank_64": "new LoRA of rank 64",
    "more_texts": "texts of other images as well",
    "large_batches": "batches of 256 with hard negatives",
}


def _render_finetuning_ideas(report: dict[str, Any]) -> str:
    heads = ("idea", "encoder", "CRA", "beyond the shipped LoRA, points", "95 %")
    ideas = report["ideas"]
    rows = [
        [_IDEAS[idea] if not place else "", name, percent(scores["cra"]["value"]),
         f"{100 * scores['gain']['value']:+.1f}", _show_interval(scores["gain"])]
        for idea, entry in ideas.items()
        for place, (name, scores) in enumerate(entry.get("rows", {}).items())
    ]  # fmt: skip
    tables = [draw_table(heads, rows)]
    if "ceiling" in ideas:
        tables.append(_draw_ceiling(ideas["ceiling"]))
    if "all_images" in ideas:
        entry = ideas["all_images"]
        tables.append(
            f"all-MiniLM-L6-v2 on all {entry['num_images']:,} images: "
            f"{percent(entry['cra']['value'])}.\n"
        )
    missing = "; ".join(_IDEAS.get(name, name) for name in report["not_run"])
    runs = (f"{entry['hardware']}; commit {entry['commit']}" for entry in ideas.values())
    hardware = " and ".join(dict.fromkeys(runs))
    tables.append(
        f"{report['data']}. Trainings: {report['steps']} steps of {report['batch_size']} pairs. "
        f"{f'Not run yet: {missing}. ' if missing else ''}{hardware}.\n"
    )
    return "\n".join(tables)


def _show_interval(interval: dict[str, float]) -> str:
    return f"{100 * interval['low']:+.1f} to {100 * interval['high']:+.1f}"


def _draw_ceiling(ceiling: dict[str, Any]) -> str:
    heads = (
        "encoder", "wrong", "of these, fit as well", "right in the first 5",
        "a caption and one other", "a caption and the mean of 3",
    )  # fmt: skip
    rows = []
    for name, errors in ceiling["errors"].items():
        by_number = ceiling["by_number_of_captions"].get(name)
        shares = (percent(errors["fits_as_well"]), percent(ceiling["hit_at_5"][name]))
        several = (
            [percent(by_number["one"]), percent(by_number["mean_of_3"])] if by_number else ["", ""]
        )
        rows.append([name, str(errors["errors"]), *shares, *several])
    note = (
        f"{percent(ceiling['found_by_any'])} of the images are found by at least one of the "
        f"encoders, {percent(ceiling['found_by_all'])} by all. Where all miss, all choose the same "
        f"wrong caption in {percent(ceiling['same_wrong_one'])}. The two captions of "
        f"{percent(ceiling['without_a_shared_word'])} of the images share no word but stop words. "
        "A wrong caption fits as well if it shares at least as many words with the query as the "
        "right one does, without stop words."
    )
    return f"{draw_table(heads, rows)}\n{note}\n"


EFFECT_TABLES: dict[str, Callable[[Any], str]] = {
    "finetuning_ideas": _render_finetuning_ideas,
    "forgetting": _render_forgetting,
    "languages": _render_languages,
    "loss_effects": _render_loss_effects,
    "precision_effect": _render_precision_effect,
    "loss_precision": _render_loss_precision,
    "text_towers": _render_text_towers,
}
