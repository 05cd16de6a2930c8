"""Describe the results of an alignment to the user and on the model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..._suggestions import counted
from ...configuration_llm2clip import LLM2CLIPConfig
from ...data.streams.stream_run import StreamReport
from ...data.validation_errors import describe_errors
from ...model_folders.model_card import CardResult, read_card_data
from ..run_folder import read_run_record
from .held_out import HeldOutScores, find_interval
from .run_data import RunData

_CHOSE = ", which chose the weights"
# Replaces the digest of the held-out groups on the card.
SEEN = ", on which the model may have been trained before"
TUNED_ON = ", on whose captions the language model may have been fine-tuned"
_GROUPS = ", groups "
REFITTED = ", measured before the final refit on all images, including these"
NEAR_CHANCE = (
    "Warning: on held-out images this model is near chance, or there are too few images to tell. "
    "Do not use it for search. Add images, check that the captions describe them, start from a "
    "fine-tuned language model (finetune-llm), or train longer (--max-steps)."
)

WORSE = (
    "Warning: training increased this loss. Train for more steps (--max-steps), lower the "
    "--learning-rate, or keep the model from the start."
)
NOT_JUDGED = (
    "The loss of a training batch was not compared either, because a stream is read only once, so "
    "nothing shows whether training helped. Hold out images (--held-out-ratio) to find out."
)

_NEAR_CHANCE_ON_CARD = (
    "On held-out images this model is near chance, or there were too few images to tell."
)
CLEARLY_LOWER = (
    "Warning: its R@1 is clearly lower than at the start, although its loss is lower. If R@1 is "
    "what matters, keep the start: --max-steps 0 writes it if it is the closed form."
)

FORGOT = "Warning: training clearly lowered the classification accuracy."
KEEP_TOWER = (
    " Regularize the vision tower toward its frozen copy (--distillation-weight), or interpolate "
    "back toward the original weights (examples/scripts/mix_models.py)."
)
LET_CHOOSE = " Select weights by this accuracy (--choose-by zero_shot)."

_CHOOSERS = {
    "loss": "lowest held-out loss",
    "zero_shot": "highest zero-shot accuracy",
    "last_step": "option choose_by=last_step",
}
# The loss of a noisy batch of a few hundred images may rise by this factor by chance.
_CHANCE_RISE = 0.01


def note_held_out(data: RunData, source: Path) -> dict[str, Any]:
    """Collect the caveats of the held-out scores for the record of a run."""
    card = read_card_data(source)  # fails before hours of training, not after
    if data.held_out is None:
        return {}
    groups, config = data.held_out.groups, LLM2CLIPConfig.from_pretrained(source)
    was_held_out = any(result.dataset.endswith(_GROUPS + groups) for result in card.results)
    return {
        "groups": groups,
        "maybe_trained_on": config.projections_trained and not was_held_out,
        "text_training_data": list(card.text_training_data),
    }


def describe_alignment(output: Path) -> list[str]:
    record = read_run_record(output)
    results, model = record["results"], output / "model"
    lines = [f"Start: {_describe_start(results['start'])}.", *_describe_held_out(results)]
    lines += _describe_zero_shot(results, record["config"])
    lines += [*_describe_objective(results), *_describe_stream(results)]
    lines.append(f"Wrote {model} {_describe_weights(results)}.")
    if not results["has_golden_embeddings"]:
        lines.append(
            f"{record['inputs']['source']} has no recorded caption embeddings, so {model} has no "
            "golden embeddings. Write a copy with llm2clip export to record them."
        )
    scores = _read_best(results)
    if scores is not None and scores.is_near_chance:
        lines.append(NEAR_CHANCE)
    return lines


def make_caution(results: Mapping[str, Any]) -> str | None:
    """Return the warning for the model card; None if no warning is needed."""
    scores = _read_best(results)
    if scores is not None and scores.is_near_chance:
        return _NEAR_CHANCE_ON_CARD
    if _got_worse(results):
        return "Training increased the loss on the training images."
    return None


def make_card_results(results: Mapping[str, Any], data_name: str | None) -> tuple[CardResult, ...]:
    scores = _read_best(results)
    if scores is None:
        return ()
    labeled, notes = results.get("zero_shot"), results["held_out"]
    held_out = f"{scores.num_images} images held out of the alignment"
    if notes["maybe_trained_on"]:
        held_out += SEEN
    if notes["text_training_data"]:
        held_out += TUNED_ON
    if "refit" in results:
        held_out += REFITTED
    elif not notes["maybe_trained_on"]:
        held_out += _GROUPS + notes["groups"]
    dataset = held_out if data_name is None else f"{data_name}, {held_out}"
    shown = {name: value for name, value in asdict(scores).items() if name.endswith("_r1")}
    recalls = CardResult(
        "retrieval",
        dataset,
        shown,
        intervals={name: scores.find_interval(shown[name]) for name in ("t2i_r1", "i2t_r1")},
        count=f"{counted(scores.num_images, 'image')}, {counted(scores.num_texts, 'text')}",
    )
    if labeled is None:
        return (recalls,)
    accuracy, num_images = labeled["accuracy"], labeled["num_images"]
    classified = CardResult(
        "classification",
        labeled["dataset"] + _CHOSE * (notes["chosen_by"] == "zero_shot"),
        {"top_1": accuracy, "chance_top_1": 1 / labeled["num_classes"]},
        intervals={"top_1": find_interval(accuracy, num_images)},
        count=counted(num_images, "image"),
    )
    return recalls, classified


def _describe_weights(results: Mapping[str, Any]) -> str:
    """Describe the written weights; the loss is shown only for the weights of the last step."""
    held_out, refit = results["held_out"], results.get("refit")
    if refit is not None:
        return f"refitted on all {refit['num_records']:,} records, including the held-out ones"
    steps, loss = results["steps"], results["final_loss"]
    if held_out is not None and (held_out["best_step"], held_out["best_share"]) != (steps, 1):
        return f"with {_name_weights(held_out, steps)}"
    if not steps:
        return "with the weights of the start"
    return f"after {counted(steps, 'step')}" + ("" if loss is None else f", loss {loss:.4f}")


def _name_weights(held_out: Mapping[str, Any], steps: int) -> str:
    step, share = held_out["best_step"], held_out["best_share"]
    if not step:
        return "the weights of the start"
    between = "" if share == 1 else f"{share:.0%} of the way from the start to "
    return f"{between}the weights of step {step} of {steps}"


def _got_worse(results: Mapping[str, Any]) -> bool:
    losses = results.get("objective")  # measured only if no images are held out
    return losses is not None and losses["after"] > (1 + _CHANCE_RISE) * losses["before"]


def _describe_objective(results: Mapping[str, Any]) -> list[str]:
    losses = results.get("objective")
    if losses is None:
        return [] if results["held_out"] is not None or not results["steps"] else [NOT_JUDGED]
    line = (
        f"Loss on a training batch, with float32 weights: {losses['before']:.3f} at the start, "
        f"{losses['after']:.3f} at the end."
    )
    return [line, *([WORSE] if _got_worse(results) else [])]


def _read_best(results: Mapping[str, Any]) -> HeldOutScores | None:
    held_out = results["held_out"]
    return None if held_out is None else HeldOutScores(**held_out["best"])


def _describe_held_out(results: Mapping[str, Any]) -> list[str]:
    after = _read_best(results)
    if after is None:
        return [
            "The alignment held out no images, so nothing shows how good the model is on other "
            "images. It keeps its last weights."
        ]
    notes = results["held_out"]
    before = HeldOutScores(**notes["before"])
    lines = [
        f"R@1 among {after.num_images} held-out images and {after.num_texts} captions "
        "(text to image, image to text), with 95 % intervals:",
        f"  at the start  {_show(before)}",
        f"  chosen        {_show(after)}",
        f"  chance        {after.chance_t2i_r1:6.1%} {'':15}{after.chance_i2t_r1:6.1%}",
        f"The {_CHOOSERS[notes['chosen_by']]} chose {_name_weights(notes, results['steps'])}.",
    ]
    lowest = [before.find_interval(score)[0] for score in (before.t2i_r1, before.i2t_r1)]
    is_lower = after.t2i_r1 + after.i2t_r1 < before.t2i_r1 + before.i2t_r1
    if is_lower and (after.t2i_r1 < lowest[0] or after.i2t_r1 < lowest[1]):
        lines.append(CLEARLY_LOWER)
    if "refit" in results:
        lines.append(
            "The final model was refit on all images, including these, so the scores above come "
            "from the model before the refit. They estimate the final model's scores on new images."
        )
    if notes["maybe_trained_on"]:
        lines.append(
            "  These scores may be too high because the model may have been trained on these "
            "images before: it was already trained when this run began, and its card does not say "
            "that the same images were held out (same data, seed and held_out_ratio)."
        )
    if tuned_on := notes["text_training_data"]:
        lines.append(
            f"  The language model was fine-tuned on captions ({', '.join(tuned_on)}). If they "
            "include captions of the held-out images, these scores may be too high."
        )
    if shared := notes["num_shared_captions"]:
        what = "sampled caption" if "stream" in results else "training caption"
        lines.append(f"  Shared with held-out images: {counted(shared, what)}.")
    return lines


def _describe_zero_shot(results: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Describe the zero-shot accuracy on labeled images before and after training."""
    labeled = results.get("zero_shot")
    if labeled is None:
        return []
    before, after = results["held_out"]["before"]["zero_shot"], labeled["accuracy"]
    count, num_classes = labeled["num_images"], labeled["num_classes"]
    low, high = find_interval(before, count)
    lines = [
        f"Zero-shot accuracy on {counted(count, 'image')} in {num_classes} classes "
        f"({labeled['dataset']}): {before:.1%} [{low:.1%}, {high:.1%}] at the start, {after:.1%} "
        f"for the written model, {1 / num_classes:.1%} by chance."
    ]
    if after < low:
        advice = "" if config["choose_by"] == "zero_shot" else LET_CHOOSE
        is_frozen = config["vision_training"] == "frozen"
        lines.append(FORGOT + ("" if is_frozen else KEEP_TOWER) + advice)
    return lines


def _describe_stream(results: Mapping[str, Any]) -> list[str]:
    """Describe the samples that a stream read and lost; empty if the data was not a stream."""
    state = results.get("stream")
    if state is None:
        return []
    counts = dict(state)
    epochs = counted(counts.pop("epochs"), "epoch")
    return [
        f"Stream, {epochs}: {StreamReport.from_state(counts).describe_losses()}.",
        *describe_errors(state["counts"], state["places"]),
    ]


def _describe_start(start: Mapping[str, Any]) -> str:
    cca, inherited = start["cca"], start["inheritance"]
    if inherited is not None:
        distance = inherited["distance"]
        kind = "held-out" if inherited["is_held_out"] else "training"
        return (
            f"the text side inherited {counted(inherited['num_captions'], 'caption')} from the "
            f"text encoder of the vision tower ({inherited['num_too_long']:,} more exceed its "
            f"limit); distance on {counted(inherited['num_measured'], kind + ' caption')}: "
            f"{distance['before']:.3f} before, {distance['closed_form']:.3f} by the closed form, "
            f"{distance['after']:.3f} after {inherited['best_step']} of {inherited['steps']} steps"
        )
    if cca is not None:
        return (
            f"canonical correlation on {cca['num_pairs']:,} pairs, shrinkage "
            f"{cca['text_shrinkage']:g} for texts and {cca['image_shrinkage']:g} for images"
        )
    return "the model's projections" if start["is_trained"] else "random projections"


def _show(scores: HeldOutScores) -> str:
    shown = ""
    for ratio in (scores.t2i_r1, scores.i2t_r1):
        low, high = scores.find_interval(ratio)
        shown += f"{ratio:6.1%} [{low:5.1%},{high:6.1%}] "
    return f"{shown} loss {scores.loss:.3f}"
