"""Options of texts or of images alone, which the other modality refuses."""

from __future__ import annotations

from ..configs.encoding_config import EncodingConfig

# Options that a modality has no use for, with their defaults; a command may lack some.
_FOREIGN: dict[str, dict[str, object]] = {
    "text": {"batch_size": None, "num_workers": None, "skip_invalid": False},
    "image": {"token_budget": None},
}


def refuse_foreign_options(config: EncodingConfig, modality: str) -> None:
    """Raise ValueError for options that a modality has no use for.

    Args:
        config: Options of the command.
        modality: text or image.
    """
    foreign = _FOREIGN[modality]
    given = [name for name, default in foreign.items() if getattr(config, name, default) != default]
    if given:
        other = "text" if modality == "image" else "image"
        raise ValueError(
            f"{', '.join(given)}: for --modality {other} alone. Leave it out, or choose that."
        )
