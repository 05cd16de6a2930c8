"""Describes an alignment: its results to a user and on the model card, its images in the folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..._suggestions import counted
from ...configs.align_config import AlignConfig
from ...configuration_llm2clip import LLM2CLIPConfig
from ...data.key_arrays import count_distinct
from ...data.records.record_table import Array, RecordTable
from ...data.streams.stream_report import StreamReport
from ...data.validation_errors import describe_errors
from ...encoding.encode import encode_images
from ...model_folders.fingerprint import fingerprint_vision
from ...model_folders.model_card import CardResult, read_card_data
from ...model_folders.training_images import (
    FEWEST_JUDGED,
    TRAINING_IMAGES_FILE,
    DatasetSummary,
    TrainingImages,
    read_training_images,
    summarize_images,
    write_training_images,
)
from ...modeling_llm2clip import LLM2CLIPVisionModel
from ...scheduling.processes import choose_device
from ..run_folder import read_run_record
from .held_out import HeldOutScores, count_shared_captions
from .run_data import RecordData, RunData
from .sampling import mix

# On the card, in place of the digest of the held-out groups.
SEEN = ", on which the model may have been trained before"
REFITTED = ", measured before the model was fitted once more on all images, these too"
NEAR_CHANCE = (
    "Warning: on held-out images this model is near chance, or they are too few to tell. Do not "
    "use it for search. Give more images, check that captions describe them, start from a "
    "fine-tuned language model (finetune-llm), or train longer (--max-steps)."
)

WORSE = (
    "Warning: the training made this loss higher than it was at the start. Take more steps "
    "(--max-steps), a lower --learning-rate, or the start alone (--max-steps 0)."
)

LOWER = (
    "Its R@1 is lower than at the start by less than so few images can tell: it is within the "
    "intervals. The loss shows more."
)
CLEARLY_LOWER = (
    "Warning: its R@1 is clearly lower than at the start, although its loss is lower. Where R@1 is "
    "what counts, keep the start (--max-steps 0)."
)

# A batch of a few hundred images, with noise, may have so much higher a loss by chance.
_CHANCE_RISE = 0.01
# Of so many images 128 clusters and their spread are known well enough.
_STORED_SAMPLE = 4_096
# Each costs a pass of the vision tower.
_ENCODED_SAMPLE = 1_024
_OF_ORDER, _OF_PARTS = 0, 1  # what the keys of images and groups are mixed with
_UNNAMED = "unnamed data"


def note_held_out(data: RunData, source: Path) -> dict[str, Any]:
    """Find what a reader of the held-out scores must know, for the record of a run."""
    if data.held_out is None:
        return {}
    groups, config = data.held_out.groups, LLM2CLIPConfig.from_pretrained(source)
    was_trained = config.projections_trained or config.text_adapter_trained
    results = read_card_data(source).results
    was_held_out = any(result.dataset.endswith(_name_groups(groups)) for result in results)
    return {
        "groups": groups,
        "num_shared_captions": count_shared_captions(data.dataset.records, data.held_out.items)
        if isinstance(data, RecordData)
        else None,
        "maybe_trained_on": was_trained and not was_held_out,
    }


def describe_alignment(output: Path) -> list[str]:
    record = read_run_record(output)
    results, model = record["results"], output / "model"
    lines = [f"Start: {_describe_start(results['start'])}.", *_describe_held_out(results)]
    lines += [*_describe_objective(results), *_describe_stream(results)]
    lines.append(f"Wrote {model} {_describe_weights(results)}.")
    if not results["has_golden_embeddings"]:
        source = record["inputs"]["source"]
        lines.append(
            f"{source} has no recorded caption embeddings, so {model} has no golden embeddings. "
            "llm2clip build records them now."
        )
    scores = _read_best(results)
    if scores is not None and scores.is_near_chance:
        lines.append(NEAR_CHANCE)
    return lines


def make_caution(results: Mapping[str, Any]) -> str | None:
    """Make the warning on the model card; None if no warning is needed."""
    scores = _read_best(results)
    if scores is not None and scores.is_near_chance:
        return "On held-out images this model is near chance, or they were too few to tell."
    if _got_worse(results):
        return "The training raised the loss of the images that it trained on."
    return None


def make_card_results(results: Mapping[str, Any], data_name: str | None) -> tuple[CardResult, ...]:
    scores = _read_best(results)
    if scores is None:
        return ()
    shown = {name: value for name, value in asdict(scores).items() if name.endswith("_r1")}
    held_out = f"{scores.num_images} images held out of the alignment"
    notes = results["held_out"]
    if notes["maybe_trained_on"]:
        held_out += SEEN
    if "refit" in results:
        held_out += REFITTED
    elif not notes["maybe_trained_on"]:
        held_out += _name_groups(notes["groups"])
    dataset = held_out if data_name is None else f"{data_name}, {held_out}"
    return (CardResult("retrieval", dataset, shown),)


def _name_groups(groups: str) -> str:
    return f", groups {groups}"


def _describe_weights(results: Mapping[str, Any]) -> str:
    """Name the weights that were written; the last loss is that of the last step."""
    held_out, refit = results["held_out"], results.get("refit")
    if refit is not None:
        return f"fitted once more on all {refit['num_records']:,} records, the held-out ones too"
    steps, loss = results["steps"], results["final_loss"]
    if held_out is not None and (held_out["best_step"], held_out["best_share"]) != (steps, 1):
        return f"with {_name_weights(held_out, steps)}"
    if not steps:
        return "with the weights of the start"
    counted = "1 step" if steps == 1 else f"{steps} steps"
    return f"after {counted}" + ("" if loss is None else f", loss {loss:.4f}")


def _name_weights(held_out: Mapping[str, Any], steps: int) -> str:
    step, share = held_out["best_step"], held_out["best_share"]
    if not step:
        return "the weights of the start"
    between = "" if share == 1 else f"{share:.0%} of the way from the start to "
    return f"{between}the weights of step {step} of {steps}"


def _got_worse(results: Mapping[str, Any]) -> bool:
    losses = _read_objective(results)
    return losses is not None and losses["after"] > (1 + _CHANCE_RISE) * losses["before"]


def _read_objective(results: Mapping[str, Any]) -> dict[str, float] | None:
    """Read the loss of a batch before and after the last fit; None where it was not measured."""
    losses: dict[str, float] | None = results.get(
        "refit_objective" if "refit" in results else "objective"
    )
    return losses


def _describe_objective(results: Mapping[str, Any]) -> list[str]:
    losses = _read_objective(results)
    if losses is None:
        return []
    line = f"Loss of a training batch: {losses['before']:.3f} at the start, {losses['after']:.3f} "
    return [line + "at the end.", *([WORSE] if _got_worse(results) else [])]


def _read_best(results: Mapping[str, Any]) -> HeldOutScores | None:
    held_out = results["held_out"]
    return None if held_out is None else HeldOutScores(**held_out["best"])


def _describe_held_out(results: Mapping[str, Any]) -> list[str]:
    after = _read_best(results)
    if after is None:
        return [
            "The alignment held out no images: nothing shows how good the model is on others. It "
            "keeps its last weights."
        ]
    notes = results["held_out"]
    before = HeldOutScores(**notes["before"])
    lines = [
        f"R@1 among {after.num_images} held-out images and {after.num_texts} captions "
        "(text to image, image to text), with 95 % intervals:",
        f"  at the start  {_show(before)}",
        f"  chosen        {_show(after)}",
        f"  chance        {after.chance_t2i_r1:6.1%} {'':15}{after.chance_i2t_r1:6.1%}",
        f"The lowest held-out loss chose {_name_weights(notes, results['steps'])}.",
    ]
    if (after.t2i_r1 + after.i2t_r1) < (before.t2i_r1 + before.i2t_r1):
        is_within = (
            after.t2i_r1 >= before.find_interval(before.t2i_r1)[0]
            and after.i2t_r1 >= before.find_interval(before.i2t_r1)[0]
        )
        lines.append(LOWER if is_within else CLEARLY_LOWER)
    if "refit" in results:
        lines.append(
            "Then all of it was fitted once more on all images: the scores above are of the model "
            "before that. The one that is written has seen these images; they estimate its scores "
            "on others."
        )
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
    return lines + describe_errors(state["counts"], state["places"])


def _describe_start(start: Mapping[str, Any]) -> str:
    cca = start["cca"]
    if cca is not None:
        return (
            f"canonical correlation of {cca['num_pairs']:,} pairs, shrinkage "
            f"{cca['text_shrinkage']:g} for texts and {cca['image_shrinkage']:g} for images"
        )
    return "the model's projections" if start["is_trained"] else "random projections"


def _show(scores: HeldOutScores) -> str:
    shown = ""
    for ratio in (scores.t2i_r1, scores.i2t_r1):
        low, high = scores.find_interval(ratio)
        shown += f"{ratio:6.1%} [{low:5.1%},{high:6.1%}] "
    return f"{shown} loss {scores.loss:.3f}"


def write_image_summary(
    source: Path, folder: Path, data: RunData, config: AlignConfig, *, name: str | None
) -> dict[str, Any] | None:
    """Write which images a model was trained on, beside those that its source was trained on.

    They are those of the dataset, held-out ones included; of a stream, whose images are gone by
    then, the held-out ones. A seeded sample of them is read from the image store, or encoded by
    the model that was written.
    """
    known = read_training_images(source)
    is_same_tower = config.vision_training == "frozen" or (
        fingerprint_vision(source) == fingerprint_vision(folder)
    )
    new = _summarize(folder, data, config, name=name or _UNNAMED)
    if new is None:
        if not is_same_tower:  # what is known of other weights would be wrong for these
            (folder / TRAINING_IMAGES_FILE).unlink(missing_ok=True)
        return None
    if known is None or not is_same_tower:
        earlier = () if known is None else known.list_names()
        summary = TrainingImages((new,), not_summarized=earlier)
    else:
        summary = known.add(new)
    write_training_images(folder, summary)
    return {"name": new.name, "num_images": new.num_images, "num_measured": new.num_measured}


def _summarize(
    folder: Path, data: RunData, config: AlignConfig, *, name: str
) -> DatasetSummary | None:
    if isinstance(data, RecordData):
        dataset = data.dataset
    elif data.held_out is not None:
        dataset = data.held_out.dataset
    else:
        return None
    is_stored = dataset.image_store is not None
    items = sample_images(dataset.records, _STORED_SAMPLE if is_stored else _ENCODED_SAMPLE)
    is_first_part = choose_first_part(dataset.records, items)
    if min(is_first_part.sum(), (~is_first_part).sum()) < FEWEST_JUDGED:
        return None
    if dataset.image_store is not None:
        vision_embeds = dataset.image_store.read(dataset.image_rows(items))
    else:
        model = LLM2CLIPVisionModel.from_pretrained(folder, local_files_only=True).eval()
        model.to(choose_device(config.device))
        images = list(dataset.records.select(items).iterate_images())
        vision_embeds = encode_images(model, dataset.processor, images, project=False)
    return summarize_images(
        vision_embeds,
        is_first_part,
        name=name,
        num_images=count_images(dataset.records),
    )


def sample_images(records: RecordTable, size: int) -> Array:
    """Sample different images: the same ones in the same order, whatever the order of the records.

    Memory does not grow with the number of records.
    """
    chosen, items = np.empty(0, np.uint64), np.empty(0, np.int64)
    start = 0
    for keys in records.iterate_numbers("name_key"):
        rows = np.arange(start, start + len(keys))
        start += len(keys)
        chosen, firsts = np.unique(
            np.concatenate([chosen, mix(_OF_ORDER, keys)]), return_index=True
        )
        chosen, items = chosen[:size], np.concatenate([items, rows])[firsts[:size]]
    return items


def choose_first_part(records: RecordTable, items: Array) -> Array:
    """Choose about half of the groups of some images, whatever the order of the records."""
    groups = mix(_OF_PARTS, records.read_numbers("group_key", items))
    chosen: Array = groups % np.uint64(2) == 0
    return chosen


def count_images(records: RecordTable) -> int:
    """Count the different images of a dataset, whatever the languages of their captions."""
    return count_distinct(partial(records.iterate_numbers, "name_key"), len(records))
