"""Detect the type of a model from its files, never from its name, and open it for evaluation.

| files | model type |
| --- | --- |
| `config.json` with `model_type` `llm2clip` | `llm2clip` |
| `modules.json` | `sentence-transformers` |
| `config.json` with a `model_type` in `DUAL_ENCODERS`, such as `clip` | `transformers` |
| `open_clip_config.json` | `open_clip` |
| `texts.safetensors`, `images.safetensors` | `embeddings` |

The first matching line decides, unless the type is set explicitly.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...configs.encoding_config import DUAL_ENCODERS
from ...configs.evaluation_config import EncoderConfig, EvaluatedModel
from ...data.sources.json_files import read_json
from ...model_folders.model_folder import find_model_folder
from .encoder import EvaluationEncoder
from .open_clip_models import CONFIG_FILE as OPEN_CLIP_CONFIG
from .open_clip_models import WEIGHT_FILES, OpenClipEncoder, find_weights
from .sentence_transformers_models import SentenceTransformerEncoder
from .stored_embeddings import StoredEmbeddingsEncoder, holds_embeddings
from .transformers_models import LLM2CLIPEncoder, TransformersEncoder

_ENCODERS: dict[str, Callable[..., EvaluationEncoder]] = {
    "llm2clip": LLM2CLIPEncoder,
    "sentence-transformers": SentenceTransformerEncoder,
    "transformers": TransformersEncoder,
    "open_clip": OpenClipEncoder,
    "embeddings": StoredEmbeddingsEncoder,
}


def load_encoder(
    model: str | Path | EvaluatedModel, config: EncoderConfig | None = None
) -> EvaluationEncoder:
    """Open a folder or Hub id for evaluation; its weights are loaded when needed."""
    config = config or EncoderConfig()
    if not isinstance(model, EvaluatedModel):
        model = EvaluatedModel(source=str(model))
    source = model.source
    if Path(source).is_file():
        raise ValueError(
            f"{source} is a file, and weights alone do not say how to run the model. Pass a folder "
            "or a Hub id. For open_clip weights, pass a folder with open_clip_config.json, as "
            "written by open_clip's `save_for_hf`."
        )
    path = find_model_folder(source, revision=model.revision)
    model_type = model.model_type or detect_model_type(path)
    if model_type == "open_clip" and not (Path(source).is_dir() or find_weights(path)):
        # Older repositories have only formats that the first download skips. The snapshot folder is
        # named after its commit, which pins the weights to the same commit as the configuration.
        path = find_model_folder(source, revision=path.name, only=WEIGHT_FILES)
    return _ENCODERS[model_type](path, config, source=source)


def detect_model_type(folder: Path) -> str:
    file = folder / "config.json"
    content = read_json(file) if file.is_file() else None
    model_type = str(content.get("model_type")) if isinstance(content, dict) else None
    if model_type == "llm2clip":
        return "llm2clip"
    if (folder / "modules.json").is_file():
        return "sentence-transformers"
    if model_type in DUAL_ENCODERS:
        return "transformers"
    if (folder / OPEN_CLIP_CONFIG).is_file():
        return "open_clip"
    if holds_embeddings(folder):
        return "embeddings"
    evidence = "no config.json" if model_type is None else f"model_type {model_type!r}"
    raise ValueError(
        f"Cannot detect the model type of {folder}, which has {evidence}. Pass --model-type if it "
        f"is one of {', '.join(_ENCODERS)}."
    )
