"""The LLM of a conversion: its configuration, its tokenizer, and its weights without its head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from ..building.towers import require_decoder, require_own_tokenizer
from ..data.safetensors_files import list_weight_files
from ..loading_llm2clip import load_without_code
from ..model_folders.model_folder import find_model_folder
from .key_mapping import Drop, Renamed, apply_rules, rename
from .lazy_tensors import WEIGHT_NAMES, LazyTensor, is_lora_alone, open_weights
from .lora_factors import merge_lora
from .public_names import public_name, require_no_revision, split_revision

_RULES = (rename(r"(?:model\.)?((?:embed_tokens|layers|norm)\..*)", r"text_model.\1"),)
_DROPS = (
    Drop(r"lm_head\.(?:weight|bias)", "the head that predicts the next token, which is not used"),
    Drop(
        r"(?:model\.)?(?:layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
        "rotary frequencies, which the LLM computes from its configuration",
    ),
)
_PREFIX = "text_model."


@dataclass(frozen=True)
class LLMSource:
    """Where an LLM is taken from.

    Attributes:
        name: Hub id or folder with configuration, tokenizer and, as a rule, weights.
        revision: of the Hub repository.
        adapters: folders or Hub ids of LoRAs, these as `owner/name` or `owner/name@revision`;
            merged in this order.
        accept_lora_base: what the adapters call their base, where that is this LLM under
            another name.
    """

    name: str | Path
    revision: str | None = None
    adapters: Sequence[str | Path] = ()
    accept_lora_base: str | None = None


@dataclass(frozen=True)
class LanguageModel:
    """An opened LLM; its weights lie on the disk."""

    source: LLMSource
    folder: Path
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase


def open_language_model(source: LLMSource) -> LanguageModel:
    """Read configuration and tokenizer; code that the folder brings is not run.

    Raises: ValueError when it is not a decoder or a LoRA without its base, or the tokenizer is
        another model's.
    """
    require_no_revision(source.name, source.revision)
    folder = find_model_folder(source.name, revision=source.revision)
    if is_lora_alone(folder):
        raise ValueError(
            f"{source.name} is a LoRA, not a whole LLM. Give its base as the LLM, and it as an "
            "adapter."
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
    language: LanguageModel, inside: Mapping[str, LazyTensor]
) -> tuple[Renamed, list[Path]]:
    """Open the weights, under `text_model.`, from the LLM's folder or the checkpoint itself.

    Args:
        inside: weights of the LLM that the checkpoint holds, empty where it holds none. They are
            the ones it was trained with, so they come before the folder's.
    Returns: the weights, and the files that they come from beside the checkpoint.
    Raises: ValueError for keys without an account, and for a LoRA that does not fit.
    """
    source = language.source
    if inside:
        if source.adapters:
            raise ValueError(
                "The checkpoint holds the LLM's weights, merged as they were trained. Leave the "
                "LoRA out."
            )
        return apply_rules(inside, _RULES, _DROPS, source="The LLM in the checkpoint"), []
    files = list_weight_files(language.folder, names=WEIGHT_NAMES)
    renamed = apply_rules(
        open_weights(language.folder), _RULES, _DROPS, source=f"The LLM {source.name}"
    )
    for adapter in source.adapters:
        name, revision = split_revision(adapter)
        folder = find_model_folder(name, revision=revision)
        bare = {key.removeprefix(_PREFIX): value for key, value in renamed.weights.items()}
        merged = merge_lora(
            bare,
            folder,
            base=str(source.name),
            accepted_base=source.accept_lora_base,
        )
        renamed.weights = {f"{_PREFIX}{key}": value for key, value in merged.items()}
        files += list_weight_files(folder, names=WEIGHT_NAMES)
    return renamed, files
