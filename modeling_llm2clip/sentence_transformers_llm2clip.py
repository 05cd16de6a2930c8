"""Writes the three JSON files with which sentence-transformers loads a saved folder.

They refer to sentence-transformers' own modules only, because a custom module would need
`trust_remote_code`. Its `Transformer` module calls the model's methods by name, and `Normalize`
scales their features to unit length, as `forward` does.

Uploaded with the weights.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

SETTINGS_FILE = "config_sentence_transformers.json"
_NORMALIZE_FOLDER = "1_Normalize"
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
        "path": _NORMALIZE_FOLDER,
        "type": "sentence_transformers.models.Normalize",
    },
]
_MODALITIES = {
    "text": {"method": "get_text_features", "method_output_name": "pooler_output"},
    "image": {"method": "get_image_features", "method_output_name": "pooler_output"},
}
# sentence-transformers uses these for queries and documents if a model has no others.
_NO_INSTRUCTIONS = {"query": "", "document": ""}


def write_sentence_transformers_files(
    folder: Path, *, instructions: Mapping[str, str], modalities: Collection[str]
) -> None:
    """Write `modules.json`, `sentence_bert_config.json`, `config_sentence_transformers.json`.

    The last file is left as it is if it already has these instructions, because
    sentence-transformers or a user may have added other fields.

    Args:
        folder: the model folder.
        instructions: name → text that precedes a caption; attended to, not pooled.
        modalities: `"text"`, `"image"`, or both.

    Raises:
        ValueError: an existing `config_sentence_transformers.json` is not valid JSON.
    """
    _write(folder / "modules.json", _MODULES)
    _write(
        folder / "sentence_bert_config.json",
        {
            "transformer_task": "feature-extraction",
            "module_output_name": "sentence_embedding",
            "modality_config": {
                name: methods for name, methods in _MODALITIES.items() if name in modalities
            },
            # A max_length here would override the max_seq_length that a user sets.
            "processing_kwargs": {"text": {"truncation": True, "padding": True}},
        },
    )
    if read_instructions(folder) != _without_defaults(instructions):
        _write(
            folder / SETTINGS_FILE,
            {
                "model_type": "SentenceTransformer",
                "prompts": {**_NO_INSTRUCTIONS, **instructions},
                "default_prompt_name": None,
                "similarity_fn_name": "cosine",
            },
        )
    (folder / _NORMALIZE_FOLDER).mkdir(exist_ok=True)


def read_instructions(folder: Path) -> dict[str, str] | None:
    """Read the instructions of a folder's `config_sentence_transformers.json`.

    Args:
        folder: a model folder.

    Returns:
        Name → text, without blank texts for queries and documents; None if the file is absent.

    Raises:
        ValueError: the file is not valid JSON.
    """
    settings = _read(folder / SETTINGS_FILE)
    return None if settings is None else _without_defaults(settings.get("prompts") or {})


def find_instructions(folder: Path, instructions: Mapping[str, str]) -> dict[str, str]:
    """Choose the instructions to save: the model's, or newer ones in the folder.

    sentence-transformers writes its configuration, with a user's instructions, just before it saves
    the model to the same folder. So the folder's instructions are newer, and are chosen, if they
    differ from those in its `config.json` or if that file does not exist yet.

    Args:
        folder: folder that the model is going to be saved to; it may be empty.
        instructions: the model's instructions.

    Returns:
        Name → text.

    Raises:
        ValueError: a file of the folder is not valid JSON.
    """
    written, config = read_instructions(folder), _read(folder / "config.json")
    if written is None:
        return dict(instructions)
    before = None if config is None else _without_defaults(config.get("instructions") or {})
    return dict(instructions) if written == before else written


def check_instructions(
    tokenizer: PreTrainedTokenizerBase,
    instructions: Mapping[str, str],
    *,
    num_suffix: int,
    max_text_length: int,
) -> None:
    """Check that sentence-transformers counts the tokens of each instruction correctly.

    It tokenizes the instruction alone, and excludes that number of tokens from pooling. If a
    following caption changes the instruction's tokens, the wrong tokens would be pooled.

    Args:
        tokenizer: the model's tokenizer.
        instructions: name → text; may be blank.
        num_suffix: number of tokens of the prompt's suffix.
        max_text_length: maximum number of tokens per text, prompt included.

    Raises:
        ValueError: an instruction is not text, its tokens change when a caption follows, or it
            leaves no room for a caption.
    """
    errors = []
    for name, instruction in instructions.items():
        if not isinstance(instruction, str):
            raise ValueError(f"The instruction {name!r} is {instruction!r}; give a text.")
        if not instruction.strip():
            continue
        alone = _without_last(tokenizer(instruction, verbose=False)["input_ids"], num_suffix)
        if len(alone) + num_suffix >= max_text_length:
            raise ValueError(
                f"The instruction {name!r} leaves no room for a caption: with the prompt it has "
                f"{len(alone) + num_suffix} of {max_text_length} tokens. Shorten it."
            )
        for caption in ("A cat.", "two cats", "7 cats"):
            with_caption = _without_last(
                tokenizer(instruction + caption, verbose=False)["input_ids"], num_suffix
            )
            pooled = str(tokenizer.decode(with_caption[len(alone) :])).strip(" ")
            if with_caption[: len(alone)] != alone or pooled != caption:
                errors.append(f"{name!r}: {instruction!r} before {caption!r} pools {pooled!r}")
                break
    if errors:
        raise ValueError(
            "The tokens of these instructions change when a caption follows: "
            f"{'; '.join(errors)}. End them with ': ' (colon and space)."
        )


def _without_last(ids: list[int], count: int) -> list[int]:
    return ids[: len(ids) - count]


def _without_defaults(instructions: Mapping[str, str]) -> dict[str, str]:
    return {name: text for name, text in instructions.items() if text != _NO_INSTRUCTIONS.get(name)}


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}). Restore it, or delete it.") from error
    return content if isinstance(content, dict) else {}


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
