"""Loads the two towers that a new model is built from: Hub ids, folders, or GGUF files."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ..configuration_llm2clip import LLM2CLIPConfig
from ..loading_llm2clip import build_tower, load_without_code
from .timm_images import image_processor_from_timm
from .tokenizer_code import load_tokenizer, require_pinned
from .tower_loading import load_decoder, load_with_account, refuse_unread_weights
from .tower_sources import naming
from .vision_checks import require_pixels_alone

# What a composite checkpoint calls its vision part.
_VISION_PART = {"clip": "vision_config", "siglip": "vision_config", "siglip2": "vision_config"}
_MARKS = ("bos_token_id", "eos_token_id")
# Model types that carry a text encoder of their own, which cannot take the place of an LLM.
_NOT_LLMS = {"clip", "clip_text_model", "siglip", "siglip2", "siglip_text_model", "bert", "roberta"}


def load_vision_tower(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    allow_missing_pooler: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """Load a vision tower and its image processor.

    Args:
        source: Hub id or folder of CLIP, SigLIP, SigLIP2, DINOv2, DINOv3, ViT, or a timm network
            in transformers' wrapper. Of a whole CLIP or SigLIP the vision part is taken.
        allow_missing_pooler: accept a tower saved without pooler weights (they stay random),
            because its pooler will not be used.
    Raises: ValueError when weights are missing or not read, or it is not a vision tower.
    """
    with naming(source):
        config = load_without_code(AutoConfig, source, revision=revision)
    part = _VISION_PART.get(config.model_type)
    if part:
        config = getattr(config, part)
    if not _sees_images(config):
        raise ValueError(
            f"{source} is a {config.model_type!r}, not a vision tower. Give CLIP, SigLIP, DINOv2, "
            "ViT or a timm network."
        )
    # AutoModel would choose the whole composite for a CLIP folder; the tower's class does not.
    tower_class = type(build_tower(config)) if part else AutoModel
    model, info = load_with_account(
        tower_class, source, config=config, dtype=dtype, revision=revision
    )
    missing = sorted(
        k for k in info["missing_keys"] if not (allow_missing_pooler and "pooler" in k)
    )
    if missing:
        raise ValueError(
            f"{source} lacks {len(missing)} weights of its vision tower, which would stay random: "
            f"{missing[:8]}. If only the pooler is missing, choose vision_pooling "
            "'cls', 'mean' or 'patch_mean'."
        )
    require_pixels_alone(model)
    if config.model_type != "timm_wrapper":  # in which a head left out is still a module
        refuse_unread_weights(model, model, info, source)
    _name_without_path(model, source)
    _forget_code(model.config)
    return model.eval(), load_image_processor(source, model.config, revision=revision)


def load_image_processor(
    source: str | Path, config: PreTrainedConfig, *, revision: str | None = None
) -> Any:
    """Load the tower's own image processor; timm's settings become an ordinary one.

    So size, mean and std stand in the checkpoint as plain numbers.
    """
    if config.model_type != "timm_wrapper":
        return _forget_code(load_without_code(AutoImageProcessor, source, revision=revision))
    return image_processor_from_timm(config.pretrained_cfg)


def load_text_tower(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    tokenizer_code: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load an LLM without its head, and its tokenizer.

    Args:
        source: Hub id or folder of a decoder, or a `.gguf` file, which is dequantised. Of a model
            that also sees (Gemma 3 from 4B on) the LLM is taken.
        tokenizer_code: commit of the Hub repository at which the code of its tokenizer is run, and
            all else is read; without one, no code is run.
    Raises: ValueError when it is not a decoder, weights are missing or not read, or the tokenizer
        is another model's.
    """
    if tokenizer_code is not None:
        require_pinned(source, tokenizer_code)
        revision = tokenizer_code
    path = Path(source)
    where: dict[str, Any] = {"revision": revision}
    name: str | Path = source
    if path.suffix == ".gguf":
        name, where = path.parent, {"gguf_file": path.name}
    with naming(source):
        config = load_without_code(AutoConfig, name, **where)
    require_decoder(config, source)
    tokenizer = load_tokenizer(source, name, config, runs_code=tokenizer_code is not None, **where)
    if "gguf_file" in where:
        tokenizer = _keep_tokens_of_the_file(tokenizer)
    model = load_decoder(name, config, source, dtype=dtype, **where)
    _forget_quantization(model)
    require_own_tokenizer(model.config, tokenizer, source)
    _name_without_path(model, source)
    _forget_code(model.config)
    return model.eval(), tokenizer


def require_decoder(config: PreTrainedConfig, source: str | Path) -> None:
    """Raise ValueError for a text encoder or a tower of images in the LLM's place.

    So for a whole LLM2CLIP, whose tokenizer puts a prompt around every text already.
    """
    if config.model_type == LLM2CLIPConfig.model_type:
        raise ValueError(
            f"{source} is a whole LLM2CLIP model, with a prompt in its tokenizer. Give the LLM it "
            "was made of; what its captions taught that LLM comes with --lora."
        )
    config = config.get_text_config(decoder=True)
    if config.model_type in _NOT_LLMS or _sees_images(config):
        raise ValueError(
            f"{source} is a {config.model_type!r}; LLM2CLIP needs a decoder language model in its "
            "place (Llama, Mistral, Qwen, Gemma, Phi, SmolLM and the like)."
        )


def require_own_tokenizer(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, source: str | Path
) -> None:
    """Raise ValueError when an LLM and a tokenizer are plainly of different models.

    That is when the tokenizer has more ids than the embedding table has rows, or lacks an id at
    which the LLM begins or ends texts. Where that id is there and stands for an ordinary piece of
    text, it warns: an LLM's configuration may have kept its class's defaults.
    """
    rows = config.vocab_size
    ids = set(tokenizer.get_vocab().values())
    largest = max(ids)
    if largest >= rows:
        raise ValueError(
            f"{source}: the tokenizer has ids up to {largest}, the embedding table only {rows} "
            "rows. They belong to different models; take the tokenizer that came with the LLM."
        )
    marks = {name: _list_ids(getattr(config, name, None)) for name in _MARKS}
    lost = {name: found for name, found in marks.items() if set(found) - ids}
    if lost:
        raise ValueError(
            f"{source}: the LLM's configuration has {lost}, which the tokenizer (ids up to "
            f"{largest}) lacks. They belong to different models; take the tokenizer that came with "
            "the LLM."
        )
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    plain = [i for found in marks.values() for i in found if i not in special]
    if plain:
        pieces = tokenizer.convert_ids_to_tokens(plain)
        warnings.warn(
            f"{source}: by its configuration the LLM begins or ends texts at {plain}, which are "
            f"the plain tokens {pieces} of this tokenizer. Make sure that it came with the LLM.",
            stacklevel=2,
        )


def _list_ids(stated: Any) -> list[int]:
    """The ids that a configuration states: none, one, or several ends of a turn."""
    listed = stated if isinstance(stated, list | tuple) else [stated]
    return [i for i in listed if i is not None and i >= 0]


def _sees_images(config: PreTrainedConfig) -> bool:
    fields = ("image_size", "num_channels", "patch_size", "architecture")
    return config.model_type == "timm_wrapper" or any(hasattr(config, field) for field in fields)


def _keep_tokens_of_the_file(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Undo that transformers adds GPT-2's unknown token to a byte-level GGUF vocabulary.

    Llama 3, for one, has no such token, and its embedding table no row for it.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = [t for t in content["added_tokens"] if t["content"] in content["model"]["vocab"]]
    if len(kept) == len(content["added_tokens"]):
        return tokenizer
    content["added_tokens"] = kept
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        chat_template=tokenizer.chat_template,
        **tokenizer.special_tokens_map,
    )


def _forget_quantization(model: PreTrainedModel) -> None:
    """A GGUF file's weights are plain numbers after loading; the mark would break saving."""
    for holder in (model, model.config):
        for name in ("quantization_config", "hf_quantizer", "is_quantized", "quantization_method"):
            holder.__dict__.pop(name, None)


def _forget_code(holder: Any) -> Any:
    """Take out the name of a repository's code: what was loaded is transformers' own class."""
    holder.__dict__.pop("auto_map", None)
    return holder


def _name_without_path(model: PreTrainedModel, source: str | Path) -> None:
    """Keep a folder's name but not its path: the configuration gets published."""
    if Path(source).exists():
        model.config._name_or_path = Path(source).name
