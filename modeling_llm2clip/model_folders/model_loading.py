"""Load model folders: whole, without a tower, or with a quantized LLM.

Code in a folder is never run: the package's own classes load it. A model with untrained projections
produces meaningless embeddings, so such a model is refused or causes a warning.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from ..configs.config_fields import Precision
from ..configuration_llm2clip import LLM2CLIPConfig
from ..encoding.devices import find_device
from ..encoding.precision import load_on_device
from ..loading_llm2clip import KEPT_IN_FULL, list_model_files
from ..modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel, LLM2CLIPVisionModel
from ..processing_llm2clip import LLM2CLIPProcessor
from ..vision_llm2clip import build_vision_tower
from .guarded_loading import load_in_precision
from .model_folder import find_model_folder, require_own_model

Quantization = Literal["4bit", "8bit"]
MODEL_CLASSES: dict[str, Any] = {
    cls.__name__: cls for cls in (LLM2CLIPModel, LLM2CLIPTextModel, LLM2CLIPVisionModel)
}

# Class names by the commands' names for the parts of a model.
CLASS_OF_COMPONENTS = {
    "full": "LLM2CLIPModel",
    "text": "LLM2CLIPTextModel",
    "vision": "LLM2CLIPVisionModel",
}


def load_model(
    source: str | Path,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    quantization: Quantization | None = None,
    precision: Precision | None = None,
) -> tuple[LLM2CLIPModel | LLM2CLIPTextModel | LLM2CLIPVisionModel, LLM2CLIPProcessor]:
    """Load a model for inference, and its processor.

    Args:
        source: Folder or Hub id of an LLM2CLIP model.
        revision: Branch, tag or commit of the Hub repository.
        device: Where the model runs; see `find_device`.
        dtype: Dtype of the weights; None for the saved dtype.
        quantization: Load the LLM in 4 or 8 bits; see `text_quantization_config`.
        precision: Precision for encoding, as in the commands, instead of `dtype`; see
            `PrecisionConfig`.

    Returns:
        The whole, text-only or vision-only model (whichever was saved) in evaluation mode, and the
        processor.

    Raises:
        ValueError: The source is not an LLM2CLIP model, weights are missing or unexpected, or the
            device is not available.

    Examples:
        >>> model, processor = load_model("my-model")
    """
    require_own_model(source, revision=revision)
    folder = find_model_folder(source, revision=revision)
    chosen = find_device(device, precision=precision or "auto")
    settings: dict[str, Any] = {"dtype": dtype or "auto"}
    if quantization is not None:
        settings["quantization_config"] = text_quantization_config(quantization)
    if precision is None:
        model = load_on_device(find_model_class(folder), folder, chosen, **settings)
    elif dtype is None and quantization is None:
        model = load_in_precision(find_model_class(folder), folder, chosen, precision)
    else:
        raise ValueError(
            f"precision={precision!r} cannot be combined with dtype or quantization, because "
            "precision also sets the dtype. Remove one of them."
        )
    processor = LLM2CLIPProcessor.from_pretrained(folder, local_files_only=True)
    return model, processor


def find_model_class(folder: Path) -> Any:
    architectures = LLM2CLIPConfig.from_pretrained(folder, local_files_only=True).architectures
    name = (architectures or ["nothing"])[0]
    if name not in MODEL_CLASSES:
        raise ValueError(
            f"{folder}: architectures in config.json must be one of {sorted(MODEL_CLASSES)}, not "
            f"{architectures}. Save the model with save_pretrained."
        )
    return MODEL_CLASSES[name]


class _AbsentTower(nn.Module):
    """Placeholder for a tower that is not run: has a configuration, but no weights."""

    config: Any = None
    pooled_dense: Any = None

    def get_input_embeddings(self) -> None:
        """Return None; FSDP calls this."""


class PartialModel(LLM2CLIPModel):
    """A whole model without the towers that are not run.

    The weights are loaded strictly from a whole model's folder, except those of absent towers. It
    cannot be saved as a model: `save_trained_model` writes the weights that changed. Stored caption
    embeddings replace the LLM, and stored image embeddings replace the vision tower.
    """

    _auto_class = None  # type: ignore[assignment]
    loaded_files: dict[str, tuple[int, int]]  # as `read_file_states` describes them

    def __init__(
        self, config: LLM2CLIPConfig, with_llm: bool = False, with_vision_tower: bool = True
    ) -> None:
        self._keys_to_ignore_on_load_unexpected = [
            *([] if with_llm else [r"^text_model\."]),
            *([] if with_vision_tower else [r"^vision_model\."]),
        ]
        vision_model = None
        if not with_vision_tower:
            # Built on the meta device, because only the network knows the width of its embeddings.
            with torch.device("meta"):
                vision_model = build_vision_tower(config.vision_config)
        text_model: Any = None if with_llm else _AbsentTower()
        super().__init__(config, vision_model, text_model)
        if not with_vision_tower:
            self.vision_model = _AbsentTower()
            self.prune_no_split_modules()


def load_partial_model(
    folder: Path,
    *,
    with_llm: bool = False,
    with_vision_tower: bool = False,
    device: str = "cpu",
) -> PartialModel:
    """Load a whole model without one or both of its towers, in evaluation mode.

    `to_text_embeds` and `to_image_embeds` work without towers.
    """
    model: PartialModel = load_on_device(
        PartialModel, folder, find_device(device),
        with_llm=with_llm, with_vision_tower=with_vision_tower,
    )  # fmt: skip
    return model


def load_heads(source: str | Path, *, device: str = "cpu") -> LLM2CLIPModel:
    """Load only the trainable heads of a model: adapter, projections and temperature.

    `to_text_embeds` and `to_image_embeds` map stored embeddings to the shared space, so a training
    loop on stores needs neither the LLM nor the vision tower in memory. `save_heads` writes the
    trained model.

    Args:
        source: Folder or Hub id of a whole LLM2CLIP model.
        device: Where the heads run; see `find_device`.

    Returns:
        A model without towers, in float32 and in evaluation mode. Save it with `save_heads`, not
        with `save_pretrained`.

    Raises:
        ValueError: The source is not a whole LLM2CLIP model, or weights are missing.

    Examples:
        >>> model = load_heads("my-model")
        >>> store = EmbeddingStore.open("captions")
        >>> text_embeds = model.to_text_embeds(store.read(store.rows_of(0)))
    """
    require_own_model(source)
    folder = find_model_folder(source).absolute()
    model = load_partial_model(folder, device=device)
    model.loaded_files = read_file_states(folder)
    # Small steps would be rounded away in half precision; `save_heads` casts back.
    model.float()  # type: ignore[no-untyped-call]
    return model


def read_file_states(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the size and modification time of each weight file of a model folder."""
    states = {file.name: file.stat() for file in list_model_files(folder)}
    return {name: (state.st_size, state.st_mtime_ns) for name, state in states.items()}


def text_quantization_config(quantization: Quantization) -> BitsAndBytesConfig:
    """Return a `quantization_config` for `from_pretrained` that quantizes only the LLM.

    4-bit weights are NF4, computed in bfloat16. Other bitsandbytes configurations also quantize
    only the LLM. Quantize while loading a whole model: a model built from an already quantized
    tower cannot be loaded again, so `save_pretrained` refuses it. `save_pretrained` also refuses a
    4-bit model that has run on a CPU.
    """
    if quantization not in get_args(Quantization):
        raise ValueError(f"quantization={quantization!r} must be '4bit' or '8bit'.")
    return BitsAndBytesConfig(
        load_in_4bit=quantization == "4bit",
        load_in_8bit=quantization == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_threshold=0.0,  # above 0, a text's embedding depends on the rest of its batch
        llm_int8_skip_modules=KEPT_IN_FULL,
    )


def describe_untrained(config: LLM2CLIPConfig) -> str | None:
    """Describe the untrained parts and the remedy, as a sentence without a subject.

    Returns None for a trained model.
    """
    if not config.random_heads:
        return None
    heads = ", ".join(head.replace("_", " ") for head in config.random_heads)
    return (
        f"untrained: random weights remain in its {heads}. Train them first (llm2clip align). If "
        "they were trained elsewhere: model.config.random_heads = []; "
        "model.save_pretrained(FOLDER)"
    )


def require_trained(config: LLM2CLIPConfig, *, purpose: str, source: str | Path) -> None:
    if not config.projections_trained:
        raise ValueError(f"{source} is refused for {purpose}: it is {describe_untrained(config)}.")


def warn_of_untrained(config: LLM2CLIPConfig, source: str | Path) -> None:
    """Warn if an untrained model is evaluated, which is allowed as a baseline."""
    if state := describe_untrained(config):
        warnings.warn(f"{source} is {state}.", stacklevel=3)
