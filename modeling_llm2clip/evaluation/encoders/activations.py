"""Which activation a tower runs with: no weight tells it, and a wrong one costs a score."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ACTIVATIONS = ("gelu", "quick_gelu")
OF_ITS_TOWER = "of its tower"
# Families of transformers call the same thing differently.
_FIELDS = ("hidden_act", "hidden_activation", "activation_function", "feed_forward_proj")


def describe_activation(config: Any) -> str:
    """The activation that a configuration of transformers names, if it names one.

    Args:
        config: of a tower, as an object or as its JSON.
    """
    fields = config if isinstance(config, Mapping) else config.to_dict()
    found = next((fields[name] for name in _FIELDS if isinstance(fields.get(name), str)), None)
    return OF_ITS_TOWER if found is None else str(found)


def describe_open_clip_activations(model_config: Mapping[str, Any]) -> dict[str, str]:
    """The activation of each side of an open_clip model, by `text` and `images`.

    Towers of timm and transformers have one of their own, which `quick_gelu` does not reach.
    """
    own = ACTIVATIONS[bool(model_config.get("quick_gelu"))]
    is_foreign = {
        "text": "hf_model_name" in model_config.get("text_cfg", {}),
        "images": "timm_model_name" in model_config.get("vision_cfg", {}),
    }
    return {side: OF_ITS_TOWER if foreign else own for side, foreign in is_foreign.items()}
