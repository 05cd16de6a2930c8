"""Which model made these embeddings: everything that decides them, as short texts to compare.

Read from a model's folder, whose weights are streamed; no model is built. A loaded model is not
asked, because transformers renames weights of some towers on loading. Weights of the adapter and
the projections do not count: stored embeddings are taken before them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..configuration_llm2clip import LLM2CLIPConfig
from ..data.atomic_files import hash_json
from ..data.safetensors_files import iterate_tensors, list_weight_files
from ..processing_llm2clip import LLM2CLIPProcessor
from .model_folder import find_model_folder

# Of a tower's configuration: what changes no number, or has an entry of its own.
_NOT_OF_THE_TOWER = {
    "_name_or_path", "architectures", "attn_implementation", "dtype", "is_causal", "torch_dtype",
    "transformers_version", "use_cache",
}  # fmt: skip
# The class of an image processor names what it is computed with, not what it computes.
_NOT_OF_THE_IMAGES = {"image_processor_type", "processor_class", "auto_map", "_processor_class"}


def fingerprint_text(model: str | Path) -> dict[str, str]:
    """Say what decides a caption's embedding.

    Args:
        model: folder or Hub id.
    Returns: `weights`, `architecture` and `tokenizer` (SHA-256), `dtype`, `prompt`, `pooling`,
        `direction`, `max_text_length`.
    Raises: ValueError when the folder has no weights.
    """
    config, tensors, processor = _open(model, prefix="text_model.")
    return {
        **_describe_weights(tensors),
        "architecture": hash_json(_tower_settings(config.text_config)),
        "tokenizer": _hash_tokenizer(processor),
        "prompt": f"prefix {config.prompt_prefix_ids}, suffix {config.prompt_suffix_ids}",
        "pooling": config.text_pooling,
        "direction": "bidirectional" if config.bidirectional else "causal",
        "max_text_length": str(processor.longest_text),
    }


def fingerprint_vision(model: str | Path) -> dict[str, str]:
    """Say what decides an image's embedding; arguments and errors as `fingerprint_text`.

    Returns: `weights`, `architecture` and `image_processor` (SHA-256), `dtype`, `pooling`.
    """
    config, tensors, processor = _open(model, prefix="vision_model.")
    settings: dict[str, Any] = processor.image_processor.to_dict()
    return {
        **_describe_weights(tensors),
        "architecture": hash_json(_tower_settings(config.vision_config)),
        "image_processor": hash_json(
            {k: v for k, v in settings.items() if k not in _NOT_OF_THE_IMAGES and v is not None}
        ),
        "pooling": config.vision_pooling,
    }


def fingerprint_model(folder: Path) -> dict[str, str]:
    """Say which model a folder holds, towers and head.

    Returns: `weights` (SHA-256 of all of them), `dtype`, and the one setting of the head that no
        weight and neither `fingerprint_text` nor `fingerprint_vision` shows.
    Raises: ValueError when the folder has no weights.
    """
    config = LLM2CLIPConfig.from_pretrained(folder)
    setting = "normalize_text_before_adapter"
    return {**fingerprint_weights(folder), setting: str(getattr(config, setting))}


def fingerprint_weights(folder: Path, *, pattern: str = "model*.safetensors") -> dict[str, str]:
    """Hash all tensors of a folder's safetensors files, however they are spread over files.

    Args:
        pattern: which files, as `Path.glob` takes it; tensors of a subfolder go by its name too.
    Returns: `weights` (SHA-256 over names, dtypes, shapes and bytes, by name) and `dtype`.
    Raises: ValueError when no file fits, or a name stands in two of them.
    """
    files = sorted(folder.glob(pattern))
    if not files:
        raise ValueError(
            f"{folder} has no {pattern}. Save the model's weights as safetensors; of "
            "a model on the Hub, name a revision that has them (revision, --revision refs/pr/N)."
        )
    return _describe_weights(iterate_tensors(files, base=folder))


def _open(
    model: str | Path, *, prefix: str
) -> tuple[LLM2CLIPConfig, Iterable[tuple[str, Tensor]], LLM2CLIPProcessor]:
    """Configuration, the tower's tensors by name in order, and processor."""
    folder = find_model_folder(model)
    config = LLM2CLIPConfig.from_pretrained(folder)
    processor = LLM2CLIPProcessor.from_pretrained(folder)
    return config, iterate_tensors(list_weight_files(folder), prefix=prefix), processor


def _describe_weights(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Hash names, dtypes, shapes and bytes, and name the dtypes of floating-point weights."""
    digest = hashlib.sha256()
    dtypes = set()
    for name, tensor in tensors:
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(content.numpy().data)
        if tensor.is_floating_point():
            dtypes.add(str(tensor.dtype).removeprefix("torch."))
    if not dtypes:
        raise ValueError("The model has no weights of the tower that makes these embeddings.")
    return {"weights": digest.hexdigest(), "dtype": "+".join(sorted(dtypes))}


def _tower_settings(config: Any) -> dict[str, Any]:
    # Only what differs from the family's defaults, so that a newer transformers, which knows more
    # settings, gives the same.
    settings: dict[str, Any] = config.to_diff_dict()
    return {k: v for k, v in settings.items() if k not in _NOT_OF_THE_TOWER}


def _hash_tokenizer(processor: LLM2CLIPProcessor) -> str:
    written = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    # These two are left from the last call.
    return hash_json({**written, "truncation": None, "padding": None})
