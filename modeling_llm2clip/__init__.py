"""LLM2CLIP: CLIP with a language model as its text encoder (arXiv:2411.04997).

Importing the package makes `AutoModel`, `AutoProcessor` and the other Auto classes of transformers
load its checkpoints without `trust_remote_code`. Names are imported when they are first used, so
that the import itself costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._registration import register_auto_classes

if TYPE_CHECKING:
    from .configuration_llm2clip import LLM2CLIPConfig
    from .modeling_llm2clip import (
        LLM2CLIPModel,
        LLM2CLIPOutput,
        LLM2CLIPTextModel,
        LLM2CLIPVisionModel,
    )
    from .processing_llm2clip import LLM2CLIPProcessor

__version__ = "0.1.0"
__all__ = [
    "LLM2CLIPConfig",
    "LLM2CLIPModel",
    "LLM2CLIPOutput",
    "LLM2CLIPProcessor",
    "LLM2CLIPTextModel",
    "LLM2CLIPVisionModel",
]

_HOME = {
    "LLM2CLIPConfig": "configuration_llm2clip",
    "LLM2CLIPModel": "modeling_llm2clip",
    "LLM2CLIPOutput": "modeling_llm2clip",
    "LLM2CLIPTextModel": "modeling_llm2clip",
    "LLM2CLIPVisionModel": "modeling_llm2clip",
    "LLM2CLIPProcessor": "processing_llm2clip",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {__all__}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_auto_classes()
