"""Checks of a recipe before anything is computed, for errors that would show hours later."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..building.pretrained_towers import EMBEDDED
from ..configs.train_config import TrainConfig
from ..data.atomic_files import hash_file, hash_json
from ..data.records.data_hashes import hash_image_sizes, hash_records
from ..data.records.records import CaptionedImage
from ..data.remote.remote_files import is_remote
from ..evaluation.evaluate import check_data as check_eval_data
from ..model_folders.model_folder import LORA_WEIGHTS, require_sources
from ..training.alignment.align_checks import check_data, check_options
from ..training.finetuning.finetune_llm import check_finetuning
from ..training.losses.loss import load_loss
from ..training.trainer_mixins import choose_reports
from .recipe_plan import RecipePaths, Split, is_complete, list_eval_data, uses_stores

# Images whose content is read to compare the data of two calls; all sizes are compared.
_IMAGES_READ = 1000
# The same of a tower's files: small ones whole, of larger ones this many blocks.
_WHOLE_BYTES, _BLOCK_BYTES, _BLOCKS_READ = 1 << 28, 1 << 16, 1024


def identify_data(config: TrainConfig, split: Split) -> dict[str, Any]:
    """Identify what a recipe reads: towers of this machine, records, images, text pairs, a LoRA."""
    train, test = split
    finetune = config.finetune
    files = [Path(file) for file, _ in finetune.text_pairs] if finetune else []
    if finetune and finetune.init_lora:
        files.append(finetune.init_lora / LORA_WEIGHTS)
    return {
        "train": hash_records(train),
        "test": hash_records(test),
        "train_images": _identify_images(train),
        "test_images": _identify_images(test),
        "files": {str(file): hash_file(file) if file.is_file() else None for file in files},
        "towers": {
            name: _identify_source(source)
            for name, source in (
                ("vision_model", config.vision_model),
                ("text_model", config.text_model),
                ("lora", config.build.lora),
            )
        },
    }


def _identify_source(source: str | Path | None) -> str | None:
    """Hash the files of a local tower or LoRA but its card; None for one of the Hub."""
    if source is None or not Path(source).exists():
        return None
    files = [Path(source)] if Path(source).is_file() else sorted(Path(source).iterdir())
    kept = [f for f in files if f.is_file() and f.suffix != ".md" and not f.name.startswith(".")]
    return hash_json([[file.name, _hash_sample(file)] for file in kept])


def _hash_sample(file: Path) -> str:
    size = file.stat().st_size
    if size <= _WHOLE_BYTES:
        return hash_file(file)
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as opened:
        for start in np.linspace(0, size - _BLOCK_BYTES, _BLOCKS_READ).astype(int).tolist():
            opened.seek(start)
            digest.update(opened.read(_BLOCK_BYTES))
    return digest.hexdigest()


def _identify_images(records: Sequence[CaptionedImage]) -> dict[str, str]:
    """Hash the sizes of all images, and the content of some, which are evenly spread."""
    digest = hashlib.sha256()
    rows = np.linspace(0, len(records) - 1, min(len(records), _IMAGES_READ)).astype(int)
    for image in dict.fromkeys(records[row].image for row in rows.tolist()):
        if image is not None and not is_remote(str(image)):
            digest.update(hashlib.sha256(image.read_bytes()).digest())
    return {"sizes": hash_image_sizes(records), "content": digest.hexdigest()}


def check_recipe(config: TrainConfig, split: Split) -> None:
    """Refuse what a stage of a recipe would refuse; what is finished is not checked again."""
    errors = []
    for check in _list_checks(config, split):
        try:
            check()
        except ValueError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ValueError("\n".join(map(str, errors)))


def _list_checks(config: TrainConfig, split: Split) -> Iterator[Callable[[], object]]:
    paths = RecipePaths(config.output)
    train, test = split
    if not is_complete(paths.built):
        yield lambda: _check_towers(config)
    finetune, align = config.finetune, config.align
    if finetune is not None:
        yield lambda: choose_reports(finetune.report_to)
        if not is_complete(paths.fine_tuned / "model"):
            yield lambda: check_finetuning(train, finetune)
    captions, images = uses_stores(config)
    yield lambda: check_options(align, has_caption_store=captions, has_image_store=images)
    yield lambda: load_loss(align.loss)
    yield lambda: choose_reports(align.report_to)
    if not is_complete(paths.aligned / "model"):
        yield lambda: check_data(train, align)
    if data := list_eval_data(config, test):
        yield lambda: check_eval_data(data, config.evaluate, tasks=config.eval_tasks)


def _check_towers(config: TrainConfig) -> None:
    if config.text_model != EMBEDDED:
        config.build.require_prompt()
    require_sources(
        vision=None if config.vision_model == EMBEDDED else config.vision_model,
        text=None if config.text_model == EMBEDDED else config.text_model,
        lora=config.build.lora,
    )
