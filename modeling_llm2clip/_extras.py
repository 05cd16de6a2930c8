"""Which optional package is in which extra of `setup.cfg`, and the error for one that is missing.

Imports nothing but the standard library, so that a command can look before it does anything else.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import NamedTuple


class Need(NamedTuple):
    """An optional package that something needs.

    Attributes:
        module: as it is imported.
        extra: of `setup.cfg`, which installs it.
        reason: what needs it, as in "the vision tower is a timm network".
    """

    module: str
    extra: str
    reason: str


# What cannot be told from a model's files, but from what a user asks for.
DEMO = tuple(
    Need(module, "demo", reason)
    for module, reason in (
        ("gguf", "the demo's language model is a .gguf file"),
        ("peft", "the demo merges a LoRA"),
        ("sentence_transformers", "the demo loads the model once more with it"),
        ("timm", "the demo's vision tower is a timm network"),
    )
)
CAPTION_TUNING = tuple(
    Need(module, "train", "trains the LoRA")
    for module in ("datasets", "peft", "sentence_transformers")
)
LORA = Need("peft", "train", "trains or merges a LoRA")
TIMM_TOWER = Need("timm", "timm", "the vision tower is a timm network")
GGUF = Need("gguf", "gguf", "the language model is a .gguf file")
PARQUET = Need("datasets", "parquet", "reads Parquet")
ONNX = Need("onnx", "onnx", "the part is an ONNX file")
OPEN_CLIP = Need("open_clip", "baselines", "the model is one of open_clip")
CLIP_TOKENS = Need("open_clip", "baselines", "the task length counts the tokens of CLIP")
SENTENCE_TRANSFORMERS = Need(
    "sentence_transformers", "sentence-transformers", "the model is one of sentence-transformers"
)
PLOTS = Need("matplotlib", "plots", "draws plots")


class MissingExtraError(ImportError):
    """Optional packages are not installed; the message says what to run."""


def require(*needs: Need) -> None:
    """Raise MissingExtraError that names every missing package, why, and the extras to install."""
    missing = [need for need in dict.fromkeys(needs) if not is_installed(need.module)]
    if missing:
        listed = "; ".join(f"{need.module} ({need.reason})" for need in missing)
        extras = ",".join(sorted({need.extra for need in missing}))
        raise MissingExtraError(
            f'not installed: {listed}. Run: pip install "modeling_llm2clip[{extras}]"'
        )


def is_installed(module: str) -> bool:
    """Whether a package can be imported; it is not imported, which may take seconds.

    A folder of that name in the working directory, such as `datasets`, is no package.
    """
    if module in sys.modules:
        return sys.modules[module] is not None
    try:
        spec = find_spec(module)
    except ImportError:  # as what blocks imports raises
        return False
    return spec is not None and spec.origin is not None
