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

from ...configs.evaluation_config import EncoderConfig
from ...data.atomic_files import hash_file
from ...encoding.devices import find_device
from ...model_folders.fingerprint import fingerprint_weights
from ...processing_llm2clip import check_texts
from .activations import describe_open_clip_activations
from .descriptions import OPENING
from .encoder import (
    EncodedTexts,
    EncoderDescription,
    describe_run,
    encode_distinct,
    load_rgb,
    require_images,
)
from .files import hash_files
from .open_clip_published import (
    find_activation,
    find_preprocessing,
    import_open_clip,
    refuse_torchscript,
)

CONFIG_FILE = "open_clip_config.json"
# In the order in which open_clip itself looks for them.
WEIGHT_FILES = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth",
)  # fmt: skip
_WEIGHT_SUFFIXES = {Path(name).suffix for name in WEIGHT_FILES} | {".pt"}
_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


class OpenClipEncoder:
    """An open_clip model; its own tokenizer and preprocessing.

    Args:
        path: folder with `open_clip_config.json`, or a weights file.
        architecture: for a weights file, open_clip's name of what it holds, e.g. `EVA02-B-16`.
        activation: for a weights file, `gelu` or `quick_gelu`, where the architecture leaves it
            open; see `find_activation`.
    Raises: ValueError when open_clip is not installed, weights are missing, a name is unknown, or
        nothing says what a weights file is run with: how its images are prepared, its activation.
    """

    def __init__(
        self,
        path: Path,
        config: EncoderConfig,
        *,
        source: str,
        architecture: str | None = None,
        activation: str | None = None,
    ) -> None:
        self._open_clip = import_open_clip()
        self._config = config
        self._source = source
        self._path = path
        given = {"architecture": architecture, "activation": activation}
        for argument, value in given.items():
            if path.is_dir() and value is not None:
                raise ValueError(
                    f"{source} is a folder, whose {CONFIG_FILE} says what it holds; leave "
                    f"{argument}={value!r} out."
                )
        self._weights = path if path.is_file() else _find_weights(path)
        self._name = f"local-dir:{path}"
        self._pretrained: str | None = None
        if path.is_file():
            self._name = self._check_architecture(architecture)
            self._pretrained = str(path)
        self._written = _read_config(path) if path.is_dir() else self._built_in(activation)
        self._tokenizer = self._open_clip.get_tokenizer(self._name)
        self._max_tokens = int(self._tokenizer.context_length)

    def describe(self) -> EncoderDescription:
        """Say what decides the embeddings."""
        return self._description

    def encode_texts(self, texts: Sequence[str]) -> EncodedTexts:
        """Encode texts, cut at the context length."""
        check_texts(list(texts))
        embeds = encode_distinct(
            texts,
            self._tokenizer,
            lambda ids: self._model.encode_text(ids.to(find_device(self._config.device))),
            self._config,
            unit="texts",
        )
        is_truncated = {text: self._count_tokens(text) > self._max_tokens for text in set(texts)}
        return EncodedTexts(embeds, torch.tensor([is_truncated[text] for text in texts]))

    def encode_images(self, images: Sequence[Any], *, names: Sequence[str]) -> Tensor:  # noqa: ARG002
        """Encode images with the checkpoint's own preprocessing."""
        require_images(images)
        return encode_distinct(
            images,
            lambda batch: torch.stack([self._transform(p) for p in load_rgb(batch)]),
            lambda pixels: self._model.encode_image(self._cast(pixels)),
            self._config,
            unit="images",
        )

    def _cast(self, pixels: Tensor) -> Tensor:
        dtype = getattr(torch, self._description.dtype)
        return pixels.to(find_device(self._config.device), dtype=dtype)

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
        refuse_torchscript(self._path, source=self._source)
        known = self._open_clip.list_models()
        if architecture is None or architecture not in known:
            raise ValueError(
                f"{self._source} is a weights file, which does not say what it holds, and "
                f"architecture is {architecture!r}. Name one of open_clip's: {sorted(known)}."
            )
        return architecture

    def _built_in(self, given: str | None) -> dict[str, Any]:
        """What open_clip knows of an architecture, as a folder would have it written."""
        preprocessing = find_preprocessing(self._name, source=self._source)
        activation = find_activation(self._name, given=given, source=self._source)
        model_config = self._open_clip.get_model_config(self._name)
        return {
            "model_cfg": {**model_config, "quick_gelu": activation == "quick_gelu"},
            "preprocess_cfg": preprocessing,
        }

    @cached_property
    def _model(self) -> Any:
        model = self._open_clip.create_model(
            self._name,
            pretrained=self._pretrained,
            force_quick_gelu=bool(self._written["model_cfg"].get("quick_gelu")),
            precision=_PRECISIONS[self._description.dtype],
            device=find_device(self._config.device),
            require_pretrained=True,
        )
        return model.eval()

    @cached_property
    def _preprocessing(self) -> Any:
        """open_clip's own settings of the images, as it merges them when it loads a model."""
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
    def _description(self) -> EncoderDescription:
        fingerprint, saved = self._fingerprint()
        chosen = self._preprocessing
        activations = describe_open_clip_activations(self._written["model_cfg"])
        return EncoderDescription(
            kind="open_clip",
            source=self._source,
            fingerprint=fingerprint,
            text={
                "prompt": None,
                "max_tokens": self._max_tokens,
                "padding": "max_length",
                "lower_case": True if self._is_clips_own else "as its tokenizer does",
                "tokenizer": type(self._tokenizer).__name__,
                "activation": activations["text"],
            },
            images={
                **OPENING,
                "processor": "open_clip",
                "resize": {"size": chosen.size, "mode": chosen.resize_mode},
                "crop": chosen.size if chosen.resize_mode == "shortest" else None,
                "interpolation": chosen.interpolation,
                "mean": list(chosen.mean),
                "std": list(chosen.std),
                "scale": 1 / 255,
                "activation": activations["images"],
            },
            # What open_clip saves in half precision it still runs in float32, unless told.
            dtype="float32" if self._config.dtype == "saved" else self._config.dtype,
            run={**describe_run(self._config), "saved_dtype": saved},
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


def has_weights(folder: Path) -> bool:
    """Whether a folder has any of the files that open_clip looks for."""
    return any((folder / name).is_file() for name in WEIGHT_FILES)


def _find_weights(folder: Path) -> Path:
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(
        f"{folder} has {CONFIG_FILE} but none of {list(WEIGHT_FILES)}; the model would be random. "
        "Get the weights."
    )
