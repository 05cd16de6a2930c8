"""Write model folders, for build, finetune-llm, align, convert and export alike.

A folder loads through AutoModel, pipelines and sentence-transformers. It is either complete or
absent: everything is written to a temporary folder next to the target, and this folder is renamed
at the end.
"""

from __future__ import annotations

import gc
import re
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .._suggestions import list_first
from ..base_llm2clip import (
    _CODE_OF_EVERY_FOLDER,
    check_instructions,
    read_instructions,
    write_sentence_transformers_files,
)
from ..configuration_llm2clip import LLM2CLIPConfig
from ..data.atomic_files import atomic_folder, clear_leftovers, require_new_folder
from ..heads_llm2clip import TOWERS, list_random, sample_heads
from ..loading_llm2clip import list_model_files
from ..modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel, LLM2CLIPVisionModel
from ..processing_llm2clip import LLM2CLIPProcessor
from .golden_embeddings import GOLDEN_FILE, compare_golden, require_golden, write_golden
from .model_card import CardData, CardResult, read_card_data, read_card_of_trained, write_model_card
from .model_folder import (
    RECORD_BEFORE_TRAINING,
    RECORD_FILE,
    find_model_folder,
    is_inside,
    list_uploaded_files,
)
from .model_loading import (
    MODEL_CLASSES,
    PartialModel,
    find_model_class,
    load_model,
    load_partial_model,
    read_file_states,
)
from .training_images import TRAINING_IMAGES_FILE, read_training_images, write_training_images
from .weights import LazyTensor, open_model_weights, require_disk_space, write_weights

# transformers' default; the Hub accepts files up to 50 GB.
SHARD_SIZE = "50GB"
_LEGAL_FILE = re.compile(r"(licen[cs]e|notice|use_policy|copying|copyright)\b.*", re.IGNORECASE)

SavedModel: TypeAlias = LLM2CLIPModel | LLM2CLIPTextModel | LLM2CLIPVisionModel
LoadedModel: TypeAlias = tuple[SavedModel, LLM2CLIPProcessor]
Source: TypeAlias = str | Path | LoadedModel


@dataclass(frozen=True)
class LazyModel:
    """A model whose weights are read or computed only while being written, in their own dtypes.

    `golden_source` is the folder of a model with the same LLM, whose recorded caption embeddings
    are copied. Without `golden_source`, the LLM is loaded to record caption embeddings.
    """

    model_class: Any
    config: LLM2CLIPConfig
    weights: Mapping[str, LazyTensor]
    golden_source: Path | None = None


def cast_weights(
    weights: Mapping[str, LazyTensor], dtype: torch.dtype, model_class: Any
) -> dict[str, LazyTensor]:
    """Cast floating-point weights the way loading the model in another dtype casts them."""
    exact = model_class._keep_in_fp32_modules_strict or ()
    return {
        name: tensor.then(lambda value: value.to(dtype))
        if tensor.dtype.is_floating_point and not any(part in name for part in exact)
        else tensor
        for name, tensor in weights.items()
    }


def save_model(
    model: SavedModel | LazyModel,
    processor: LLM2CLIPProcessor,
    folder: str | Path,
    *,
    instructions: Mapping[str, str] | None = None,
    card: CardData | None = None,
    name: str | None = None,
    files: Mapping[str, Path | str] | None = None,
    max_shard_size: int | str = SHARD_SIZE,
    device: str = "cpu",
    verify: Callable[[Path], None] | None = None,
) -> Path:
    """Write a complete model folder: weights, code, processor, golden embeddings and card.

    A text-only or vision-only model keeps the whole processor. A lazy model is written one file at
    a time, then loaded on `device` for its golden embeddings. `files` maps a path in the folder to
    a file to copy or to a text. `verify` is called with the complete folder before it is renamed;
    if it raises, no folder is left. Without `instructions`, the configuration's instructions are
    kept.
    """
    _require_own_class(model)
    config: LLM2CLIPConfig = model.config
    instructions = config.instructions if instructions is None else dict(instructions)
    check_instructions(
        processor.tokenizer,
        instructions,
        num_suffix=len(config.prompt_suffix_ids),
        max_text_length=config.max_text_length,
    )
    folder = Path(folder)
    if isinstance(model, LazyModel):
        folder.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(folder)
        require_disk_space(model.weights, folder.parent)
    with atomic_folder(folder) as unfinished:
        processor.save_pretrained(unfinished)
        for file, content in (files or {}).items():
            target = unfinished / file
            target.parent.mkdir(exist_ok=True)
            if isinstance(content, Path):
                shutil.copy2(content, target)
            else:
                target.write_text(content, encoding="utf-8")
        previous, config.instructions = config.instructions, instructions
        try:
            if isinstance(model, LazyModel):
                _save_lazy_model(model, unfinished, max_shard_size=max_shard_size)
            else:
                model.save_pretrained(unfinished, max_shard_size=max_shard_size)
        finally:
            config.instructions = previous
        _write_golden(unfinished, model, processor, device=device)
        write_model_card(unfinished, card or CardData(), name=name or folder.name)
        if verify is not None:
            verify(unfinished)
    return folder


def save_trained_model(
    source: Path,
    trained: Mapping[str, Tensor],
    folder: str | Path,
    *,
    training_data: Sequence[str] = (),
    languages: Sequence[str] = (),
    kept_texts: str | None = None,
    measure: Callable[[Path], tuple[Sequence[CardResult], str | None]] | None = None,
) -> Path:
    """Write a copy of a model folder with some of its weights replaced.

    The LLM is neither built nor loaded unless its weights are replaced. Instructions, licenses, the
    list of training data and the record of a conversion are carried over; old results are not,
    because they were measured with other weights. If the LLM is unchanged and the source has no
    recorded caption embeddings, no golden embeddings are recorded.

    Trained weights are saved in the dtype that they have in the source. `measure` is called with
    the complete folder before it is renamed, and returns the results and the caution for the
    folder's card. The card also states which texts the training kept close (`kept_texts`).
    """
    require_new_folder(Path(folder))
    keeps_llm = not any(name.startswith("text_model.") for name in trained)
    require_intact(source, with_llm=not keeps_llm)
    model = open_model(source)
    replaced = {
        name: LazyTensor.of(value.to(model.weights[name].dtype)) for name, value in trained.items()
    }
    weights = {**model.weights, **replaced}
    before, now = (
        sample_heads((n, w.read()) for n, w in part.items() if not n.startswith(TOWERS))
        for part in (model.weights, weights)
    )
    model.config.random_heads = list_random(model.config.random_heads, before, now)
    card = replace(read_card_of_trained(source, training_data, languages), kept_texts=kept_texts)

    def measure_and_state(unfinished: Path) -> None:
        if measure is not None:
            results, warning = measure(unfinished)
            measured = replace(card, results=tuple(results), caution=warning)
            write_model_card(unfinished, measured, name=Path(folder).name)

    return save_model(
        replace(
            model,
            weights=weights,
            golden_source=source if keeps_llm else None,
        ),
        LLM2CLIPProcessor.from_pretrained(source),
        folder,
        instructions=read_instructions(source),
        card=card,
        files=find_carried_files(source, trained_since=True),
        max_shard_size=max(file.stat().st_size for file in list_model_files(source)),
        verify=measure_and_state,
    )


def save_heads(
    model: LLM2CLIPModel, folder: str | Path, *, training_data: Sequence[str] = ()
) -> Path:
    """Write the whole model that `load_heads` was called on, with the heads as they are now.

    The towers are copied from its folder. The new folder is complete: code, processor, licenses,
    golden embeddings and card. The images of your own training loop are unknown, so the summary of
    the training images only lists their names.

    Args:
        model: Model from `load_heads`.
        folder: Folder to write; must be new.
        training_data: Names of the data that the heads were trained on, for the model card.

    Returns:
        The folder.

    Raises:
        FileExistsError: `folder` exists.
        TypeError: The model was not loaded by `load_heads`.
        ValueError: The weights are not finite or have other names, or the folder that the model was
            loaded from is gone, damaged or changed.

    Examples:
        >>> model = load_heads("my-model")
        >>> save_heads(model, "trained-model")  # doctest: +SKIP
    """
    if not isinstance(model, PartialModel):
        raise TypeError(
            f"save_heads needs a model from load_heads, not a {type(model).__name__} with its own "
            "towers. Save that one with save_pretrained."
        )
    trained = {n: w.cpu() for n, w in model.state_dict().items() if not n.startswith(TOWERS)}
    source = find_model_folder(str(model.name_or_path))
    if read_file_states(source) != model.loaded_files:
        raise ValueError(
            f"{source} has changed since load_heads, so its towers may be those of another model. "
            "Load the heads from a folder that is not written to."
        )
    if others := trained.keys() ^ {
        n for n in open_model_weights(source) if not n.startswith(TOWERS)
    }:
        raise ValueError(
            f"The model's heads and those in {source} differ in their weights: "
            f"{list_first(sorted(others))}. Restore the modules from load_heads: not compiled, and "
            "without parametrizations."
        )
    written = save_trained_model(source, trained, folder, training_data=training_data)
    if (known := read_training_images(written)) is not None:
        names = (*known.not_summarized, *(training_data or ["unnamed data"]))
        write_training_images(written, replace(known, not_summarized=names))
    return written


def require_intact(source: Path, *, with_llm: bool) -> None:
    """Refuse to train a whole model that is damaged or no longer matches its golden embeddings.

    Without the LLM, the text adapter starts from the recorded caption embeddings. The recorded
    embeddings are copied to the new folder, so `check_model` still detects a damaged LLM there.
    """
    find_carried_files(source)
    read_training_images(source)
    require_golden(
        source,
        load_partial_model(source, with_llm=with_llm, with_vision_tower=True),
        LLM2CLIPProcessor.from_pretrained(source, local_files_only=True),
        runs_llm=with_llm,
    )


def require_as_written(folder: Path, *, device: str) -> None:
    """Load a folder that was just written, and check that it reproduces the golden embeddings."""
    try:
        compare_golden(folder, *load_model(folder, device=device))
    except ValueError as error:
        raise ValueError(
            f"The model was not saved: loaded again, it differs from the model in memory. {error}"
        ) from error


def open_model(source: Path) -> LazyModel:
    config = LLM2CLIPConfig.from_pretrained(source, local_files_only=True)
    return LazyModel(find_model_class(source), config, open_model_weights(source))


def find_carried_files(source: Path, *, trained_since: bool = False) -> dict[str, Path]:
    """Find files to carry over to a new folder: licenses, records, summary of training images.

    A link to a file outside the folder is refused. `trained_since` means that the weights were
    trained after the records were written.
    """
    legal = {p.name: p for p in source.iterdir() if p.is_file() and is_legal_file(p.name)}
    summary = source / TRAINING_IMAGES_FILE
    names = (RECORD_FILE, RECORD_BEFORE_TRAINING)
    records = {name: source / name for name in names if (source / name).is_file()}
    if trained_since and records:
        records = {RECORD_BEFORE_TRAINING: next(iter(records.values()))}
    carried = {**legal, **records, **({summary.name: summary} if summary.is_file() else {})}
    require_inside(source, carried.values())
    return carried


def explain_incomplete(folder: Path) -> str | None:
    """Name the missing files of a trainer's checkpoint and the remedy; None if it is complete."""
    if (folder / GOLDEN_FILE).is_file():
        return None
    return (
        f"{folder} has no golden embeddings ({GOLDEN_FILE}): it was written by a trainer or "
        "`save_pretrained`, without licenses, training data and summary of the training images. "
        f"Write a complete folder with `llm2clip export {shlex.quote(str(folder))} COMPLETE "
        "--license LICENSE --training-data NAME`."
    )


def is_legal_file(name: str) -> bool:
    """Return whether a file is named like a license or notice, which every copy must include."""
    return _LEGAL_FILE.fullmatch(name) is not None


def require_inside(folder: Path, files: Iterable[Path]) -> None:
    links = [f"{file.name} -> {file.resolve()}" for file in files if not is_inside(file, folder)]
    if links:
        raise ValueError(
            f"{folder} has links that lead out of it: {', '.join(links)}. They are not followed. "
            "Replace them with copies of the files, or remove them."
        )


def _require_own_class(model: Any) -> None:
    """Refuse classes other than the package's, because a folder contains the package's code."""
    if isinstance(model, LazyModel):
        return
    actual = type(model)
    if actual.__name__ in MODEL_CLASSES and actual.__module__.endswith("modeling_llm2clip"):
        return
    remedy = (
        "Merge the LoRA into it first (merge_and_unload)."
        if hasattr(model, "merge_and_unload")
        else "Publish a subclass with its own code (save_pretrained)."
    )
    raise ValueError(
        f"The model must be one of {sorted(MODEL_CLASSES)}, not a {actual.__name__}. {remedy}"
    )


def _save_lazy_model(model: LazyModel, folder: Path, *, max_shard_size: int | str) -> None:
    """Write the same files that a loaded model's `save_pretrained` would write.

    The configuration is written last, so if the process is killed, the folder does not load with
    missing weights.
    """
    write_weights(model.weights, folder, max_shard_size=max_shard_size)
    config = model.config
    config.architectures = [model.model_class.__name__]
    there = {name.partition(".")[0] for name in model.weights}
    config.random_heads = [head for head in config.random_heads if head in there]
    config.auto_map = {**_CODE_OF_EVERY_FOLDER, **model.model_class._auto_classes}
    for path in list_uploaded_files():
        shutil.copy2(path, folder / path.name)
    write_sentence_transformers_files(
        folder, instructions=config.instructions, modalities=model.model_class.input_modalities
    )
    config.save_pretrained(folder)


def _write_golden(folder: Path, model: Any, processor: LLM2CLIPProcessor, *, device: str) -> None:
    if not isinstance(model, LazyModel):
        write_golden(folder, model, processor)
        return
    if model.golden_source is not None:
        partial = load_partial_model(folder, with_vision_tower=True, device=device)
        write_golden(folder, partial, processor, source=model.golden_source)
        return
    loaded, _ = load_model(folder, device=device)
    write_golden(folder, loaded, processor)
    del loaded
    gc.collect()  # verification may load the model again


@dataclass(frozen=True)
class StageSource:
    """The folder of the model that a stage works on, and the name the user passed."""

    folder: Path
    name: str


@contextmanager
def open_source(source: Source, output: Path) -> Iterator[StageSource]:
    """Yield the model's folder. Call after the process group is initialized.

    A loaded pair is written to a temporary folder next to the output, so the stage works on exactly
    these weights, can hash them, and does not modify the pair. Licenses and training data are taken
    from the card of the folder that the pair was loaded from.
    """
    if isinstance(source, str | Path):
        yield StageSource(find_model_folder(source), str(source))
        return
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state, folders = PartialState(), [""]
    output.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if state.is_main_process:
            temporary = TemporaryDirectory(prefix=f".{output.name}-source-", dir=output.parent)
            folders = [str(_save(source, Path(stack.enter_context(temporary)) / "model"))]
        broadcast_object_list(folders)
        yield StageSource(Path(folders[0]), type(source[0]).__name__)
        state.wait_for_everyone()  # before the folder is deleted


def _save(source: LoadedModel, folder: Path) -> Path:
    model, processor = source
    origin = Path(model.name_or_path or "")
    card = None
    if (origin / "README.md").is_file():
        card = replace(read_card_data(origin), results=())
    return save_model(model, processor, folder, card=card)
