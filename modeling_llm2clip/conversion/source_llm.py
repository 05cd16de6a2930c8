"""The LLM of a conversion: its configuration, its tokenizer, and its weights without its head."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers import initialization as init

from ..building.lora_merging import merge_lora_weights
from ..building.text_towers import require_decoder, require_own_tokenizer
from ..loading_llm2clip import build_tower, list_weight_files, load_without_code
from ..model_folders.model_folder import find_model_folder
from ..model_folders.weights import WEIGHT_NAMES, LazyTensor, is_lora_alone, open_weights
from .layouts.layout import Drop, RenamedWeights, apply_rules, rename
from .source_checkpoint import public_name, require_no_revision, split_revision

_RULES = (rename(r"(?:model\.)?((?:embed_tokens|layers|norm)\..*)", r"text_model.\1"),)
_FREQUENCIES = r"(?:model\.)?(?:layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
_DROPS = (
    Drop(r"lm_head\.(?:weight|bias)", "the head that predicts the next token, which is not used"),
    Drop(_FREQUENCIES, "rotary frequencies, equal to those of the LLM's configuration"),
)
_PREFIX = "text_model."


@dataclass(frozen=True)
class LLMSource:
    """Where an LLM is.

    Attributes:
        name: Hub id, or folder with configuration, tokenizer and, usually, weights.
        revision: Branch, tag or commit of the Hub repository.
        loras: Folders or Hub ids of LoRAs, Hub ids as `owner/name` or `owner/name@revision`; merged
            in this order.
        accept_lora_base: Name that the LoRAs have for this LLM, where both are the same weights.
    """

    name: str | Path
    revision: str | None = None
    loras: Sequence[str | Path] = ()
    accept_lora_base: str | None = None


@dataclass(frozen=True)
class LanguageModel:
    """An opened LLM, whose weights are still on the disk.

    Attributes:
        source: Where it is.
        folder: Its folder.
        config: Its configuration.
        tokenizer: Its tokenizer.
    """

    source: LLMSource
    folder: Path
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase


def open_language_model(source: LLMSource) -> LanguageModel:
    """Read configuration and tokenizer; code that the folder brings is not run.

    Args:
        source: Where the LLM is.

    Raises:
        ValueError: It is not a decoder, or a LoRA without its base, or the tokenizer is another
            model's.
    """
    require_no_revision(source.name, source.revision)
    folder = find_model_folder(source.name, revision=source.revision)
    if is_lora_alone(folder):
        raise ValueError(
            f"{source.name} is a LoRA, not a whole LLM. Give its base as the LLM, and it as the "
            "LLM's LoRA."
        )
    config = load_without_code(AutoConfig, folder, local_files_only=True)
    config = config.get_text_config(decoder=True)
    require_decoder(config, source.name)
    tokenizer = load_without_code(AutoTokenizer, folder, local_files_only=True)
    require_own_tokenizer(config, tokenizer, source.name)
    config._name_or_path = public_name(source.name)
    if hasattr(config, "auto_map"):
        del config.auto_map  # names code of another repository
    return LanguageModel(source, folder, config, tokenizer)


def open_llm_weights(
    language: LanguageModel, inside: Mapping[str, LazyTensor], *, dtype: torch.dtype
) -> tuple[RenamedWeights, list[Path]]:
    """Open the weights, under `text_model.`, from the LLM's folder or the checkpoint itself.

    Args:
        language: The opened LLM.
        inside: Weights of the LLM that the checkpoint holds, empty where it holds none. The
            checkpoint was trained with these, so they win over the folder's.
        dtype: Dtype that the weights are going to be saved in.

    Returns:
        The weights, and the files that they come from beside the checkpoint.

    Raises:
        ValueError: A key is unknown, rotary frequencies are not those of the configuration, or a
            LoRA does not fit.
    """
    source = language.source
    if inside:
        if source.loras:
            raise ValueError(
                "The checkpoint holds the LLM's weights, merged as they were trained. Leave the "
                "LoRA out."
            )
        _require_frequencies(inside, language.config, source="The LLM in the checkpoint")
        return apply_rules(inside, _RULES, _DROPS, source="The LLM in the checkpoint"), []
    files = list_weight_files(language.folder, names=WEIGHT_NAMES)
    weights, shown = open_weights(language.folder), f"The LLM {source.name}"
    _require_frequencies(weights, language.config, source=shown)
    renamed = apply_rules(weights, _RULES, _DROPS, source=shown)
    for lora in source.loras:
        name, revision = split_revision(lora)
        folder = find_model_folder(name, revision=revision)
        merged = merge_lora_weights(
            {key.removeprefix(_PREFIX): value for key, value in renamed.weights.items()},
            language.config,
            folder,
            base=str(source.name),
            accepted_base=source.accept_lora_base,
            dtype=dtype,
        )
        renamed.weights |= {f"{_PREFIX}{key}": value for key, value in merged.items()}
        files += list_weight_files(folder, names=WEIGHT_NAMES)
    return renamed, files


def _require_frequencies(
    tensors: Mapping[str, LazyTensor], config: PreTrainedConfig, *, source: str
) -> None:
    """Require that rotary frequencies, which older checkpoints hold, are the configuration's."""
    held = {key: tensors[key].read().float() for key in tensors if re.fullmatch(_FREQUENCIES, key)}
    if not held:
        return
    with torch.device("meta"), init.meta_device_safe_creation_ops():
        rotary: Any = getattr(build_tower(config), "rotary_emb", None)
    if rotary is None:
        raise ValueError(
            f"{source} holds rotary frequencies ({min(held)}), but a {config.model_type!r} has "
            "none. Give the LLM with its own config.json."
        )
    # Older versions scaled the positions instead, and saved the frequencies as they were.
    plain = getattr(rotary, "compute_default_rope_parameters", None)
    accepted = [type(rotary)(config).inv_freq, *([plain(config)[0]] if plain else [])]
    for key, found in held.items():
        if not any(_are_close(found, wanted) for wanted in accepted):
            raise ValueError(
                f"{source} has other rotary frequencies than its configuration gives: {key} ends "
                f"with {float(found[-1]):.3g}, wanted {float(accepted[0][-1]):.3g}. Correct "
                "rope_theta and its scaling in the LLM's config.json."
            )


def _are_close(found: Tensor, wanted: Tensor) -> bool:
    # Up to the rounding of half precision.
    return found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-2, atol=1e-6)
