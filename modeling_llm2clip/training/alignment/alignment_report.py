"""What `run.json` of an alignment says, for a terminal and for the card of the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..._suggestions import counted
from ...configuration_llm2clip import LLM2CLIPConfig
from ...data.streams.stream_report import StreamReport
from ...data.validation_errors import describe_errors
from ...model_folders.model_card_data import CardResult, read_card_data
from ..run_folder import read_run_record
from .held_out import HeldOutScores
from .run_data import RunData

# On the card, in place of the digest of the held-out groups.
SEEN = ", on which the model may have been trained before"
NEAR_CHANCE = (
    "Warning: on held-out images this model is near chance, or they are too few to tell. Do not "
    "use it for search. Give more images, check that captions describe them, start from a "
    "fine-tuned language model (finetune-llm), or train longer (--max-steps)."
)


def note_held_out(data: RunData, source: Path) -> dict[str, Any]:
    """Find what a reader of the held-out scores must know, for the record of a run.

    Args:
        data: What the run trains on and measures itself on.
        source: Folder of the model that is trained on.

    Returns:
        Nothing where no images are held out; or `groups`, the digest of these; how many captions
        to train on they have too; and whether the model may have been trained on them before, as
        any trained model may whose card does not say that it held out the same.
    """
    if data.held_out is None:
        return {}
    groups, config = data.held_out.groups, LLM2CLIPConfig.from_pretrained(source)
    was_trained = config.projections_trained or config.text_adapter_trained
    results = read_card_data(source).results
    was_held_out = any(result.dataset.endswith(_name_groups(groups)) for result in results)
    return {
        "groups": groups,
        "num_shared_captions": data.num_shared_captions,
        "maybe_trained_on": was_trained and not was_held_out,
    }


def describe_alignment(output: Path) -> list[str]:
    """Describe a finished run in lines for a terminal.

    Args:
        output: Folder of the run.
    """
    record = read_run_record(output)
    results, model = record["results"], output / "model"
    lines = [f"Start: {_describe_start(results['start'])}.", *_describe_held_out(results)]
    lines += _describe_stream(results)
    lines.append(f"Wrote {model} {_describe_weights(results)}.")
    if not results["has_golden_embeddings"]:
        source = record["inputs"]["source"]
        lines.append(
            f"{source} has no recorded caption embeddings, so {model} has no golden embeddings. "
            "llm2clip build records them now."
        )
    if make_caution(results):
        lines.append(NEAR_CHANCE)
    return lines


def make_caution(results: Mapping[str, Any]) -> str | None:
    """Make the warning on the model card; None if no warning is needed.

    Args:
        results: Of the run.
    """
    scores = _read_best(results)
    if scores is None or not scores.is_near_chance:
        return None
    return "On held-out images this model is near chance, or they were too few to tell."


def make_card_results(results: Mapping[str, Any], data_name: str | None) -> tuple[CardResult, ...]:
    """Make the held-out scores as a model card has them.

    Args:
        results: Of the run.
        data_name: Name of the dataset that was trained on; None for no name.
    """
    scores = _read_best(results)
    if scores is None:
        return ()
    shown = {name: value for name, value in scores.as_record().items() if name.endswith("_r1")}
    held_out = f"{scores.num_images} images held out of the alignment"
    notes = results["held_out"]
    held_out += SEEN if notes["maybe_trained_on"] else _name_groups(notes["groups"])
    dataset = held_out if data_name is None else f"{data_name}, {held_out}"
    return (CardResult("retrieval", dataset, shown),)


def _name_groups(groups: str) -> str:
    return f", groups {groups}"


def _describe_weights(results: Mapping[str, Any]) -> str:
    """Name the step of the weights that were written; the last loss is that of the last step."""
    steps, loss, held_out = results["steps"], results["final_loss"], results["held_out"]
    if held_out is not None and held_out["best_step"] < steps:
        return f"with the weights of step {held_out['best_step']} of {steps}"
    return f"after {steps} steps" + ("" if loss is None else f", loss {loss:.4f}")


def _read_best(results: Mapping[str, Any]) -> HeldOutScores | None:
    held_out = results["held_out"]
    return None if held_out is None else HeldOutScores(**held_out["best"])


def _describe_held_out(results: Mapping[str, Any]) -> list[str]:
    after = _read_best(results)
    if after is None:
        return ["The alignment held out no images; it keeps its last weights."]
    notes = results["held_out"]
    before = HeldOutScores(**notes["before"])
    lines = [
        f"R@1 among {after.num_images} held-out images and {after.num_texts} captions "
        "(text to image, image to text):",
        f"  at the start      {_show(before)}",
        f"  after step {notes['best_step']:<6} {_show(after)}",
        f"  chance            {after.chance_t2i_r1:6.1%} {after.chance_i2t_r1:6.1%}",
    ]
    if notes["maybe_trained_on"]:
        lines.append(
            "  The model may have been trained on these images before, so that these scores may be "
            "too high: it was trained when this run began, and its card does not say that the same "
            "images were held out (same data, seed and held_out_ratio)."
        )
    if shared := notes["num_shared_captions"]:
        lines.append(f"  {shared:,} captions to train on are captions of held-out images, too.")
    return lines


def _describe_stream(results: Mapping[str, Any]) -> list[str]:
    """Say what was read and lost of a stream; nothing for records of an index."""
    state = results.get("stream")
    if state is None:
        return []
    report = StreamReport.from_state(state)
    epochs = len(state["epochs"])
    lines = [f"Stream, {counted(epochs, 'epoch')}: {report.describe_losses()}."]
    return lines + describe_errors(report.counts, report.places)


def _describe_start(start: Mapping[str, Any]) -> str:
    cca = start["cca"]
    if cca is not None:
        return (
            f"canonical correlation of {cca['num_pairs']:,} pairs, shrinkage "
            f"{cca['text_shrinkage']:g} for texts and {cca['image_shrinkage']:g} for images"
        )
    return "the model's projections" if start["is_trained"] else "random projections"


def _show(scores: HeldOutScores) -> str:
    return f"{scores.t2i_r1:6.1%} {scores.i2t_r1:6.1%}   loss {scores.loss:.3f}"
