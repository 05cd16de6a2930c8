"""Loads the LLM for a new model, without its head, and its tokenizer.

Also reads the pooling and length that LLM2Vec saved with an LLM. Code in a repository is never run.
"""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from .._suggestions import list_first
from ..configs.build_config import BuildConfig
from ..configs.encoding_config import DUAL_ENCODERS
from ..configuration_llm2clip import LLM2CLIPConfig
from ..data.sources.json_files import read_object
from ..loading_llm2clip import load_without_code, naming_code
from ..model_folders.model_folder import fetch_hub_file
from ..pooling_llm2clip import TEXT_POOLINGS
from .part_loading import cut_config, forget_origin, load_part, naming, require_same_states
from .vision_towers import takes_images

_MARKS = ("bos_token_id", "eos_token_id")
# Text encoders that cannot replace an LLM.
_NOT_LLMS = {*DUAL_ENCODERS, *(f"{name}_text_model" for name in DUAL_ENCODERS)}
_ENCODERS = {"bert", "roberta"}
_LLM2VEC_FILE = "llm2vec_config.json"
_LLM2VEC_POOLINGS: dict[str, Any] = {
    mode: name for name, pooling in TEXT_POOLINGS.items() for mode in pooling.llm2vec
}
_REMEDY = (
    "If only the tokenizer needs it, and the repository has a tokenizer.json, set tokenizer_class "
    "to PreTrainedTokenizerFast in the tokenizer_config.json of a copy, and remove auto_map. "
    "Otherwise, use an LLM that transformers supports without custom code."
)


def load_text_tower(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    num_layers: int | None = None,
    is_embedder: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load an LLM without its head, in evaluation mode, and its tokenizer.

    The source is a Hub id or folder of a decoder, or a `.gguf` file, which is dequantized. From a
    model that also takes images (Gemma 3 4B and larger), only the LLM is loaded. With
    `num_layers`, only the first layers are loaded. With `is_embedder`, the source may also be an
    encoder; missing weights of its pooler are set to zero.
    """
    path, name, where = Path(source), source, dict[str, Any]()
    if path.suffix == ".gguf":
        name, where = path.parent, {"gguf_file": path.name}
    with naming(source):
        config = load_without_code(AutoConfig, name, **where)
    if not is_embedder:  # `read_embedder` has already checked those
        require_decoder(config, source)
    tokenizer = _load_tokenizer(source, name, config, **where)
    if "gguf_file" in where:
        tokenizer = _keep_tokens_of_the_file(tokenizer)
    model = _load_decoder(
        name, config, source, num_layers, is_embedder=is_embedder, dtype=dtype, **where
    )
    # After loading, a GGUF file's weights are no longer quantized, and these marks would break
    # saving.
    for holder in (model, model.config):
        for mark in ("quantization_config", "hf_quantizer", "is_quantized", "quantization_method"):
            holder.__dict__.pop(mark, None)
    require_own_tokenizer(model.config, tokenizer, source)
    forget_origin(model.config, source)
    return model.eval(), tokenizer


def require_decoder(
    config: PreTrainedConfig, source: str | Path, *, takes_encoders: bool = False
) -> None:
    """Refuse a text encoder, a vision tower or a whole LLM2CLIP model as the LLM."""
    if config.model_type == LLM2CLIPConfig.model_type:
        raise ValueError(
            f"{source} is a whole LLM2CLIP model, with a prompt in its tokenizer. Pass the LLM it "
            "was built from, and its fine-tuned LoRA with --lora."
        )
    if config.is_encoder_decoder or hasattr(config, "num_decoder_layers"):
        raise ValueError(
            f"{source} is a {config.model_type!r}, an encoder-decoder model like T5, which is not "
            "supported. Pass a decoder language model or, with --prompt own, an embedder based on "
            "a decoder or on an encoder such as BERT."
        )
    text_config = config.get_text_config(decoder=True)
    refused = _NOT_LLMS if takes_encoders else _NOT_LLMS | _ENCODERS
    if {config.model_type, text_config.model_type} & refused or takes_images(text_config):
        raise ValueError(
            f"{source} is a {text_config.model_type!r}. Pass a decoder language model instead "
            "(Llama, Mistral, Qwen, Gemma, Phi, SmolLM or similar), or a sentence-transformers "
            "model with --prompt own."
        )


def require_own_tokenizer(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, source: str | Path
) -> None:
    """Refuse an LLM and a tokenizer that clearly belong to different models.

    A mismatch is clear if the tokenizer has an id beyond the rows of the embedding table, or lacks
    one of the LLM's beginning or end tokens.
    """
    rows = config.vocab_size
    ids = set(tokenizer.get_vocab().values())
    largest = max(ids)
    if largest >= rows:
        raise ValueError(
            f"{source}: the tokenizer has ids up to {largest}, but the embedding table only {rows} "
            "rows, so they belong to different models. Use the tokenizer that came with the LLM."
        )
    marks = {}  # none, one, or several ends of a turn
    for name in _MARKS:
        stated = getattr(config, name, None)
        listed = stated if isinstance(stated, list | tuple) else [stated]
        marks[name] = [i for i in listed if i is not None and i >= 0]
    lost = {name: token_ids for name, token_ids in marks.items() if set(token_ids) - ids}
    if lost:
        raise ValueError(
            f"{source}: the LLM's configuration has {lost}, which the tokenizer (ids up to "
            f"{largest}) lacks, so they belong to different models. Use the tokenizer that came "
            "with the LLM."
        )


def _load_tokenizer(
    source: str | Path, name: str | Path, config: PreTrainedConfig, **where: Any
) -> PreTrainedTokenizerBase:
    with naming(source), naming_code(name, remedy=_REMEDY):
        tokenizer = AutoTokenizer.from_pretrained(
            name, trust_remote_code=False, config=config, **where
        )
    if tokenizer.init_kwargs.get("auto_map"):
        warnings.warn(
            f"{source} has custom code for its tokenizer, which is not run: transformers' "
            f"{type(tokenizer).__name__} is used instead. Make sure that it returns the same ids.",
            stacklevel=3,
        )
    return tokenizer


def _load_decoder(
    name: str | Path,
    config: PreTrainedConfig,
    source: str | Path,
    num_layers: int | None,
    *,
    is_embedder: bool,
    **settings: Any,
) -> PreTrainedModel:
    """Load an LLM without its head; it may be part of a model that takes images or audio."""
    text_config = config.get_text_config(decoder=True)
    uncut, above = copy.deepcopy(text_config), range(0)
    if num_layers is not None:
        cut_config(text_config, num_layers, source)
        above = range(num_layers, uncut.num_hidden_layers)
    decoder, _, missing = load_part(name, config, text_config, source, above=above, **settings)
    if lost := [key for key in missing if not (is_embedder and "pooler" in key)]:
        raise ValueError(f"{source} lacks weights of its LLM: {list_first(lost)}.")
    for own_name, parameter in decoder.named_parameters():
        if any(key.endswith(own_name) for key in missing):  # so every build is the same
            parameter.data.zero_()
    if num_layers is not None:
        require_same_states(decoder, uncut, source)
    return decoder


def _keep_tokens_of_the_file(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Remove GPT-2's unknown token, which transformers adds to a byte-level GGUF vocabulary.

    Llama 3, for example, has neither this token nor a row for it in its embedding table.
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


def take_settings(source: str | Path, config: BuildConfig) -> BuildConfig:
    """Complete the config with the pooling and length of an LLM or LoRA saved by LLM2Vec.

    LLM2Vec also shortens a text word by word to `doc_max_length` before it adds the prompt. This
    setting is ignored, because nothing would be left of a text without spaces.
    """
    path = find_file(source, _LLM2VEC_FILE)
    if path is None:
        return config
    settings = read_object(path)
    errors = []
    pooling, length = settings.get("pooling_mode"), settings.get("max_length")
    if pooling not in [*_LLM2VEC_POOLINGS]:  # a list, because the value may be unhashable
        errors.append(f"pooling_mode={pooling!r}, expected one of {sorted(_LLM2VEC_POOLINGS)}")
    if settings.get("skip_instruction") is not True:
        errors.append(
            f"skip_instruction={settings.get('skip_instruction')}, expected true: these "
            "poolings leave out prompt and instruction"
        )
    if not isinstance(length, int):
        errors.append(f"max_length={length!r}, expected a number of tokens")
    if errors:
        raise ValueError(
            f"{path}: {'; '.join(errors)}. The embeddings would differ from LLM2Vec's."
        )
    return replace(
        config,
        text_pooling=config.text_pooling or _LLM2VEC_POOLINGS[str(pooling)],
        max_text_length=config.max_text_length or length,
    )


def find_file(source: str | Path, name: str) -> Path | None:
    """Return a file in a folder or Hub repository; None if the file does not exist."""
    if Path(source).is_dir():
        path: Path | None = Path(source) / name
    else:
        path = None if Path(source).suffix == ".gguf" else fetch_hub_file(source, name)
    return path if path is not None and path.is_file() else None
