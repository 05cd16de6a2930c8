"""Evaluate open_clip's dual encoders, including EVA02-CLIP; requires `open_clip_torch`.

A model is a folder laid out like its Hub repository, with `open_clip_config.json` next to the
weights. A weights file without this JSON file is rejected, because weights do not specify the image
preprocessing or the activation, and a wrong choice silently lowers the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..._extras import OPEN_CLIP, Need, require
from ..._suggestions import list_first
from ...configs.evaluation_config import EncoderConfig
from ...data.atomic_files import hash_file
from ...data.sources.json_files import parse_json
from ...encoding.encoder_interface import Encoder
from ...encoding.tokenized_texts import TokenizedText
from ...image_loading_llm2clip import load_images
from ...model_folders.fingerprint import fingerprint_weights, hash_model_files
from .encoder import (
    ACTIVATIONS,
    OF_ITS_TOWER,
    OPENING,
    EncoderDescription,
    EvaluationEncoder,
    choose_dtype,
)

CONFIG_FILE = "open_clip_config.json"
# In the order in which open_clip looks for them.
WEIGHT_FILES = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth",
)  # fmt: skip
_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


class _OpenClipProcessor:
    """Prepares texts and images with a model's own tokenizer and transform."""

    transform: Callable[[Any], Tensor]

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.longest_text = int(tokenizer.context_length)
        self.is_clips_own = isinstance(tokenizer, import_open_clip().SimpleTokenizer)

    def list_ids(self, texts: list[str]) -> tuple[list[list[int]], list[bool]]:
        """List each text's ids, padded by the tokenizer, and whether the text was truncated."""
        tokenizer, longest = self.tokenizer, self.longest_text
        if self.is_clips_own:
            begin, end = tokenizer.sot_token_id, tokenizer.eot_token_id
            ids = [[begin, *tokenizer.encode(text), end] for text in texts]
        else:
            cleaned = map(tokenizer.clean_fn, texts)
            ids = [tokenizer.tokenizer(text, truncation=False)["input_ids"] for text in cleaned]
        is_truncated = [len(row) > longest for row in ids]
        for row, is_long in enumerate(is_truncated):
            if is_long or not self.is_clips_own or tokenizer.reduction_fn is not None:
                ids[row] = tokenizer([texts[row]])[0].tolist()
            else:
                ids[row] += [0] * (longest - len(ids[row]))
        return ids, is_truncated

    def __call__(self, *, images: Sequence[Any]) -> dict[str, Tensor]:
        loaded = load_images(list(images))
        return {"pixel_values": torch.stack([self.transform(image) for image in loaded])}


class _OpenClipModel(Encoder):
    """A loaded model, whose texts are padded to a fixed length without a mask."""

    projects_at_once = True
    modalities = ("text", "image")

    def __init__(
        self, model: Any, processor: Any, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._model, self.processor, self.device, self._dtype = model, processor, device, dtype

    def prepare_texts(self, texts: Sequence[TokenizedText]) -> dict[str, Any]:
        ids = torch.from_numpy(np.stack([text.ids for text in texts]))
        return {"input_ids": ids.long(), "attention_mask": torch.ones_like(ids)}

    def encode_tokens(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # noqa: ARG002
        embeds: Tensor = self._model.encode_text(input_ids.to(self.device))
        return embeds

    def encode_pixels(self, pixel_values: Tensor, **_: Tensor) -> Tensor:
        embeds: Tensor = self._model.encode_image(pixel_values.to(self.device, self._dtype))
        return embeds


class OpenClipEncoder(EvaluationEncoder):
    """Encodes with an open_clip folder, using its own tokenizer and preprocessing."""

    def __init__(self, folder: Path, config: EncoderConfig, *, source: str) -> None:
        super().__init__(folder, config, source=source)
        self._open_clip = import_open_clip()
        weights = find_weights(folder)
        if weights is None:
            raise ValueError(
                f"{folder} has {CONFIG_FILE} but no weights ({list_first(WEIGHT_FILES)}), so the "
                "model would be random. Download the weights."
            )
        self._weights = weights
        self._name = f"local-dir:{folder}"
        self._written = _read_config(folder)
        self._processor = _OpenClipProcessor(self._open_clip.get_tokenizer(self._name))

    @cached_property
    def _model(self) -> _OpenClipModel:
        from open_clip.transform import image_transform_v2

        model = self._open_clip.create_model(
            self._name,
            force_quick_gelu=bool(self._written["model_cfg"].get("quick_gelu")),
            precision=_PRECISIONS[self.description.dtype],
            device=self._device,
            require_pretrained=True,
        )
        self._processor.transform = image_transform_v2(self._preprocessing, is_train=False)
        dtype = getattr(torch, self.description.dtype)
        return _OpenClipModel(model.eval(), self._processor, self._device, dtype)

    @cached_property
    def _preprocessing(self) -> Any:
        """Image preprocessing, merged as open_clip does when it loads a model."""
        from open_clip.transform import PreprocessCfg, merge_preprocess_dict

        written = self._written.get("preprocess_cfg", {})
        merged = merge_preprocess_dict(dict(vars(PreprocessCfg())), written)
        size = self._written["model_cfg"]["vision_cfg"]["image_size"]
        return PreprocessCfg(**merged | {"size": size})

    @cached_property
    def description(self) -> EncoderDescription:
        if self._weights.suffix == ".safetensors":
            weights = fingerprint_weights([self._weights])
        else:
            weights = {"weights": hash_file(self._weights), "dtype": "unknown"}
        files = hash_model_files(self._path, ("*.json", "*.txt", "*.model"))
        chosen, model_config = self._preprocessing, self._written["model_cfg"]
        activation = ACTIVATIONS[bool(model_config.get("quick_gelu"))]
        # Towers from timm and transformers choose their own activation; `quick_gelu` has no effect.
        has_own_text = "hf_model_name" in model_config.get("text_cfg", {})
        has_own_vision = "timm_model_name" in model_config.get("vision_cfg", {})
        return EncoderDescription(
            model_type="open_clip",
            source=self._source,
            fingerprint={"weights": weights["weights"], "files": files},
            text={
                "prompt": None,
                "max_tokens": self._processor.longest_text,
                "padding": "max_length",
                "lower_case": True if self._processor.is_clips_own else "as its tokenizer does",
                "tokenizer": type(self._processor.tokenizer).__name__,
                "activation": OF_ITS_TOWER if has_own_text else activation,
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
                "activation": OF_ITS_TOWER if has_own_vision else activation,
            },
            # open_clip runs in float32 by default, even if the weights are saved in half precision.
            dtype=choose_dtype(self._run_config, "float32"),
            run={**self._describe_run(), "saved_dtype": weights["dtype"]},
        )


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    try:
        content: dict[str, Any] = parse_json(file.read_text(encoding="utf-8"))
        _ = content["model_cfg"]["vision_cfg"]["image_size"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is missing or is not an open_clip configuration ({error!r}). Download the "
            "whole repository."
        ) from error
    return content


def find_weights(folder: Path) -> Path | None:
    return next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)


def import_open_clip(need: Need = OPEN_CLIP) -> Any:
    require(need)
    import open_clip

    return open_clip
