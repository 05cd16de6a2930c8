"""Strict loading: every weight has its place, and no code of a tower's own is run.

Travels to the Hub beside the weights.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoModel, PreTrainedConfig, PreTrainedModel


def build_tower(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a tower of transformers' own class, with random weights.

    Its configuration may still name the code of the repository it came from. That code is never
    run: what is not in transformers is refused instead of asked about.
    """
    return AutoModel.from_config(config, trust_remote_code=False)  # type: ignore[no-any-return]


def refuse_unaccounted_keys(cls: type, info: dict[str, Any], *, allow_misshapen: bool) -> None:
    """Raise ValueError for weights that are missing, unexpected or of another shape.

    Args:
        info: transformers' loading info.
        allow_misshapen: leave weights of another shape as they were initialized.
    """
    mismatched = {} if allow_misshapen else {key[0]: key[1:] for key in info["mismatched_keys"]}
    missing = sorted(set(info["missing_keys"]) - {key[0] for key in info["mismatched_keys"]})
    unexpected = sorted(info["unexpected_keys"])
    if not (mismatched or missing or unexpected):
        return
    raise ValueError(
        f"{cls.__name__}: the weights do not fit the configuration, and nothing is guessed. "
        f"Missing ({len(missing)}): {missing[:8]}. Unexpected ({len(unexpected)}): "
        f"{unexpected[:8]}. Of another shape ({len(mismatched)}; saved, wanted): "
        f"{dict(list(mismatched.items())[:8])}. Use the class that saved the folder (text-only: "
        "LLM2CLIPTextModel, picture-only: LLM2CLIPVisionModel), the transformers version it names, "
        "or convert the checkpoint again."
    )
