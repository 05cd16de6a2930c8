"""Writes model folders, for build, finetune-llm, align, convert and export alike.

A folder loads through AutoModel, pipelines and sentence-transformers. It is complete or absent:
everything is written into a temporary folder beside the target, which is renamed at the end.
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
from .model_loading import MODEL_CLASSES, find_model_class, load_model, load_partial_model
from .training_images import TRAINING_IMAGES_FILE, read_training_images
from .weights import LazyTensor, open_model_weights, require_disk_space, write_weights

# As transformers has it; the Hub takes files up to 50 GB.
SHARD_SIZE = "50GB"
_LEGAL_FILE = re.compile(r"(licen[cs]e|notice|use_policy|copying|copyright)\b.*", re.IGNORECASE)

SavedModel: TypeAlias = LLM2CLIPModel | LLM2CLIPTextModel | LLM2CLIPVisionModel
LoadedModel: TypeAlias = tuple[SavedModel, LLM2CLIPProcessor]
Source: TypeAlias = str | Path | LoadedModel


@dataclass(frozen=True)
class LazyModel:
    """A model whose weights are read, or computed, while they are written, in their dtypes.

    `golden_source` is the folder of a model with the same LLM, whose recorded caption embeddings
    are copied; without it, the LLM is loaded to record them.
    """

    model_class: Any
    config: LLM2CLIPConfig
    weights: Mapping[str, LazyTensor]
    golden_source: Path | None = None


def cast_weights(
    weights: Mapping[str, LazyTensor], dtype: torch.dtype, model_class: Any
) -> dict[str, LazyTensor]:
    """Cast floating-point weights as loading a model in another dtype would."""
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

    A text-only or vision-only model keeps the whole processor. Memory holds one file of a lazy
    model, which is loaded on `device` for its golden embeddings. `files` maps a path in the folder
    to a file to copy or a text. `verify` is called with the complete folder before it is renamed;
    whatever it raises leaves nothing. Without `instructions` those in the model's configuration are
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
            place = unfinished / file
            place.parent.mkdir(exist_ok=True)
            if isinstance(content, Path):
                shutil.copy2(content, place)
            else:
                place.write_text(content, encoding="utf-8")
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
    """Write a model folder anew with some of its weights replaced.

    The LLM is neither built nor loaded, unless its weights are replaced. Instructions, licenses,
    training data and the record of a conversion are carried over; old results are not, since they
    were measured with other weights. Where the LLM is unchanged and the source has no golden
    embeddings of it, none are recorded.

    Trained weights get the dtype that they had in the source. `measure` is called with the complete
    folder before it is renamed, and returns results and caution for its card, which also says what
    texts the training kept (`kept_texts`).
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


def require_intact(source: Path, *, with_llm: bool) -> None:
    """Refuse to train a whole model that no longer gives its golden embeddings, or is damaged.

    Without the LLM the text adapter starts from the recorded caption embeddings. The folder that is
    written takes these over, so that `check_model` still sees a damaged LLM there.
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
    """Load a folder that was just written, and require the embeddings of the model in memory."""
    try:
        compare_golden(folder, *load_model(folder, device=device))
    except ValueError as error:
        raise ValueError(
            f"The model is not saved: loaded again, it is not the one that was written. {error}"
        ) from error


def open_model(source: Path) -> LazyModel:
    config = LLM2CLIPConfig.from_pretrained(source, local_files_only=True)
    return LazyModel(find_model_class(source), config, open_model_weights(source))


def find_carried_files(source: Path, *, trained_since: bool = False) -> dict[str, Path]:
    """Find the files that a new folder carries over: legal ones, records, summary of images.

    A link that leads out of the folder is refused. `trained_since` means that the weights were
    trained after those records.
    """
    legal = {p.name: p for p in source.iterdir() if p.is_file() and is_legal_file(p.name)}
    summary = source / TRAINING_IMAGES_FILE
    names = (RECORD_FILE, RECORD_BEFORE_TRAINING)
    records = {name: source / name for name in names if (source / name).is_file()}
    if trained_since and records:
        records = {RECORD_BEFORE_TRAINING: next(iter(records.values()))}
    carried = {**legal, **records}
    carried |= {summary.name: summary} if summary.is_file() else {}
    require_inside(source, carried.values())
    return carried


def explain_incomplete(folder: Path) -> str | None:
    """Name the missing files of a trainer's checkpoint and the remedy; None if it is complete."""
    if (folder / GOLDEN_FILE).is_file():
        return None
    return (
        f"{folder} has no golden embeddings ({GOLDEN_FILE}): a trainer or `save_pretrained` wrote "
        "it, without the licenses, the training data and the summary of the training images. "
        f"Write a complete folder with `llm2clip export {shlex.quote(str(folder))} COMPLETE "
        "--license LICENSE --training-data NAME`."
    )


def is_legal_file(name: str) -> bool:
    """Return whether a file is named like a license or a notice, which every copy needs."""
    return _LEGAL_FILE.fullmatch(name) is not None


def require_inside(folder: Path, files: Iterable[Path]) -> None:
    """Refuse to copy files that are links out of their folder."""
    links = [f"{file.name} -> {file.resolve()}" for file in files if not is_inside(file, folder)]
    if links:
        raise ValueError(
            f"{folder} has links that lead out of it: {', '.join(links)}. What they lead to is not "
            "copied: put copies of the files in their places, or remove the links."
        )


def _require_own_class(model: Any) -> None:
    """Refuse another class than the package's, whose code is the folder's."""
    if isinstance(model, LazyModel):
        return
    actual = type(model)
    if actual.__name__ in MODEL_CLASSES and actual.__module__.endswith("modeling_llm2clip"):
        return
    remedy = (
        "Merge the LoRA into it first (merge_and_unload)."
        if hasattr(model, "merge_and_unload")
        else "A subclass must be published with code of its own (save_pretrained)."
    )
    raise ValueError(
        f"The model is a {actual.__name__}; a model folder takes {sorted(MODEL_CLASSES)}. {remedy}"
    )


def _save_lazy_model(model: LazyModel, folder: Path, *, max_shard_size: int | str) -> None:
    """Write the same files as `save_pretrained` of a loaded model. The configuration comes last, so
    that a folder whose writer was killed does not load without all weights.
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
    gc.collect()  # what verifies the folder may load the model again


@dataclass(frozen=True)
class StageSource:
    """The folder of the model that a stage works on, and its name as the user gave it."""

    folder: Path
    name: str


@contextmanager
def open_source(source: Source, output: Path) -> Iterator[StageSource]:
    """Give the folder of a model; the processes of a launcher must have joined.

    A loaded pair is written to a temporary folder beside the output, so that a stage works on
    exactly these weights, knows them by their hash, and leaves the pair as it is. Licenses and
    training data are taken from the card of the folder that it was loaded from.
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
