"""Detects from small files what a folder or Hub repository holds, and which command takes it.

Needs no torch and no weights, so that a wrong folder is reported at once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .model_folder import LORA_CONFIG, fetch_hub_file, is_hub_id, require_there

# Of a folder of ONNX graphs: what was exported, how it was checked, and with what result.
ONNX_RECORD = "onnx_export.json"
# Whole models with a text encoder of their own.
_CLIPS = {"clip", "siglip", "siglip2", "chinese_clip", "altclip"}
_VISION_FIELDS = ("image_size", "patch_size", "num_channels", "hidden_sizes")
_FOLDERS_SHOWN = 4


@dataclass(frozen=True)
class FoundModel:
    """The content of a folder or Hub repository.

    Attributes:
        content: `"llm2clip"`, `"onnx"`, `"official"`, `"clip"`, `"vision"`, `"text"`, `"lora"`,
            `"store"`, `"sentence-transformers"`, `"above"` (the parent folder of models), or
            `"other"`.
        advice: A sentence with the content and the command that takes it; empty for `"llm2clip"`.
    """

    content: str
    advice: str = ""


def find_model_type(source: str | Path, *, revision: str | None = None) -> FoundModel | None:
    """Look at the small files of a folder or Hub repository; None where they show nothing."""
    folder = Path(source)
    if not folder.is_dir():
        file = is_hub_id(source) and fetch_hub_file(source, "config.json", revision=revision)
        config = read_json_object(file) if file else None
        return None if config is None else _judge_config(str(source), config)
    if holds_graphs(folder):
        return FoundModel(
            "onnx",
            f"{folder} is a folder of ONNX graphs, for `llm2clip serve` and `llm2clip embed` with "
            "--backend onnx, for `llm2clip search` with --model, and for load_onnx_encoder.",
        )
    if (folder / "config.json").is_file():
        config = read_json_object(folder / "config.json")
        is_own = config is not None and config.get("model_type") == "llm2clip"
        if (folder / "modules.json").is_file() and not is_own:
            return FoundModel(
                "sentence-transformers",
                f"{folder} is a sentence-transformers model. `llm2clip evaluate {folder}` "
                "measures it as it is.",
            )
        return None if config is None else _judge_config(str(folder), config)
    return _judge_other_files(folder)


def holds_graphs(source: str | Path | None) -> bool:
    """Return whether a model is a local folder of ONNX graphs."""
    return source is not None and (Path(source) / ONNX_RECORD).is_file()


def require_own_model(source: str | Path, *, revision: str | None = None) -> None:
    """Refuse a source that is not an LLM2CLIP model, and name the command that takes it."""
    require_there(source)
    found, folder = find_model_type(source, revision=revision), Path(source)
    # Weights that have lost their config may be a model's, which `doctor` explains.
    is_model = (folder / "config.json").is_file() or any(folder.glob("*.safetensors"))
    if found is None and folder.is_dir() and not is_model:
        raise ValueError(
            f"{source} is not a model folder: it has no config.json and no weights. Give the "
            "folder or Hub id of an LLM2CLIP model."
        )
    if found is not None and found.content != "llm2clip":
        raise ValueError(f"{found.advice} An LLM2CLIP model is needed here.")


def read_json_object(file: Path) -> dict[str, Any] | None:
    """Read a JSON file; None where it is damaged or holds no object."""
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:  # damaged, which loading the model reports
        return None
    return content if isinstance(content, dict) else None


def _judge_config(name: str, config: dict[str, Any]) -> FoundModel | None:
    """Judge by `config.json`; None where it does not show the model type."""
    model_type = config.get("model_type")
    if model_type == "llm2clip":
        return FoundModel("llm2clip")
    architectures = [str(item) for item in config.get("architectures") or []]
    if any(item.startswith("LLM2CLIP") for item in architectures):
        return FoundModel(
            "official",
            f"{name} is an official LLM2CLIP checkpoint. `llm2clip convert {name} OUTPUT "
            "--source-format NAME --text-model TEXT_MODEL` makes a model of it.",
        )
    if model_type in _CLIPS:
        return FoundModel(
            "clip",
            f"{name} is a {model_type!r}, which has a text encoder of its own. `llm2clip build "
            f"{name} TEXT_MODEL OUTPUT` makes an LLM2CLIP model of its vision tower, `llm2clip "
            f"evaluate {name}` measures it as it is.",
        )
    writes = any(item.endswith(("ForCausalLM", "ConditionalGeneration")) for item in architectures)
    if writes or "vocab_size" in config:
        return FoundModel(
            "text",
            f"{name} is a language model ({model_type!r}). `llm2clip build VISION_MODEL "
            f"{name} OUTPUT` makes an LLM2CLIP model of it and a vision tower.",
        )
    if model_type == "timm_wrapper" or any(field in config for field in _VISION_FIELDS):
        return FoundModel(
            "vision",
            f"{name} is a vision tower ({model_type!r}). `llm2clip build {name} TEXT_MODEL "
            "OUTPUT` makes an LLM2CLIP model of it and a language model.",
        )
    if model_type is None:
        return None
    return FoundModel("other", f"{name} is a {model_type!r}, which no command takes as a model.")


def _judge_other_files(folder: Path) -> FoundModel | None:
    """Judge a folder without `config.json`."""
    if (folder / LORA_CONFIG).is_file():
        return FoundModel(
            "lora",
            f"{folder} is a LoRA. `llm2clip build VISION_MODEL TEXT_MODEL OUTPUT "
            f"--lora {folder}` merges it into its LLM, `llm2clip finetune-llm MODEL DATA OUTPUT "
            f"--init-lora {folder}` continues from it.",
        )
    if (folder / "manifest.json").is_file():
        return FoundModel(
            "store",
            f"{folder} is an embedding store. `llm2clip align MODEL DATA OUTPUT --caption-store "
            f"{folder}` trains on it (--image-store for one of images).",
        )
    inside = sorted(path.parent for path in folder.glob("*/config.json"))
    if not inside:
        return None
    shown = ", ".join(map(str, inside[:_FOLDERS_SHOWN]))
    more = f" and {len(inside) - _FOLDERS_SHOWN} more" if len(inside) > _FOLDERS_SHOWN else ""
    return FoundModel(
        "above",
        f"{folder} has no config.json; it is the parent folder of {shown}{more}. Give that one.",
    )
