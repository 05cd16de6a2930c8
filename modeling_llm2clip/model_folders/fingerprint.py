"""Fingerprint models: everything that determines their embeddings, as short texts to compare.

Fingerprints are read from the model's folder, one tensor at a time, without building the model. A
loaded model cannot be fingerprinted, because transformers renames some towers' weights on loading.
A tower's fingerprint excludes the text adapter and the projections, because stored embeddings are
computed before them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, normalizers
from torch import Tensor

from ..configuration_llm2clip import LLM2CLIPConfig
from ..data.atomic_files import hash_file, hash_json
from ..data.safetensors_files import iterate_tensors
from ..data.sources.json_files import read_json
from ..loading_llm2clip import list_model_files, list_weight_files
from ..processing_llm2clip import LLM2CLIPProcessor
from .model_folder import find_model_folder

_ADAPTER_SETTING = "normalize_text_before_adapter"
# Some dual encoders name their vision tower's weights differently than the separate tower does:
# TIPSv2 has `vision_encoder`, and AltCLIP's layers are `layer`.
_VISION_PREFIX = re.compile(r".*\bvision_(model|encoder)\.")
# Fields of a tower's configuration that do not affect its output, or that have their own entry.
_NOT_OF_THE_TOWER = {
    "_name_or_path", "architectures", "attn_implementation", "dtype", "id2label", "is_causal",
    "label2id", "output_attentions", "output_hidden_states", "return_dict", "torch_dtype",
    "transformers_version", "use_cache",
}  # fmt: skip
# Fields in any model's small files that do not affect embeddings: how and where it was saved.
_NOT_OF_THE_FILES = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
# Files of a model folder, other than weights, that affect embeddings in at least one loader.
_DECIDING_IMAGES = ("config.json", "processor_config.json", "preprocessor_config.json")
_DECIDING_FILES = (
    *_DECIDING_IMAGES, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model",
    "modules.json", "sentence_bert_config.json",
)  # fmt: skip
# Files with keys that are words of a vocabulary.
_VOCABULARIES = {"tokenizer.json", "vocab.json", "added_tokens.json"}
# Fields of the other files, at any depth, that do not affect embeddings or that another check
# compares. Some change when a folder is loaded and saved again. `random_heads` is not listed: it
# decides what is refused, and only holds for the recorded weights.
_DECIDING_NOTHING = {
    "__version__", "_name_or_path", "_processor_class", "architectures", "auto_map",
    "chat_template", "dtype", "instructions", "is_local", "local_files_only", "name_or_path",
    "processor_class", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
# State of a tokenizer's last call. It is saved, but the next call overwrites it.
_STATE_OF_LAST_CALL = {
    "tokenizer.json": {"padding", "truncation"},
    "tokenizer_config.json": {
        "max_length", "pad_to_multiple_of", "pad_token_type_id", "stride", "truncation_strategy",
    },
}  # fmt: skip
IMAGE_PROJECTION = "visual_projection.weight"
WEIGHTS_ENTRY, VISION_ENTRY = "weights", "weights of the vision tower"
# Files that do not affect how a text or an image is read.
_IGNORED_FILES = ("model.safetensors.index.json", "README.md")
# Fields of an image processor that have no effect; its class has its own entry.
_NOT_OF_THE_IMAGES = {"image_processor_type", "processor_class", "auto_map", "_processor_class"}
# Suffix of an image processor's class name that names its image library.
_IMAGE_LIBRARY = re.compile("(Fast|Pil)$")


def fingerprint_text(
    model: str | Path, processor: LLM2CLIPProcessor | None = None
) -> dict[str, str]:
    """Describe everything that determines a caption's embedding before the text adapter.

    `weights`, `architecture` and `tokenizer` are SHA-256; `dtype`, `prompt`, `pooling`, `direction`
    and `max_text_length` are readable values. Pass the model's processor if it is loaded already.
    """
    folder, config, tensors, processor = _open(model, prefix="text_model.", processor=processor)
    stated: Any = getattr(config, "quantization_config", None)
    stated = stated if stated is None or isinstance(stated, dict) else stated.to_dict()
    quantization = {} if stated is None else {"quantization": stated}
    return {
        **_describe_weights(tensors),
        "architecture": hash_json({**_read_tower(folder, "text_config"), **quantization}),
        "tokenizer": _hash_tokenizer(processor.tokenizer),
        "prompt": f"prefix {config.prompt_prefix_ids}, suffix {config.prompt_suffix_ids}",
        "pooling": config.text_pooling,
        "direction": "bidirectional" if config.bidirectional else "causal",
        "max_text_length": str(processor.longest_text),
    }


def describe_prompt(backend: Tokenizer, config: LLM2CLIPConfig) -> tuple[str, str]:
    """Return the prompt before and after a caption as text, including special tokens."""
    parts = (config.prompt_prefix_ids, config.prompt_suffix_ids)
    before, after = (backend.decode(ids, skip_special_tokens=False) for ids in parts)
    # An embedder's prompt may end in text that is tokenized with the caption.
    steps = backend.normalizer
    if isinstance(steps, normalizers.Sequence) and len(steps) > 1:
        before += getattr(steps[1], "prepend", "")
    return before, after


def fingerprint_vision(
    model: str | Path, processor: LLM2CLIPProcessor | None = None
) -> dict[str, str]:
    """Describe everything that determines an image's embedding before its projection.

    `weights`, `architecture` and `image_processor` are SHA-256; `dtype` and `pooling` are readable
    values. Pass the model's processor if it is loaded already.
    """
    folder, config, tensors, processor = _open(model, prefix="vision_model.", processor=processor)
    settings: dict[str, Any] = processor.image_processor.to_dict()
    return {
        **_describe_weights(tensors),
        "architecture": hash_json(_read_tower(folder, "vision_config")),
        "image_processor": hash_json(
            {
                **{k: v for k, v in settings.items() if v is not None},
                **dict.fromkeys(_NOT_OF_THE_IMAGES),
                "class": _IMAGE_LIBRARY.sub("", type(processor.image_processor).__name__),
            }
        ),
        "pooling": config.vision_pooling,
    }


def fingerprint_teacher(model: str | Path) -> dict[str, str]:
    """Describe everything that determines a dual encoder's text embeddings and embedding space.

    The embedding space is defined by the image side; see `fingerprint_image_side`.
    """
    folder = find_model_folder(model)
    files = list_weight_files(folder)
    return {
        "text encoder": _describe_weights(iterate_tensors(files, prefix="text_"))["weights"],
        "files": hash_model_files(folder, ("*.json", "*.txt", "*.model")),
        **fingerprint_image_side(files),
    }


def fingerprint_image_side(files: Iterable[Path]) -> dict[str, str]:
    """Describe the vision tower and the image projection of a dual encoder or a model.

    Two image sides are the same if both entries of their fingerprints agree. Weights are rounded to
    bfloat16 before hashing, so a model may have a different dtype than the published tower. An
    identity matrix is treated as no projection.
    """
    files = list(files)
    tower = (
        (_VISION_PREFIX.sub("", name).replace(".layer.", ".layers."), tensor.to(torch.bfloat16))
        for name, tensor in iterate_tensors(files, prefix="vision_")
        if tensor.is_floating_point()
    )
    projection = {
        name: tensor.to(torch.bfloat16)
        for name, tensor in iterate_tensors(files, prefix="visual_projection.")
    }
    weight = projection.get(IMAGE_PROJECTION)
    if weight is not None and torch.equal(weight, torch.eye(*weight.shape, dtype=weight.dtype)):
        del projection[IMAGE_PROJECTION]
    return {
        "vision tower": _describe_weights(tower)["weights"],
        "image projection": (
            _describe_weights(projection.items())["weights"] if projection else "none"
        ),
    }


def fingerprint_embeddings(
    folder: Path,
    modality: Literal["text", "image"],
    processor: LLM2CLIPProcessor | None = None,
) -> dict[str, str]:
    """Describe everything that determines a final embedding: the tower and its projection layers.

    Adds `head weights` (SHA-256) to the tower's fingerprint and, for texts, the only text adapter
    setting that does not show in the adapter's weights. Pass the model's processor if it is loaded
    already.
    """
    files = list_model_files(folder)
    if modality == "image":
        tensors = iterate_tensors(files, prefix="visual_projection.")
        return {
            **fingerprint_vision(folder, processor),
            "head weights": _describe_weights(tensors)["weights"],
        }
    prefixes = ("text_adapter.", "text_projection.")
    heads = chain.from_iterable(iterate_tensors(files, prefix=prefix) for prefix in prefixes)
    return {
        **fingerprint_text(folder, processor),
        "head weights": _describe_weights(heads)["weights"],
        _ADAPTER_SETTING: str(getattr(LLM2CLIPConfig.from_pretrained(folder), _ADAPTER_SETTING)),
    }


def fingerprint_model(folder: Path, *, without_towers: bool = False) -> dict[str, str]:
    """Identify the model in a folder, or only its parts outside the towers.

    Contains `weights` (a single SHA-256), `dtype`, and the only setting that affects embeddings but
    shows neither in the weights nor in the towers' fingerprints.
    """
    heads = ("logit_scale.", "text_adapter.", "text_projection.", "visual_projection.")
    files, parts = list_model_files(folder), heads if without_towers else ("",)
    tensors = chain.from_iterable(iterate_tensors(files, prefix=part) for part in parts)
    config = LLM2CLIPConfig.from_pretrained(folder)
    return {
        **_describe_weights(tensors), _ADAPTER_SETTING: str(getattr(config, _ADAPTER_SETTING)),
    }  # fmt: skip


def fingerprint_weights(files: Iterable[Path], *, base: Path | None = None) -> dict[str, str]:
    """Hash all tensors of safetensors files, no matter how they are split into files.

    The hash covers names, dtypes, shapes and bytes, in order of names. With `base`, a tensor's name
    includes the subfolders of `base` that lead to its file.
    """
    return _describe_weights(iterate_tensors(files, base=base))


def _open(
    model: str | Path, *, prefix: str, processor: LLM2CLIPProcessor | None
) -> tuple[Path, LLM2CLIPConfig, Iterable[tuple[str, Tensor]], LLM2CLIPProcessor]:
    """Return the folder, configuration, tower's tensors (in order of names) and processor."""
    folder = find_model_folder(model)
    config = LLM2CLIPConfig.from_pretrained(folder)
    processor = processor or LLM2CLIPProcessor.from_pretrained(folder)
    tensors = iterate_tensors(list_model_files(folder), prefix=prefix)
    return folder, config, tensors, processor


def _describe_weights(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Hash names, dtypes, shapes and bytes, and name the dtypes of floating-point weights."""
    digest = hashlib.sha256()
    dtypes = set()
    for name, tensor in tensors:
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        if tensor.is_floating_point():
            dtypes.add(str(tensor.dtype).removeprefix("torch."))
    if not dtypes:
        raise ValueError("The model has no weights for the tower that computes these embeddings.")
    return {"weights": digest.hexdigest(), "dtype": "+".join(sorted(dtypes))}


def _read_tower(folder: Path, name: str) -> dict[str, Any]:
    """Read a tower's config.json fields, except fields that depend on transformers' version."""
    return _keep_of_tower(read_json(folder / "config.json")[name])


def _keep_of_tower(settings: dict[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in settings.items() if v is not None and k not in _NOT_OF_THE_TOWER}
    return {k: [*map(_keep_of_tower, v)] if k == "towers" else v for k, v in kept.items()}


def _hash_tokenizer(tokenizer: Any) -> str:
    return hash_json(
        {
            **json.loads(tokenizer.backend_tokenizer.to_str()),
            # The state of the last call is replaced by the settings that determine it.
            "truncation": tokenizer.truncation_side,
            "padding": None,
            "split_special_tokens": tokenizer.split_special_tokens,
        }
    )


def hash_deciding_files(folder: Path, *, of_vision_tower: bool = False) -> dict[str, str]:
    """Hash each file of a model folder that affects its embeddings, and all weights together.

    JSON is hashed without fields that do not affect embeddings. With `of_vision_tower`, the LLM is
    not read.
    """
    hashes = {
        name: hash_json(_read_deciding(folder / name))
        if name.endswith(".json")
        else hash_file(folder / name)
        for name in (_DECIDING_IMAGES if of_vision_tower else _DECIDING_FILES)
        if (folder / name).is_file()
    }
    prefix, entry = ("vision_model.", VISION_ENTRY) if of_vision_tower else ("", WEIGHTS_ENTRY)
    tensors = iterate_tensors(list_model_files(folder), prefix=prefix)
    return {**hashes, entry: _describe_weights(tensors)["weights"]}


def _read_deciding(file: Path) -> Any:
    content = read_json(file)
    if isinstance(content, dict):
        state = _STATE_OF_LAST_CALL.get(file.name, set())
        content = {name: value for name, value in content.items() if name not in state}
    return content if file.name in _VOCABULARIES else _keep_deciding(content)


def _keep_deciding(content: Any) -> Any:
    if isinstance(content, list):
        return [_keep_deciding(value) for value in content]
    if not isinstance(content, dict):
        return content
    kept = {k: _keep_deciding(v) for k, v in content.items() if k not in _DECIDING_NOTHING}
    if set(kept) == {"idx", "name", "path", "type"}:  # sentence-transformers moves its classes
        kept["type"] = str(kept["type"]).rsplit(".", 1)[-1]
    return kept


def hash_model_files(folder: Path, patterns: Iterable[str]) -> str:
    """Hash the small files that affect a model's embeddings, for any model type.

    JSON is hashed without fields that do not affect embeddings.
    """
    digest = hashlib.sha256()
    for file in sorted({file for pattern in patterns for file in folder.glob(pattern)}):
        if file.name not in _IGNORED_FILES:
            digest.update(f"{file.relative_to(folder)}\n".encode())
            digest.update(_read_relevant(file))
    return digest.hexdigest()


def _read_relevant(file: Path) -> bytes:
    if file.suffix != ".json":
        return file.read_bytes()
    content = read_json(file)
    if isinstance(content, dict):
        content = {name: value for name, value in content.items() if name not in _NOT_OF_THE_FILES}
    return json.dumps(content, sort_keys=True).encode()
