"""Uploaded files use the private names of libraries that are listed here, and no others.

A new release may change them without notice, so this table is where to look first.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.utils import hub

import modeling_llm2clip

UPLOADED = [p for p in Path(modeling_llm2clip.__path__[0]).glob("*.py") if p.name[0] != "_"]
_BASES = (PreTrainedModel, PreTrainedConfig, ProcessorMixin, nn.Module)
_FOR_CUSTOM_MODELS = "transformers' interface for custom models has no other name"
_OF_CACHED_FILE = "otherwise cached_file raises for an index that a repository lacks"
# Name → reason why no public one takes its place from transformers 5.6 to the newest release.
PRIVATE = {
    "_apply": "torch casts a module through it alone, and rotary frequencies must stay float32",
    "_attn_implementation": "there is no public getter, and a pack must set what set_attn_"
    "implementation checks and warns of at each pass",
    "_auto_class": _FOR_CUSTOM_MODELS,
    "_from_config": "from_config is a method of Auto classes alone, and some towers are in none",
    "_hf_peft_config_loaded": "active_adapters raises an error if there is no adapter",
    "_init_weights": _FOR_CUSTOM_MODELS,
    "_keep_in_fp32_modules_strict": _FOR_CUSTOM_MODELS,
    "_keys_to_ignore_on_load_unexpected": _FOR_CUSTOM_MODELS,
    "_no_split_modules": _FOR_CUSTOM_MODELS,
    "_raise_exceptions_for_connection_errors": _OF_CACHED_FILE,
    "_raise_exceptions_for_gated_repo": _OF_CACHED_FILE,
    "_raise_exceptions_for_missing_entries": _OF_CACHED_FILE,
    "_set_gradient_checkpointing": "activation_checkpointing_enable, from 5.24 on, calls it for the"
    " whole model, which misses timm networks",
    "_supports_attention_backend": _FOR_CUSTOM_MODELS,
    "_supports_flash_attn": _FOR_CUSTOM_MODELS,
    "_supports_flex_attn": _FOR_CUSTOM_MODELS,
    "_supports_sdpa": _FOR_CUSTOM_MODELS,
    # Public, but superseded by `sub_configs_defaults` in 5.24, which 5.6 lacks and which takes the
    # place of our own checks of a tower's configuration.
    "sub_configs": "read by every release",
}
_OF_TIMM = {"_get_pos_embed_values": "timm has no public list of the values that it resizes"}


def list_names(path: Path) -> Iterator[str]:
    """List attributes, keywords and members of classes, as they are used or defined in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Attribute(attr=name) | ast.FunctionDef(name=name):
                yield name
            case ast.keyword(arg=str(name)) | ast.Name(id=name):
                yield name
            case ast.Constant(value=str(name)):  # of getattr
                yield name


def is_private(name: str) -> bool:
    return name == "sub_configs" or (name[:1] == "_" != name and name[:2] != "__")


def test_uploaded_files_use_the_listed_private_names_of_libraries_and_no_others() -> None:
    hub_options = inspect.getsource(hub)
    used = {name for path in UPLOADED for name in list_names(path) if is_private(name)}

    def is_of_a_library(name: str) -> bool:
        owners: tuple[Any, ...] = _BASES
        return any(hasattr(owner, name) for owner in owners) or f"{name}:" in hub_options

    assert {name for name in used if is_of_a_library(name)} == set(PRIVATE)
    assert used >= set(_OF_TIMM)
