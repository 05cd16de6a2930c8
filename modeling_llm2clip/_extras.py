"""Maps optional packages to the extras in `setup.cfg`, and raises an error for a missing package.

Imports only the standard library, so commands can check their packages before anything else.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import NamedTuple


class Need(NamedTuple):
    """An optional package and why it is needed.

    Attributes:
        module: Name to import.
        extra: Extra in `setup.cfg` that installs the package.
        reason: Why the package is needed, such as "the vision tower is a timm network".
    """

    module: str
    extra: str
    reason: str


# These needs depend on the user's options, not on a model's files.
DEMO = tuple(
    Need(module, "demo", reason)
    for module, reason in (
        ("datasets", "the demo trains like llm2clip train"),
        ("gguf", "the demo's language model is a .gguf file"),
        ("peft", "the demo merges a LoRA"),
        ("sentence_transformers", "the demo also loads the model with it"),
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
WEB_SERVERS = Need("aiohttp", "remote", "reads from web servers")
REMOTE_STREAMS = Need("torchdata", "remote", "resumes a stream")
ONNX_RUNTIME = Need("onnxruntime", "onnx", "runs ONNX graphs")
ONNX_EXPORT = tuple(
    Need(module, "onnx", "writes and checks ONNX graphs")
    for module in ("onnx", "onnxscript", "onnxruntime")
)
OPEN_CLIP = Need("open_clip", "baselines", "the model is an open_clip model")
CLIP_TOKENS = Need("open_clip", "baselines", "the task length counts CLIP tokens")
SENTENCE_TRANSFORMERS = Need(
    "sentence_transformers", "sentence-transformers", "the model is a sentence-transformers model"
)
EMBEDDER = Need("sentence_transformers", "sentence-transformers", "the text tower is an embedder")
RAY = Need("ray", "ray", "the engine is Ray Data")
RAY_SERVE = Need("ray", "ray", "replicas run under Ray Serve")
SERVE = tuple(
    Need(module, "serve", "serves the model over HTTP")
    for module in ("fastapi", "prometheus_client", "python_multipart", "uvicorn")
)
PAGE = Need("gradio", "serve", "shows the page at / (--no-page disables it)")
ANN = Need("faiss", "ann", "finds the nearest of more than 20,000 groups of captions")
LANCEDB = Need("lancedb", "search", "the image index is a LanceDB database")


def list_needs_of_index(location: str | None) -> list[Need]:
    """List the packages for an image index's database; empty if there is no database."""
    return [] if location is None else [LANCEDB]


class MissingExtraError(ImportError):
    """Optional packages are missing; the message has the command that installs them."""


def require(*needs: Need) -> None:
    """Raise MissingExtraError if packages are not installed, and name their extras."""
    missing = [need for need in dict.fromkeys(needs) if not is_installed(need.module)]
    if missing:
        listed = "; ".join(f"{need.module} ({need.reason})" for need in missing)
        extras = ",".join(sorted({need.extra for need in missing}))
        raise MissingExtraError(
            f'not installed: {listed}. Run: pip install "modeling_llm2clip[{extras}]"'
        )


def is_installed(module: str) -> bool:
    """Return whether a package can be imported, without importing it, which may take seconds.

    A folder with the same name in the working directory, such as `datasets`, does not count.
    """
    if module in sys.modules:
        return sys.modules[module] is not None
    try:
        spec = find_spec(module)
    except ImportError:  # raised by tools that block imports
        return False
    return spec is not None and spec.origin is not None
