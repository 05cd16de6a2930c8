"""Dual encoders of open_clip, EVA02-CLIP among them; needs `open_clip_torch`.

A model is a folder as its Hub repository has it (`open_clip_config.json` beside the weights), or
a weights file together with the name of one of open_clip's own architectures.

A weights file does not say how images are prepared nor what the activation is, and a wrong choice
lowers the scores without an error. So each is taken from the published models of the architecture,
and only if all of them agree.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..._extras import OPEN_CLIP, Need, require
from ...configs.evaluation_config import EncoderConfig
from ...data.atomic_files import hash_file
from ...encoding.encoder_interface import Encoder
from ...encoding.tokenized_texts import TokenizedText
from ...image_loading_llm2clip import load_images
from ...model_folders.fingerprint import fingerprint_weights, hash_model_files
from .encoder import ACTIVATIONS, OF_ITS_TOWER, OPENING, EncoderDescription, EvaluationEncoder

CONFIG_FILE = "open_clip_config.json"
# In the order in which open_clip itself looks for them.
WEIGHT_FILES = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth",
)  # fmt: skip
_WEIGHT_SUFFIXES = {Path(name).suffix for name in WEIGHT_FILES} | {".pt"}
_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")
_QUICK_GELU_SUFFIX = "-quickgelu"
_SHOWN = 4


class _OpenClipProcessor:
    """Prepares texts and images with a model's own tokenizer and transform."""

    transform: Callable[[Any], Tensor]

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.longest_text = int(tokenizer.context_length)
        self.is_clips_own = isinstance(tokenizer, import_open_clip().SimpleTokenizer)

    def list_ids(self, texts: list[str]) -> tuple[list[list[int]], list[bool]]:
        """List the ids of each text, padded as the tokenizer does, and if it was truncated."""
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
    """A loaded model; its texts are padded to one length and not masked."""

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
    """An open_clip model with its own tokenizer and preprocessing.

    A weights file, unlike a folder with `open_clip_config.json`, needs open_clip's name of its
    architecture, such as `EVA02-B-16`, and its activation if the architecture does not say it; see
    `_find_activation`.
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
        super().__init__(path, config, source=source)
        self._open_clip = import_open_clip()
        given = {"architecture": architecture, "activation": activation}
        for argument, value in given.items():
            if path.is_dir() and value is not None:
                raise ValueError(
                    f"{source} is a folder, whose {CONFIG_FILE} says how it is run; leave "
                    f"{argument}={value!r} out."
                )
        weights = path if path.is_file() else find_weights(path)
        if weights is None:
            raise ValueError(
                f"{path} has {CONFIG_FILE} but none of {', '.join(WEIGHT_FILES)}; the model would "
                "be random. Get the weights."
            )
        self._weights = weights
        self._name = f"local-dir:{path}"
        self._pretrained: str | None = None
        if path.is_dir():
            self._written = _read_config(path)
        else:
            self._pretrained = str(path)
            self._name = self._check_architecture(architecture)
            preprocessing = _find_preprocessing(self._name, source=source)
            chosen = _find_activation(self._name, given=activation, source=source)
            model_config = self._open_clip.get_model_config(self._name)
            self._written = {  # as a folder would have it
                "model_cfg": {**model_config, "quick_gelu": chosen == "quick_gelu"},
                "preprocess_cfg": preprocessing,
            }
        self._processor = _OpenClipProcessor(self._open_clip.get_tokenizer(self._name))

    def _check_architecture(self, architecture: str | None) -> str:
        if self._path.suffix not in _WEIGHT_SUFFIXES:
            raise ValueError(
                f"{self._source} is not a weights file: its suffix must be one of "
                f"{', '.join(sorted(_WEIGHT_SUFFIXES))}."
            )
        _refuse_torchscript(self._path, source=self._source)
        known = self._open_clip.list_models()
        if architecture is None or architecture not in known:
            raise ValueError(
                f"{self._source} is a weights file, which does not say what it contains, and "
                f"architecture is {architecture!r}. Name one of open_clip's: {sorted(known)}."
            )
        return architecture

    @cached_property
    def _model(self) -> _OpenClipModel:
        from open_clip.transform import image_transform_v2

        model = self._open_clip.create_model(
            self._name,
            pretrained=self._pretrained,
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
        """Preparation of images as open_clip merges it when it loads a model."""
        from open_clip.transform import PreprocessCfg, merge_preprocess_dict

        written = self._written.get("preprocess_cfg", {})
        merged = merge_preprocess_dict(dict(vars(PreprocessCfg())), written)
        size = self._written["model_cfg"]["vision_cfg"]["image_size"]
        return PreprocessCfg(**merged | {"size": size})

    @cached_property
    def description(self) -> EncoderDescription:
        if self._weights.suffix == ".safetensors":
            found = fingerprint_weights([self._weights])
        else:
            found = {"weights": hash_file(self._weights), "dtype": "unknown"}
        if self._path.is_dir():
            files = hash_model_files(self._path, ("*.json", "*.txt", "*.model"))
        else:
            files = json.dumps(self._written, sort_keys=True)
        chosen, model_config = self._preprocessing, self._written["model_cfg"]
        own = ACTIVATIONS[bool(model_config.get("quick_gelu"))]
        # Towers of timm and transformers have one of their own, which `quick_gelu` does not reach.
        has_own_text = "hf_model_name" in model_config.get("text_cfg", {})
        has_own_vision = "timm_model_name" in model_config.get("vision_cfg", {})
        return EncoderDescription(
            model_type="open_clip",
            source=self._source,
            fingerprint={"weights": found["weights"], "files": files},
            text={
                "prompt": None,
                "max_tokens": self._processor.longest_text,
                "padding": "max_length",
                "lower_case": True if self._processor.is_clips_own else "as its tokenizer does",
                "tokenizer": type(self._processor.tokenizer).__name__,
                "activation": OF_ITS_TOWER if has_own_text else own,
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
                "activation": OF_ITS_TOWER if has_own_vision else own,
            },
            # What open_clip saves in half precision it still runs in float32 by default.
            dtype="float32" if self._run_config.dtype == "saved" else self._run_config.dtype,
            run={**self._describe_run(), "saved_dtype": found["dtype"]},
        )


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


def find_weights(folder: Path) -> Path | None:
    return next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)


def _find_preprocessing(architecture: str, *, source: str) -> dict[str, Any]:
    """Find how images are prepared for every published model of an architecture."""
    open_clip = import_open_clip()
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    known = [open_clip.get_pretrained_cfg(architecture, tag) for tag in tags]
    found = [{key: cfg[key] for key in _PREPROCESSING if key in cfg} for cfg in known]
    if not found or any(other != found[0] for other in found):
        raise ValueError(
            f"{source} is a weights file, which does not say how its images are prepared, and "
            f"open_clip's {len(tags)} published models of {architecture} do not "
            f"{'agree on it' if tags else 'say it either'}. Get the repository's folder, with "
            "open_clip_config.json."
        )
    return found[0]


def _find_activation(architecture: str, *, given: str | None, source: str) -> str:
    """Find the activation of a weights file: `gelu` or `quick_gelu`, which have the same weights.

    An architecture that has QuickGELU in its own configuration says it; the plain name of one that
    is published with both does not, and the user has to say it.
    """
    if given is not None and given not in ACTIVATIONS:
        raise ValueError(f"activation={given!r} must be one of {', '.join(ACTIVATIONS)}.")
    open_clip = import_open_clip()
    if open_clip.get_model_config(architecture).get("quick_gelu", False):
        if given == "gelu":
            raise ValueError(
                f"{architecture} has quick_gelu, and activation is 'gelu'. Name the architecture "
                f"without it: {architecture.removesuffix(_QUICK_GELU_SUFFIX)}."
            )
        return "quick_gelu"
    if given is not None:
        return given
    tags: dict[str, list[str]] = {name: [] for name in ACTIVATIONS}
    for tag in open_clip.list_pretrained_tags_by_model(architecture):
        is_quick = bool(open_clip.get_pretrained_cfg(architecture, tag).get("quick_gelu"))
        tags[ACTIVATIONS[is_quick]].append(tag)
    if not tags["quick_gelu"]:
        return "gelu"
    shown = "; ".join(
        f"{name}: {', '.join(of_it[:_SHOWN])}{', …' if len(of_it) > _SHOWN else ''}"
        for name, of_it in tags.items()
        if of_it
    )
    agree = "all have quick_gelu" if not tags["gelu"] else "have either"
    raise ValueError(
        f"{source} is a weights file, which does not say its activation; {architecture} means "
        f"gelu, and open_clip's published models of it {agree} ({shown}). Name "
        f"{architecture}{_QUICK_GELU_SUFFIX}, or the activation (--activation gelu or quick_gelu)."
    )


def _refuse_torchscript(file: Path, *, source: str) -> None:
    """Raise ValueError for a TorchScript archive, as OpenAI published CLIP: it contains code."""
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        if not any(name.endswith("/constants.pkl") for name in archive.namelist()):
            return
    raise ValueError(
        f"{source} is a TorchScript archive, which contains code that is never run here. Take the "
        "same weights as a folder, such as openai/clip-vit-base-patch32, or as safetensors."
    )


def import_open_clip(need: Need = OPEN_CLIP) -> Any:
    require(need)
    import open_clip

    return open_clip
