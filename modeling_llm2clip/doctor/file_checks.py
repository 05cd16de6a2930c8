"""Checks that read files and need no model: settings, weight files, uploaded code."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..base_llm2clip import _CODE_OF_EVERY_FOLDER
from ..configuration_llm2clip import LLM2CLIPConfig
from ..data.safetensors_files import iterate_tensors, list_weight_files
from ..loading_llm2clip import list_foreign_code
from ..model_folders.model_folder import list_uploaded_files
from ..model_folders.training_state import describe_untrained
from ..modeling_llm2clip import (
    LLM2CLIPModel,
    LLM2CLIPTextModel,
    LLM2CLIPVisionModel,
)
from .model_report import ConcernError, NotApplicableError
from .model_under_test import ModelUnderTest

_MODEL_CLASSES = {
    cls.__name__: cls for cls in (LLM2CLIPModel, LLM2CLIPTextModel, LLM2CLIPVisionModel)
}
_FLOAT_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# Files in which AutoProcessor looks for code before it asks config.json. The first decides; what
# another program saved again may lack it in the others.
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
_MAY_NAME_NO_CODE = _PROCESSOR_FILES[1:]
_MOST_NAMED = 8


def check_config(patient: ModelUnderTest) -> str:
    """Read config.json, which must be whole, of this format, and free of contradictions."""
    raw = _read_json(patient.folder / "config.json")
    if raw.get("model_type") != LLM2CLIPConfig.model_type:
        raise ValueError(
            f"config.json has model_type={raw.get('model_type')!r}, wanted "
            f"{LLM2CLIPConfig.model_type!r}. Convert or build the checkpoint first."
        )
    architecture = (raw.get("architectures") or ["nothing"])[0]
    if architecture not in _MODEL_CLASSES:
        raise ValueError(
            f"config.json has architectures={raw.get('architectures')}, wanted one of "
            f"{sorted(_MODEL_CLASSES)}. Save the model with save_pretrained."
        )
    config = LLM2CLIPConfig.from_pretrained(patient.folder, local_files_only=True)
    patient.config, patient.model_class = config, _MODEL_CLASSES[architecture]
    direction = "bidirectional" if config.bidirectional else "causal"
    return (
        f"{architecture}, format {config.format_version}, {direction}, "
        f"{config.projection_dim} dimensions"
    )


def check_training(patient: ModelUnderTest) -> str:
    """Say which parts are random: no error of a folder, but of no use before they are trained."""
    if state := describe_untrained(patient.config):
        raise ConcernError(state)
    return "text adapter and projections are stated to be trained"


def check_weight_dtypes(patient: ModelUnderTest) -> str:
    """Find one floating dtype in all weight files, float32 for the temperature alone."""
    dtypes = _read_dtypes(patient.folder)
    if getattr(patient.config, "quantization_config", None):
        found = sorted(set(dtypes.values()))
        if {*found} <= {*_FLOAT_DTYPES, "BOOL"}:
            raise ValueError(
                f"config.json says that weights are quantised, the files hold {found} alone."
                " Take quantization_config out of config.json, or save the model again."
            )
        raise NotApplicableError("the weights are quantised, so their dtypes differ by design")
    dtypes = {name: dtype for name, dtype in dtypes.items() if dtype[0] in "FB" and dtype != "BOOL"}
    temperature = {
        name: dtypes.pop(name) for name in list(dtypes) if name.startswith("logit_scale.")
    }
    errors = [
        f"{name} is {dtype}, not F32" for name, dtype in temperature.items() if dtype != "F32"
    ]
    counts = Counter(dtypes.values())
    common = counts.most_common(1)[0][0] if counts else "nothing"
    odd = sorted(f"{name} ({dtype})" for name, dtype in dtypes.items() if dtype != common)
    if odd:
        errors.append(f"{len(odd)} of {len(dtypes)} weights are not {common}: {odd[:_MOST_NAMED]}")
    stated = getattr(patient.config, "dtype", None)
    if stated is not None and _FLOAT_DTYPES.get(common) != stated:
        errors.append(f"config.json states {stated}, the weights are {common}")
    if errors:
        raise ValueError("; ".join(errors) + ". Load the model in one dtype and save it again.")
    return f"{len(dtypes)} weights are {common}"


def _read_dtypes(folder: Path) -> dict[str, str]:
    """Dtypes of all weights, as safetensors names them, by the name of the weight."""
    dtypes = {}
    for path in list_weight_files(folder):
        with safe_open(path, framework="pt") as file:
            dtypes.update({name: file.get_slice(name).get_dtype() for name in file.keys()})
    return dtypes


def check_finite_weights(patient: ModelUnderTest) -> str:
    """Look for NaN and infinity in every weight, naming the tensor and the row."""
    count, errors = 0, []
    for name, tensor in iterate_tensors(list_weight_files(patient.folder)):
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
            f"{'; '.join(errors[:_MOST_NAMED])} ({len(errors)} of {count} tensors). "
            "Take the last checkpoint without them, or download the files again."
        )
    return f"{count} tensors without NaN or infinity"


def check_remote_code(patient: ModelUnderTest) -> str:
    """Compare the folder's code with the installed package, and where its files send a loader."""
    folder = patient.folder
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


def _find_code_inside(folder: Path) -> list[str]:
    """Code that is named below the top of a file: of a tower, or of the image processor."""
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
    """What saving writes as `auto_map` into each file of the folder that a loader looks at."""
    architecture = (config.get("architectures") or [""])[0]
    model_class = _MODEL_CLASSES.get(architecture, LLM2CLIPModel)
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
    """Look at the extremes, which NaN spreads to: no copy of an embedding table is made."""
    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}; it is not a saved checkpoint.")
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, wanted an object.")
    return content
