"""Whether a model was trained: random projections give meaningless embeddings."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from ..configuration_llm2clip import LLM2CLIPConfig

_VISION_ONLY = ["LLM2CLIPVisionModel"]


def find_untrained_parts(config: LLM2CLIPConfig) -> tuple[str, ...]:
    """List the parts that still have their initial random weights.

    Args:
        config: Configuration of a model.
    """
    has_text = config.architectures != _VISION_ONLY
    return (
        *(["text adapter"] if has_text and not config.text_adapter_trained else []),
        *([] if config.projections_trained else ["projections"]),
    )


def describe_untrained(config: LLM2CLIPConfig) -> str | None:
    """Describe which parts are untrained, and what to do.

    Args:
        config: Configuration of a model.

    Returns:
        A sentence without its subject; None for a trained model.
    """
    parts = find_untrained_parts(config)
    if not parts:
        return None
    remedy = "; ".join(f"model.config.{name} = True" for name in _list_flags(parts))
    return (
        f"untrained: random weights are left in its {' and '.join(parts)}. Train them first "
        f"(llm2clip align). If a training loop of your own did: {remedy}; "
        "model.save_pretrained(FOLDER)"
    )


def require_trained(
    model_or_config: Any, *, purpose: str, source: str | Path | None = None
) -> None:
    """Refuse a model whose projections are random.

    Args:
        model_or_config: Loaded model, or its `LLM2CLIPConfig`.
        purpose: What the model is refused for, such as `"search"`.
        source: How the user named the model.

    Raises:
        ValueError: They are random.
    """
    config: LLM2CLIPConfig = getattr(model_or_config, "config", model_or_config)
    if not config.projections_trained:
        name = source or config._name_or_path or "The model"
        raise ValueError(f"{name} is refused for {purpose}. It is {describe_untrained(config)}.")


def warn_of_untrained(config: LLM2CLIPConfig, source: str | Path) -> None:
    """Warn where an untrained model is evaluated, which is allowed, as a baseline.

    Args:
        config: Configuration of the model.
        source: How the user named the model.
    """
    if state := describe_untrained(config):
        warnings.warn(f"{source} is {state}.", stacklevel=3)


def _list_flags(parts: tuple[str, ...]) -> list[str]:
    return [f"{part.replace(' ', '_')}_trained" for part in parts]
