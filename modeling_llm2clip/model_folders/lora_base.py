"""What an adapter's folder holds and says of its base, by name, by weights, or by how it began."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open

ADAPTER_SETTINGS = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Values of peft's `init_lora_weights` that leave the base as it is; others take a part out of it.
PLAIN_STARTS = (True, False, None, "gaussian")
# In the metadata of an adapter's weights: SHA-256 of the LLM's that it was trained on.
BASE_WEIGHTS = "base_weights"


def is_same_base(stated: str, base: str) -> bool:
    """Whether two names are of one LLM; owners and case are not compared."""
    return _last_part(stated) == _last_part(base)


def require_base_weights(file: Path, weights: str) -> None:
    """Raise ValueError when an adapter says that it was trained on other weights.

    The name does not tell: an LLM that an adapter was merged into keeps it.

    Args:
        file: the adapter's weights; those of another package do not say.
        weights: SHA-256 of the LLM's, from `fingerprint_text`.
    """
    with safe_open(file, framework="pt") as opened:
        trained_on = (opened.metadata() or {}).get(BASE_WEIGHTS)
    if trained_on is not None and trained_on != weights:
        raise ValueError(
            f"{file.parent} was trained on an LLM with other weights ({trained_on} then, {weights} "
            "now). Begin from it on that very model, which it must not be merged into."
        )


def _last_part(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1].casefold()
