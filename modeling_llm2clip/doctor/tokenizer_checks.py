"""Checks of the saved tokenizer and processor: the prompt, lengths, padding."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoProcessor, AutoTokenizer

from ..loading_llm2clip import load_without_code
from ..processing_llm2clip import LLM2CLIPProcessor
from .model_report import NotApplicableError
from .model_under_test import SHORT_TEXTS, ModelUnderTest


def check_tokenizer(tested: ModelUnderTest) -> str:
    """Load the tokenizer as pipelines do; its ids must fit the LLM's embedding table."""
    tokenizer = load_without_code(AutoTokenizer, tested.folder, local_files_only=True)
    rows = tested.config.text_config.vocab_size
    largest = max(tokenizer.get_vocab().values())
    errors = []
    if largest >= rows:
        errors.append(
            f"it has ids up to {largest}, the LLM's embedding table only {rows} rows: it belongs "
            "to another LLM"
        )
    if tokenizer.pad_token_id is None:
        errors.append("it has no padding token, so batches cannot be made")
    if errors:
        raise ValueError(f"The saved tokenizer: {'; '.join(errors)}. Restore the original one.")
    tested.tokenizer = tokenizer
    return f"{largest + 1} ids fit the {rows} rows, padding is {tokenizer.pad_token!r}"


def check_padding_side(tested: ModelUnderTest) -> str:
    """Require padding on the right, which shifts no position."""
    side = tested.tokenizer.padding_side
    if side != "right":
        raise ValueError(
            f"The saved tokenizer pads on the {side}, wanted right. Set padding_side in "
            "tokenizer_config.json to 'right'."
        )
    return "the saved tokenizer pads on the right"


def check_prompt(tested: ModelUnderTest) -> str:
    """Require that the saved tokenizer alone strips texts and adds the prompt."""
    config, tokenizer = tested.config, tested.tokenizer
    prefix, suffix = config.prompt_prefix_ids, config.prompt_suffix_ids
    errors = [
        error
        for text in SHORT_TEXTS
        for error in _find_prompt_errors(text, tested, truncated=False)
    ]
    errors += _find_prompt_errors(
        "a dog on a mat " * config.max_text_length, tested, truncated=True
    )
    text = SHORT_TEXTS[0]
    if tokenizer(f" \n{text}\t ")["input_ids"] != tokenizer(text)["input_ids"]:
        errors.append("spaces around a text are not stripped, so they change its embedding")
    ends_special = bool(suffix) and suffix[-1] in tokenizer.all_special_ids
    if ends_special != config.prompt_suffix_ends_special:
        errors.append(
            f"config.prompt_suffix_ends_special is {config.prompt_suffix_ends_special}, but to the "
            f"tokenizer the last suffix id is {'' if ends_special else 'not '}special; "
            "sentence-transformers would pool instructions wrongly"
        )
    if errors:
        raise ValueError(
            f"{'; '.join(errors[:3])}. Restore tokenizer.json, or write the prompt again with "
            "building.prompts.write_prompt."
        )
    return f"{tokenizer.decode(prefix)!r} … {tokenizer.decode(suffix)!r}, also when truncated"


def check_text_length(tested: ModelUnderTest) -> str:
    """Require the same maximum text length in tokenizer, configuration and processor."""
    found = {
        "config.max_text_length": tested.config.max_text_length,
        "tokenizer.model_max_length": tested.tokenizer.model_max_length,
    }
    if tested.processor is not None:
        found["processor.max_text_length"] = tested.processor.max_text_length
    if len(set(found.values())) != 1:
        raise ValueError(
            "There are different maximum text lengths: "
            f"{', '.join(f'{name}={value}' for name, value in found.items())}. Where they differ, "
            "long texts get different embeddings or are refused. Make them equal."
        )
    return f"{tested.config.max_text_length} tokens in {len(found)} places"


def check_processor(tested: ModelUnderTest) -> str:
    """Load the processor as AutoProcessor does."""
    if not tested.has_processor_files:
        raise NotApplicableError(f"a {tested.model_class.__name__} was saved without a processor")
    processor = load_without_code(AutoProcessor, tested.folder, local_files_only=True)
    if not isinstance(processor, LLM2CLIPProcessor):
        raise ValueError(
            f"AutoProcessor gives {type(processor).__name__}, wanted LLM2CLIPProcessor. Save the "
            "processor with save_pretrained into the folder."
        )
    tested.processor = processor
    return f"AutoProcessor loads it, with {type(processor.image_processor).__name__}"


def check_tokenizer_path(tested: ModelUnderTest) -> str:
    """Require the processor's ids from the bare tokenizer, which pipelines use."""
    if tested.processor is None:
        raise NotApplicableError("there is no processor to compare with")
    bare = tested.tokenizer(
        list(SHORT_TEXTS), padding=True, truncation=True, return_tensors="pt"
    )  # fmt: skip
    processed = tested.processor(text=list(SHORT_TEXTS))
    for name in ("input_ids", "attention_mask"):
        if not torch.equal(bare[name], processed[name]):
            raise ValueError(
                f"AutoTokenizer and AutoProcessor give different {name} "
                f"({_first_difference(bare[name], processed[name])}), so a pipeline and the "
                "processor give different embeddings. Save the processor again into the folder."
            )
    return f"AutoTokenizer and AutoProcessor give the same ids for {len(SHORT_TEXTS)} texts"


def _find_prompt_errors(text: str, tested: ModelUnderTest, *, truncated: bool) -> list[str]:
    config = tested.config
    prefix, suffix = config.prompt_prefix_ids, config.prompt_suffix_ids
    ids = tested.list_ids(text) if truncated else tested.tokenizer(text, verbose=False)["input_ids"]
    when = f" truncated to {config.max_text_length} tokens" if truncated else ""
    shown = f"{text[:24]!r}{when} gives {ids[:12]}…{ids[-4:]}"
    errors = []
    if ids[: len(prefix)] != prefix:
        errors.append(f"{shown}, which does not begin with the prompt {prefix}")
    if suffix and ids[-len(suffix) :] != suffix:
        errors.append(f"{shown}, which does not end with the prompt's suffix {suffix}")
    if truncated and len(ids) != config.max_text_length:
        errors.append(f"{shown}, which has {len(ids)} tokens")
    return errors


def _first_difference(first: Any, second: Any) -> str:
    if first.shape != second.shape:
        return f"shapes {tuple(first.shape)} and {tuple(second.shape)}"
    row, column = (first != second).nonzero()[0].tolist()
    return f"text {row}, token {column}: {int(first[row, column])} and {int(second[row, column])}"
