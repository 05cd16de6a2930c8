"""`llm2clip evaluate`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .._extras import CLIP_TOKENS, require
from .._suggestions import counted, escape_controls
from ..configs.config_fields import ImageLimitsConfig
from ..configs.evaluation_config import (
    EvaluatedDataset,
    EvaluatedModel,
    EvaluationConfig,
    ModelType,
)
from .command import command
from .options import use_device, use_image_limits

if TYPE_CHECKING:
    from ..evaluation.results import Result

# Files that identify models and embeddings without a transformers config.json.
_OTHERS = ("open_clip_config.json", "modules.json", "texts.safetensors", "images.safetensors")


@command(
    group="Use",
    examples=(
        "llm2clip evaluate my-model --datasets emoji --tasks cross-lingual",
        "llm2clip evaluate my-model openai/clip-vit-base-patch16 --datasets coco=FOLDER "
        "--tasks retrieval cra",
        "llm2clip evaluate ours=my-model theirs=other --datasets photos=my-images "
        "drawings=other-images",
        "llm2clip evaluate --table text --output evaluation",
        "llm2clip evaluate",
    ),
)
def evaluate(
    *models: str,
    datasets: tuple[str, ...] = (),
    tasks: tuple[str, ...] = (),
    image_dir: tuple[str, ...] = (),
    table: Literal["text", "markdown"] | None = None,
    model_type: tuple[ModelType, ...] = (),
    limits: ImageLimitsConfig,
    config: EvaluationConfig,
) -> int:
    """Scores models on datasets side by side; without arguments, lists datasets and tasks.

    Args:
        models: [NAME=]SOURCE: folder or Hub id of an LLM2CLIP, CLIP, SigLIP, SigLIP2, open_clip
            or sentence-transformers model, or a folder of embeddings.
        datasets: Known datasets as NAME or NAME=FOLDER; your own captioned images as FOLDER, or as
            NAME=FOLDER to name them in tables. Required with a model.
        tasks: Tasks to evaluate. Default: the default task for each dataset's type.
        image_dir: NAME=FOLDER: name of a dataset and folder of its images. Default: the dataset's
            own folder.
        table: Format of the table of all results in --output; without a model, only the table is
            printed. Default: text.
        model_type: Type of all models, or one per model. Default: detected from their files.
        limits: Limits on the images to decode.
        config: Options for reading datasets and running models.
    """
    if not (models or datasets or tasks or table):
        _print_lists()
        return 0
    require(*([CLIP_TOKENS] if "length" in tasks else []))
    if models:
        _require_models(models, datasets, model_type)
        use_image_limits(limits)
        use_device(config.device, config.dtype)
        from ..evaluation.evaluate import evaluate as run

        chosen = _choose_datasets(datasets, image_dir)
        scored = _choose_models(models, model_type)
        run(scored, chosen, config, tasks=tasks, on_result=_print_result)
    elif table is None:
        raise ValueError("Nothing to evaluate. Pass a MODEL and --datasets, or --table text.")
    _show_results(config.output, table=table or "text")
    return 0


def _show_results(output: Path, *, table: Literal["text", "markdown"]) -> None:
    from ..evaluation.report import render_results
    from ..evaluation.results import read_evaluation_results

    results = read_evaluation_results(output)
    print()
    print(escape_controls(render_results(results, style=table)))
    print(f"The files in {output} record what the scores depend on.", file=sys.stderr)


def _require_models(
    models: Sequence[str], datasets: Sequence[str], model_type: Sequence[ModelType]
) -> None:
    """Raise ValueError for models that cannot be evaluated, before heavy imports."""
    from ..model_folders.model_folder import find_model_type, is_hub_id, require_there

    if not datasets:
        raise ValueError("Evaluation needs at least one model and one dataset (--datasets).")
    for _, source in map(_read_model, models):
        path = Path(source)
        if not path.exists() and not is_hub_id(source):  # the Hub is queried after all other checks
            require_there(source)
        has_other = any((path / name).exists() for name in _OTHERS)
        if not path.is_dir() or model_type or has_other:
            continue
        detected = find_model_type(path)
        if detected is not None and detected.content in ("above", "lora", "text", "vision"):
            raise ValueError(f"{detected.advice} It has nothing to evaluate.")


def _choose_datasets(datasets: Sequence[str], image_dir: Sequence[str]) -> list[EvaluatedDataset]:
    from ..evaluation.datasets.dataset_registry import parse_dataset

    images = dict(_split(text, flag="--image-dir") for text in image_dir)
    try:
        chosen = [parse_dataset(text) for text in datasets]
    except ValueError as error:
        raise ValueError(f"--datasets {error}") from error
    chosen = [replace(item, image_dir=images.pop(item.name, None)) for item in chosen]
    if images:
        raise ValueError(f"--image-dir has datasets that --datasets lacks: {sorted(images)}.")
    return chosen


def _choose_models(models: Sequence[str], model_type: Sequence[ModelType]) -> list[EvaluatedModel]:
    named = [_read_model(text) for text in models]
    if len(model_type) not in (0, 1, len(named)):
        raise ValueError(
            f"--model-type has {len(model_type)} values for {counted(len(named), 'model')}. Pass "
            "one for all models, or one per model in the same order."
        )
    kinds = cycle(model_type or [None])
    return [
        EvaluatedModel(source=source, name=name, model_type=kind)
        for (name, source), kind in zip(named, kinds, strict=False)
    ]


def _read_model(text: str) -> tuple[str, str]:
    """Split NAME=SOURCE; an existing path is never split."""
    if Path(text).exists() or "=" not in text:
        return "", text
    return _split(text, flag="MODEL")


def _split(text: str, *, flag: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not (name and sign and value):
        raise ValueError(f"{flag} must be NAME=FOLDER, not {text!r}.")
    return name, value


def _print_lists() -> None:
    from ..evaluation.datasets.dataset_registry import list_datasets
    from ..evaluation.tasks.task_registry import TASKS

    print("Datasets (--datasets NAME=FOLDER):")
    for spec in list_datasets():
        print(f"  {spec.describe()}")
        print(f"      license: {spec.license}; from {spec.source}; files: {spec.files}")
    print("Tasks (--tasks NAME):")
    for task in TASKS.values():
        print(
            f"  {task.name}: {task.title}; for datasets of type {' or '.join(task.dataset_types)}"
        )


def _print_result(result: Result) -> None:
    from ..evaluation.report import describe_scores

    print(
        f"{result.model}: {result.task} on {result.dataset}: {describe_scores(result)}; "
        f"{result.seconds:.1f} s",
        file=sys.stderr,
    )
