"""Detects the type of model in a folder, from its files and never from its name.

| files | model type |
| --- | --- |
| `config.json` with `model_type` `llm2clip` | `llm2clip` |
| `modules.json` | `sentence-transformers` |
| `config.json` with a `model_type` in `DUAL_ENCODERS`, such as `clip` | `transformers` |
| `open_clip_config.json` | `open_clip` |
| `texts.safetensors`, `images.safetensors`, or a store of `llm2clip extract` | `embeddings` |

The first line that fits decides, unless a type is given.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...configs.encoding_config import DUAL_ENCODERS
from ...configs.evaluation_config import EncoderConfig, EvaluatedModel
from ...data.sources.json_files import read_json
from ...model_folders.model_folder import find_model_folder
from .encoder import EvaluationEncoder
from .llm2clip import LLM2CLIPEncoder
from .open_clip_models import CONFIG_FILE as OPEN_CLIP_CONFIG
from .open_clip_models import WEIGHT_FILES, OpenClipEncoder, find_weights
from .sentence_transformers_models import SentenceTransformerEncoder
from .stored_embeddings import StoredEmbeddingsEncoder, holds_embeddings
from .transformers_models import TransformersEncoder

_ENCODERS: dict[str, Callable[..., EvaluationEncoder]] = {
    "llm2clip": LLM2CLIPEncoder,
    "sentence-transformers": SentenceTransformerEncoder,
    "transformers": TransformersEncoder,
    "open_clip": OpenClipEncoder,
    "embeddings": StoredEmbeddingsEncoder,
}
# Fields of `EvaluatedModel` that one type of model takes.
_OPTIONS = {
    "architecture": "open_clip",
    "activation": "open_clip",
    "extracted_from": "embeddings",
    "head": "embeddings",
}


def load_encoder(
    model: str | Path | EvaluatedModel, config: EncoderConfig | None = None
) -> EvaluationEncoder:
    """Open a model for evaluation; its weights are loaded when they are needed.

    The source is a folder, a Hub id, or, of open_clip alone, a weights file with the name of its
    architecture.
    """
    config = config or EncoderConfig()
    if not isinstance(model, EvaluatedModel):
        model = EvaluatedModel(source=str(model))
    source = model.source
    is_file = Path(source).is_file()
    path = Path(source) if is_file else find_model_folder(source, revision=model.revision)
    model_type = model.model_type or ("open_clip" if is_file else detect_model_type(path))
    if model_type == "open_clip" and not (is_file or Path(source).is_dir() or find_weights(path)):
        # Older repositories have them in another format only, which nothing else reads. A snapshot
        # is named by its commit, so that configuration and weights are of one.
        path = find_model_folder(source, revision=path.name, only=WEIGHT_FILES)
    if is_file and model_type != "open_clip":
        raise ValueError(f"{source} is a file; {model_type} takes a folder or a Hub id.")
    options = {name: getattr(model, name) for name in _OPTIONS if getattr(model, name) is not None}
    for name in options:
        if model_type != _OPTIONS[name]:
            raise ValueError(
                f"{name} is only for a model of type {_OPTIONS[name]}, and this one has type "
                f"{model_type}. Leave it out."
            )
    return _ENCODERS[model_type](path, config, source=source, **options)


def detect_model_type(folder: Path) -> str:
    model_type = _read_model_type(folder)
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
    found = "no config.json" if model_type is None else f"model_type {model_type!r}"
    raise ValueError(
        f"Cannot detect the model type of {folder}, which has {found}. Pass --model-type if it is "
        f"one of {', '.join(_ENCODERS)}."
    )


def _read_model_type(folder: Path) -> str | None:
    file = folder / "config.json"
    if not file.is_file():
        return None
    content = read_json(file)
    return str(content.get("model_type")) if isinstance(content, dict) else None
