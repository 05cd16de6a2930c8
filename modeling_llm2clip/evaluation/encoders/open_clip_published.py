"""What a weights file of open_clip does not say, told from the published models of its shape.

Means, resizing and activation are in no weights, and a wrong one costs a score without a word. So
each is taken only where all published models of an architecture agree on it.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

from ..._extras import OPEN_CLIP, Need, require
from .activations import ACTIVATIONS

_PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")
_SUFFIX = "-quickgelu"
_SHOWN = 4


def find_preprocessing(architecture: str, *, source: str) -> dict[str, Any]:
    """How images are prepared for every published model of an architecture of open_clip.

    Returns: mean, std, interpolation and resize mode, as `open_clip_config.json` has them.
    Raises: ValueError when no model of it is published, or they differ.
    """
    open_clip = import_open_clip()
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    known = [open_clip.get_pretrained_cfg(architecture, tag) for tag in tags]
    settings = [{key: cfg[key] for key in _PREPROCESSING if key in cfg} for cfg in known]
    if not settings or any(other != settings[0] for other in settings):
        raise ValueError(
            f"{source} is a weights file, which does not say how its images are prepared, and "
            f"open_clip's {len(tags)} published models of {architecture} do not "
            f"{'agree on it' if tags else 'say it either'}. Get the repository's folder, with "
            "open_clip_config.json."
        )
    return settings[0]


def find_activation(architecture: str, *, given: str | None, source: str) -> str:
    """The activation of a weights file: `gelu` or `quick_gelu`, which have the same weights.

    An architecture that has QuickGELU in its own configuration says it; the plain name of one that
    is published both ways does not.

    Args:
        given: what the user says it is, which settles what the names leave open.
    Raises: ValueError when it cannot be told, or the user's word and the architecture's differ.
    """
    if given is not None and given not in ACTIVATIONS:
        raise ValueError(f"activation={given!r} is none of {ACTIVATIONS}.")
    open_clip = import_open_clip()
    if open_clip.get_model_config(architecture).get("quick_gelu", False):
        if given == "gelu":
            raise ValueError(
                f"{architecture} has quick_gelu, and activation is 'gelu'. Name the architecture "
                f"without it: {architecture.removesuffix(_SUFFIX)}."
            )
        return "quick_gelu"
    if given is not None:
        return given
    tags: dict[str, list[str]] = {name: [] for name in ACTIVATIONS}
    for tag in open_clip.list_pretrained_tags_by_model(architecture):
        is_quick = bool(open_clip.get_pretrained_cfg(architecture, tag).get("quick_gelu"))
        tags[ACTIVATIONS[is_quick]].append(tag)
    if not tags["quick_gelu"]:
        return "gelu"
    shown = "; ".join(
        f"{name}: {', '.join(of_it[:_SHOWN])}{', …' if len(of_it) > _SHOWN else ''}"
        for name, of_it in tags.items()
        if of_it
    )
    agree = "are all of quick_gelu" if not tags["gelu"] else "differ in it"
    raise ValueError(
        f"{source} is a weights file, which does not say its activation; {architecture} stands for "
        f"gelu, and open_clip's published models of it {agree} ({shown}). Name "
        f"{architecture}{_SUFFIX}, or the activation (--activation gelu or quick_gelu)."
    )


def refuse_torchscript(file: Path, *, source: str) -> None:
    """Raise ValueError for a TorchScript archive, as OpenAI published CLIP: it holds code."""
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        if not any(name.endswith("/constants.pkl") for name in archive.namelist()):
            return
    raise ValueError(
        f"{source} is a TorchScript archive, which holds code that is never run here. Take the "
        "same weights as a folder, such as openai/clip-vit-base-patch32, or as safetensors."
    )


def import_open_clip(need: Need = OPEN_CLIP) -> Any:
    """Import open_clip.

    Raises: MissingExtraError saying how to install it.
    """
    require(need)
    import open_clip

    return open_clip
