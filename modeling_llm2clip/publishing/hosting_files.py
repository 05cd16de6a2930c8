"""What a model folder needs beside its weights to run on a host: Inference Endpoints, Spaces."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..configs.export_config import ExportConfig
from ..configuration_llm2clip import LLM2CLIPConfig

_TEMPLATES = Path(__file__).parent / "templates"
_SPACE = "space"
# The oldest that the page was written for; another is pinned where it is installed.
_GRADIO = "6.31.0"
_PILLOW_OF_GRADIO = "pillow>=12,<13"
_TIMM_TYPE = "timm_wrapper"
_SPACE_CARD = """---
title: {title}
sdk: gradio
sdk_version: {gradio}
app_file: app.py
python_version: "3.11"
---

A page for {name}, an LLM2CLIP model: labels of an image, and search in a few images.

The model is found where this Space's variables say, `MODEL_ID` (its repository) and
`MODEL_REVISION` (a commit there), or else beside `app.py`.
"""


def render_hosting_files(
    config: ExportConfig, model_config: LLM2CLIPConfig, *, name: str
) -> dict[str, str]:
    """Render the files that an export writes for hosts.

    The versions of packages are those of this environment, in which the embeddings of the folder
    are recorded.

    Args:
        config: Which hosts are wanted.
        model_config: Configuration of the model that is written.
        name: What the page of a Space calls the model.

    Returns:
        Path in the folder → content; empty where no host is wanted.
    """
    files = {}
    requirements = list(_list_requirements(model_config))
    if config.handler:
        files["handler.py"] = _read_template("endpoint_handler.py")
        files["requirements.txt"] = _join(requirements)
    if config.space:
        gradio = _find_version("gradio", default=_GRADIO)
        of_space = [one for one in requirements if not one.startswith("pillow")]
        files[f"{_SPACE}/app.py"] = _read_template("space_app.py").replace(
            'TITLE = "LLM2CLIP"', f"TITLE = {name!r}"
        )
        files[f"{_SPACE}/requirements.txt"] = _join([*of_space, _pin_pillow_for_gradio()])
        files[f"{_SPACE}/README.md"] = _SPACE_CARD.format(
            name=name, title=json.dumps(name), gradio=gradio
        )
    return files


def _list_requirements(model_config: LLM2CLIPConfig) -> Iterator[str]:
    """Yield what the model's code needs, each in the version that is installed here."""
    names = ["accelerate", "numpy", "pillow", "safetensors", "torch", "torchvision", "transformers"]
    if getattr(model_config.vision_config, "model_type", None) == _TIMM_TYPE:
        names.append("timm")
    for name in sorted(names):
        yield f"{name}=={_find_version(name)}"


def _pin_pillow_for_gradio() -> str:
    """Gradio takes no later pillow, beside which pip would install a gradio of years ago."""
    found = _find_version("pillow")
    return f"pillow=={found}" if found.split(".")[0] == "12" else _PILLOW_OF_GRADIO


def _find_version(name: str, *, default: str | None = None) -> str:
    """Return the installed version, without what names a build, such as `+cpu`."""
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        if default is None:
            raise
        return default


def _join(requirements: list[str]) -> str:
    return "".join(f"{one}\n" for one in sorted(requirements))


def _read_template(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")
