"""The three files that make a saved folder a sentence-transformers model too.

Only sentence-transformers' own modules are named, because a custom one would ask every user for
`trust_remote_code`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..configuration_llm2clip import LLM2CLIPConfig

SETTINGS_FILE = "config_sentence_transformers.json"
_MODULES = [
    {
        "idx": 0,
        "name": "0",
        "path": "",
        "type": "sentence_transformers.models.Transformer",
    },
    {
        "idx": 1,
        "name": "1",
        "path": "1_Normalize",
        "type": "sentence_transformers.models.Normalize",
    },
]
_MODALITIES = {
    "text": {"method": "get_text_features", "method_output_name": "pooler_output"},
    "image": {"method": "get_image_features", "method_output_name": "pooler_output"},
}


def write_sentence_transformers_files(
    folder: Path,
    config: LLM2CLIPConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompts: Mapping[str, str],
    modalities: Sequence[str] = ("text", "image"),
) -> None:
    """Write `modules.json`, `sentence_bert_config.json`, `config_sentence_transformers.json`.

    Args:
        prompts: name → instruction put in front of a text: attended to and not pooled.
        modalities: what is offered: `"text"`, `"image"`, or both.
    Raises: ValueError for an instruction whose own tokens change when a caption follows it, or
        that leaves a caption no room.
    """
    check_instructions(tokenizer, config, prompts)
    _write(folder / "modules.json", _MODULES)
    _write(
        folder / "sentence_bert_config.json",
        {
            "transformer_task": "feature-extraction",
            "module_output_name": "sentence_embedding",
            "modality_config": {modality: _MODALITIES[modality] for modality in modalities},
            # Not max_length, which would win over the max_seq_length that a user sets.
            "processing_kwargs": {"text": {"truncation": True, "padding": True}},
        },
    )
    _write(
        folder / SETTINGS_FILE,
        {
            "model_type": "SentenceTransformer",
            "prompts": dict(prompts),
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )
    (folder / "1_Normalize").mkdir(exist_ok=True)


def check_instructions(
    tokenizer: PreTrainedTokenizerBase, config: LLM2CLIPConfig, prompts: Mapping[str, str]
) -> None:
    """Raise ValueError for instructions that sentence-transformers would measure wrongly.

    It tokenizes the instruction alone and leaves as many tokens out of the pooling. Where a caption
    behind it changes its tokens, a token of the caption would be lost, or one too many pooled.
    """
    errors = []
    num_suffix = len(config.prompt_suffix_ids)
    for name, instruction in prompts.items():
        if not instruction.strip():
            continue
        alone = _without_last(tokenizer(instruction, verbose=False)["input_ids"], num_suffix)
        if len(alone) + num_suffix >= config.max_text_length:
            raise ValueError(
                f"The instruction {name!r} leaves no room for a caption: with the prompt it has "
                f"{len(alone) + num_suffix} of {config.max_text_length} tokens. Shorten it."
            )
        for caption in ("A cat.", "two cats", "7 cats"):
            whole = _without_last(
                tokenizer(instruction + caption, verbose=False)["input_ids"], num_suffix
            )
            pooled = str(tokenizer.decode(whole[len(alone) :])).strip(" ")
            if whole[: len(alone)] != alone or pooled != caption:
                errors.append(f"{name!r}: {instruction!r} before {caption!r} pools {pooled!r}")
                break
    if errors:
        raise ValueError(
            "These instructions do not keep their tokens when a caption follows: "
            f"{'; '.join(errors)}. End them with ': ' (colon and space)."
        )


def _without_last(ids: list[int], count: int) -> list[int]:
    return ids[: len(ids) - count]


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
