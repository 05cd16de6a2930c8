"""Checks that read files and need no model: configuration, weight files, uploaded code."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base_llm2clip import _CODE_OF_EVERY_FOLDER
from ..configuration_llm2clip import LLM2CLIPConfig
from ..data.safetensors_files import iterate_tensors
from ..loading_llm2clip import list_foreign_code, list_model_files
from ..model_folders.golden_embeddings import GOLDEN_FILE, require_recorded_files
from ..model_folders.model_folder import list_uploaded_files
from ..model_folders.model_loading import MODEL_CLASSES, describe_untrained
from ..model_folders.training_images import TRAINING_IMAGES_FILE, read_training_images
from ..model_folders.weights import open_model_weights
from ..modeling_llm2clip import LLM2CLIPModel
from .model_report import ConcernError, NotApplicableError
from .model_under_test import ModelUnderTest

# Files in which AutoProcessor looks for code before it looks in config.json. The first decides; in
# the others, what another program saved again may not name it.
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
_MAY_NAME_NO_CODE = _PROCESSOR_FILES[1:]
_NAMES_SHOWN = 8
# Of weights that are not quantized, and of masks.
_PLAIN_DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool}


def check_config(tested: ModelUnderTest) -> str:
    """Read config.json, which must be complete, of this format, and free of contradictions."""
    raw = _read_json(tested.folder / "config.json")
    if raw.get("model_type") != LLM2CLIPConfig.model_type:
        raise ValueError(
            f"config.json has model_type={raw.get('model_type')!r}, wanted "
            f"{LLM2CLIPConfig.model_type!r}. Convert or build the model first."
        )
    architecture = (raw.get("architectures") or ["nothing"])[0]
    if architecture not in MODEL_CLASSES:
        raise ValueError(
            f"config.json has architectures={raw.get('architectures')}, wanted one of "
            f"{sorted(MODEL_CLASSES)}. Save the model with save_pretrained."
        )
    config = LLM2CLIPConfig.from_pretrained(tested.folder, local_files_only=True)
    tested.config, tested.model_class = config, MODEL_CLASSES[architecture]
    direction = "bidirectional" if config.bidirectional else "causal"
    return (
        f"{architecture}, format {config.format_version}, {direction}, "
        f"{config.projection_dim} dimensions"
    )


def check_training(tested: ModelUnderTest) -> str:
    """Warn of parts with random weights."""
    if state := describe_untrained(tested.config):
        raise ConcernError(state)
    return "by its configuration, text adapter and projections are trained"


def check_training_images(tested: ModelUnderTest) -> str:
    """Read the summary of the training images, which must fit the model's vision tower."""
    summary = read_training_images(tested.folder)
    if summary is None:
        return f"there is no {TRAINING_IMAGES_FILE}, and images unlike them are not noticed"
    projection = open_model_weights(tested.folder).get("visual_projection.weight")
    if projection is not None and projection.shape[1] != summary.width:
        raise ValueError(
            f"{TRAINING_IMAGES_FILE} is of a tower of {summary.width} dimensions, and this one has "
            f"{projection.shape[1]}. Remove the file, or restore that of this model."
        )
    return ", ".join(f"{data.name} ({data.num_images:,} images)" for data in summary.datasets)


def check_weight_dtypes(tested: ModelUnderTest) -> str:
    """Require one floating-point dtype in all weight files, and float32 for the temperature."""
    dtypes = {name: tensor.dtype for name, tensor in open_model_weights(tested.folder).items()}
    if getattr(tested.config, "quantization_config", None):
        found = sorted({_name(dtype) for dtype in dtypes.values()})
        if set(dtypes.values()) <= _PLAIN_DTYPES:
            raise ValueError(
                f"config.json says that weights are quantized, but the files hold {found} only. "
                "Take quantization_config out of config.json, or save the model again."
            )
        raise NotApplicableError("the weights are quantized, so their dtypes differ by design")
    dtypes = {name: dtype for name, dtype in dtypes.items() if dtype.is_floating_point}
    temperature = {
        name: dtypes.pop(name) for name in list(dtypes) if name.startswith("logit_scale.")
    }
    errors = [
        f"{name} is {_name(dtype)}, not float32"
        for name, dtype in temperature.items()
        if dtype != torch.float32
    ]
    common = Counter(dtypes.values()).most_common(1)[0][0] if dtypes else None
    odd = sorted(f"{name} ({_name(dtype)})" for name, dtype in dtypes.items() if dtype != common)
    if odd:
        errors.append(
            f"{len(odd)} of {len(dtypes)} weights are not {_name(common)}: {odd[:_NAMES_SHOWN]}"
        )
    stated = getattr(tested.config, "dtype", None)
    if stated is not None and common != stated:
        errors.append(f"config.json has {_name(stated)}, the weights are {_name(common)}")
    if errors:
        raise ValueError("; ".join(errors) + ". Load the model in one dtype and save it again.")
    return f"{len(dtypes)} weights are {_name(common)}"


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def check_finite_weights(tested: ModelUnderTest) -> str:
    """Look for NaN and infinity in every weight."""
    count, errors = 0, []
    for name, tensor in iterate_tensors(list_model_files(tested.folder)):
        count += 1
        # One-byte floats have no isfinite of their own.
        wide = tensor.float() if tensor.element_size() == 1 else tensor
        if not _is_finite(wide):
            bad_rows = (~wide.isfinite()).reshape(len(wide) if wide.ndim else 1, -1).any(dim=1)
            row = int(bad_rows.long().argmax())
            errors.append(
                f"{name} has NaN or infinity in {int(bad_rows.sum())} rows (first: {row})"
            )
    if errors:
        raise ValueError(
            f"{'; '.join(errors[:_NAMES_SHOWN])} ({len(errors)} of {count} tensors). "
            "Take the last training checkpoint without them, or download the files again."
        )
    return f"{count} tensors without NaN or infinity"


def check_remote_code(tested: ModelUnderTest) -> str:
    """Compare the folder's code with the installed package, and the code that its files name."""
    folder = tested.folder
    wanted = {path.name: path for path in list_uploaded_files()}
    config = _read_json(folder / "config.json")
    inside = _find_code_inside(folder)
    brings_code = config.get("auto_map") or inside
    if not brings_code and not any((folder / name).exists() for name in wanted):
        raise NotApplicableError("the folder brings no code; it needs the installed package")
    missing = sorted(name for name in wanted if not (folder / name).is_file())
    altered = sorted(
        name
        for name, path in wanted.items()
        if name not in missing and (folder / name).read_bytes() != path.read_bytes()
    )
    errors = [
        f"{what}: {names}" for what, names in (("altered", altered), ("missing", missing)) if names
    ]
    errors += [
        error
        for name, entries in _list_code_entries(folder, config).items()
        for error in _find_map_errors(name, _read_json(folder / name).get("auto_map"), entries)
    ] + inside
    if errors:
        raise ValueError(
            f"The folder's code is not the installed package's ({'; '.join(errors)}). Others would "
            "get embeddings from other code than you: save the model again with this package, or "
            "install the version that wrote the folder."
        )
    return f"{len(wanted)} files equal the installed package, and its classes are named"


def check_recorded_files(tested: ModelUnderTest) -> str:
    """Compare the files with those that the golden embeddings were computed with."""
    if not require_recorded_files(tested.folder):
        raise NotApplicableError(f"{GOLDEN_FILE} is absent, or records no files")
    return "the files that decide embeddings are those that the folder was written with"


def _find_code_inside(folder: Path) -> list[str]:
    """Find code that is named below the top level of a file, for a tower or the image processor."""
    contents = {
        name: list(_read_json(folder / name).items())
        for name in ("config.json", *_PROCESSOR_FILES)
        if (folder / name).is_file()
    }
    found = {
        name: list_foreign_code([value for key, value in content if key != "auto_map"])
        for name, content in contents.items()
    }
    return [f"{name} names other code inside: {refs}" for name, refs in found.items() if refs]


def _list_code_entries(folder: Path, config: dict[str, Any]) -> dict[str, dict[str, str]]:
    """List the `auto_map` that saving writes into each file that a loader reads."""
    architecture = (config.get("architectures") or [""])[0]
    model_class = MODEL_CLASSES.get(architecture, LLM2CLIPModel)
    of_processor = {"AutoProcessor": _CODE_OF_EVERY_FOLDER["AutoProcessor"]}
    return {
        "config.json": {**_CODE_OF_EVERY_FOLDER, **model_class._auto_classes},
        **{name: of_processor for name in _PROCESSOR_FILES if (folder / name).is_file()},
    }


def _find_map_errors(name: str, found: Any, wanted: dict[str, str]) -> list[str]:
    if found is not None and not isinstance(found, dict):
        return [f"auto_map of {name} is {found!r}, wanted an object"]
    found = found or {}
    strange = sorted(
        f"{auto_class}: {where}"
        for auto_class, where in found.items()
        if wanted.get(auto_class) != where
    )
    lost = sorted(set(wanted) - set(found)) if name not in _MAY_NAME_NO_CODE else []
    return [
        *([f"auto_map of {name} names other code: {strange}"] if strange else []),
        *([f"auto_map of {name} lacks {lost}"] if lost else []),
    ]


def _is_finite(tensor: Tensor) -> bool:
    """Check the extremes, which NaN propagates to, so that no large tensor is copied."""
    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}; it is not a saved model.")
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, wanted an object.")
    return content
