"""Dual encoders of open_clip, EVA02-CLIP among them; needs `open_clip_torch`.

A model is a folder as its Hub repository has it (`open_clip_config.json` beside the weights), or
a weights file together with the name of one of open_clip's own architectures.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...data.vector_store_layout import hash_file
from ...encoding.fingerprint import fingerprint_weights
from ...processing_llm2clip import check_texts
from .encoder import (
    Description,
    EncodedTexts,
    EncoderSettings,
    encode_distinct,
    load_rgb,
    require_pictures,
)
from .files import hash_files
from .preprocessing import OPENING

CONFIG_FILE = "open_clip_config.json"
# In the order in which open_clip itself looks for them.
_WEIGHT_FILES = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth",
)  # fmt: skip
_WEIGHT_SUFFIXES = {Path(name).suffix for name in _WEIGHT_FILES} | {".pt"}
_PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")
_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


class OpenClipEncoder:
    """An open_clip model; its own tokenizer and preprocessing.

    Args:
        path: folder with `open_clip_config.json`, or a weights file.
        architecture: for a weights file, open_clip's name of what it holds, e.g. `EVA02-B-16`.
    Raises: ValueError when open_clip is not installed, weights are missing, a name is unknown, or
        nothing says how the pictures of a weights file are prepared.
    """

    def __init__(
        self,
        path: Path,
        settings: EncoderSettings,
        *,
        source: str,
        architecture: str | None = None,
    ) -> None:
        self._open_clip = import_open_clip()
        self._settings = settings
        self._source = source
        self._path = path
        if path.is_dir() and architecture is not None:
            raise ValueError(
                f"{source} is a folder, whose {CONFIG_FILE} says what it holds; leave "
                f"architecture={architecture!r} out."
            )
        self._weights = path if path.is_file() else _find_weights(path)
        self._name = f"local-dir:{path}"
        self._pretrained: str | None = None
        if path.is_file():
            self._name = self._check_architecture(architecture)
            self._pretrained = str(path)
        self._written = _read_config(path) if path.is_dir() else self._built_in()
        self._tokenizer = self._open_clip.get_tokenizer(self._name)
        self._max_tokens = int(self._tokenizer.context_length)

    def describe(self) -> Description:
        """Say what decides the vectors."""
        return self._description

    def encode_texts(self, texts: Sequence[str]) -> EncodedTexts:
        """Encode texts, cut at the context length."""
        check_texts(list(texts))
        embeds = encode_distinct(
            texts,
            self._tokenizer,
            lambda ids: self._model.encode_text(ids.to(self._settings.find_device())),
            self._settings,
            unit="texts",
        )
        is_cut = {text: self._count_tokens(text) > self._max_tokens for text in set(texts)}
        return EncodedTexts(embeds, torch.tensor([is_cut[text] for text in texts]))

    def encode_pictures(self, pictures: Sequence[Any], *, names: Sequence[str]) -> Tensor:  # noqa: ARG002
        """Encode pictures with the checkpoint's own preprocessing."""
        require_pictures(pictures)
        return encode_distinct(
            pictures,
            lambda batch: torch.stack([self._transform(p) for p in load_rgb(batch)]),
            lambda pixels: self._model.encode_image(self._cast(pixels)),
            self._settings,
            unit="pictures",
        )

    def _cast(self, pixels: Tensor) -> Tensor:
        dtype = getattr(torch, self._description.dtype)
        return pixels.to(self._settings.find_device(), dtype=dtype)

    def _count_tokens(self, text: str) -> int:
        """Tokens with the begin and end, before anything is cut."""
        if self._is_clips_own:
            return len(self._tokenizer.encode(text)) + 2
        cleaned = self._tokenizer.clean_fn(text)
        return len(self._tokenizer.tokenizer(cleaned, truncation=False)["input_ids"])

    @property
    def _is_clips_own(self) -> bool:
        return isinstance(self._tokenizer, self._open_clip.SimpleTokenizer)

    def _check_architecture(self, architecture: str | None) -> str:
        if self._path.suffix not in _WEIGHT_SUFFIXES:
            raise ValueError(f"{self._source} is none of {sorted(_WEIGHT_SUFFIXES)}.")
        known = self._open_clip.list_models()
        if architecture is None or architecture not in known:
            raise ValueError(
                f"{self._source} is a weights file, which does not say what it holds, and "
                f"architecture is {architecture!r}. Name one of open_clip's: {sorted(known)}."
            )
        return architecture

    def _built_in(self) -> dict[str, Any]:
        """What open_clip knows of an architecture, as a folder would have it written."""
        return {
            "model_cfg": self._open_clip.get_model_config(self._name),
            "preprocess_cfg": find_preprocessing(self._name, source=self._source),
        }

    @cached_property
    def _model(self) -> Any:
        model = self._open_clip.create_model(
            self._name,
            pretrained=self._pretrained,
            precision=_PRECISIONS[self._description.dtype],
            device=self._settings.find_device(),
            require_pretrained=True,
        )
        return model.eval()

    @cached_property
    def _preprocessing(self) -> Any:
        """open_clip's own settings of the pictures, as it merges them when it loads a model."""
        from open_clip.transform import PreprocessCfg, merge_preprocess_dict

        written = self._written.get("preprocess_cfg", {})
        settings = merge_preprocess_dict(dict(vars(PreprocessCfg())), written)
        size = self._written["model_cfg"]["vision_cfg"]["image_size"]
        return PreprocessCfg(**settings | {"size": size})

    @cached_property
    def _transform(self) -> Any:
        from open_clip.transform import image_transform_v2

        return image_transform_v2(self._preprocessing, is_train=False)

    @cached_property
    def _description(self) -> Description:
        fingerprint, saved = self._fingerprint()
        chosen = self._preprocessing
        return Description(
            kind="open_clip",
            source=self._source,
            fingerprint=fingerprint,
            text={
                "prompt": None,
                "max_tokens": self._max_tokens,
                "padding": "max_length",
                "lower_case": True if self._is_clips_own else "as its tokenizer does",
                "tokenizer": type(self._tokenizer).__name__,
            },
            pictures={
                **OPENING,
                "processor": "open_clip",
                "resize": {"size": chosen.size, "mode": chosen.resize_mode},
                "crop": chosen.size if chosen.resize_mode == "shortest" else None,
                "interpolation": chosen.interpolation,
                "mean": list(chosen.mean),
                "std": list(chosen.std),
                "scale": 1 / 255,
            },
            # What open_clip saves in half precision it still runs in float32, unless told.
            dtype="float32" if self._settings.dtype == "saved" else self._settings.dtype,
            run={**self._settings.run, "saved_dtype": saved},
        )

    def _fingerprint(self) -> tuple[dict[str, str], str]:
        if self._weights.suffix == ".safetensors":
            found = fingerprint_weights(self._weights.parent, pattern=self._weights.name)
        else:
            found = {"weights": hash_file(self._weights), "dtype": "unknown"}
        if self._path.is_dir():
            other = hash_files(self._path, ("*.json", "*.txt", "*.model"))
        else:
            other = json.dumps(self._written, sort_keys=True)
        return {"weights": found["weights"], "files": other}, found["dtype"]


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        _ = content["model_cfg"]["vision_cfg"]["image_size"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is missing or is not a configuration of open_clip ({error!r}). Get the whole "
            "repository."
        ) from error
    return content


def find_preprocessing(architecture: str, *, source: str) -> dict[str, Any]:
    """How pictures are prepared for every published model of an architecture of open_clip.

    A weights file does not say it, and the wrong mean costs a score without a word.

    Returns: mean, std, interpolation and resize mode, as `open_clip_config.json` has them.
    Raises: ValueError when no model of it is published, or they differ.
    """
    open_clip = import_open_clip()
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    known = [open_clip.get_pretrained_cfg(architecture, tag) for tag in tags]
    settings = [{key: cfg[key] for key in _PREPROCESSING if key in cfg} for cfg in known]
    if not settings or any(other != settings[0] for other in settings):
        raise ValueError(
            f"{source} is a weights file, which does not say how its pictures are prepared, and "
            f"open_clip's {len(tags)} published models of {architecture} do not "
            f"{'agree on it' if tags else 'say it either'}. Get the repository's folder, with "
            f"{CONFIG_FILE}."
        )
    return settings[0]


def import_open_clip() -> Any:
    """Import open_clip.

    Raises: ValueError saying how to install it.
    """
    try:
        import open_clip
    except ImportError as error:
        raise ValueError(
            "This needs open_clip, which is not installed. Run "
            '`pip install "modeling_llm2clip[baselines]"`.'
        ) from error
    return open_clip


def _find_weights(folder: Path) -> Path:
    for name in _WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(
        f"{folder} has {CONFIG_FILE} but none of {list(_WEIGHT_FILES)}; the model would be random. "
        "Get the weights."
    )
