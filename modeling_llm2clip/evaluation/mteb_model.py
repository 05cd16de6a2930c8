"""A saved model as mteb takes it: mteb's own wrapper of sentence-transformers, fully described.

mteb wraps a `SentenceTransformer` by itself, but then takes it for a model of texts and knows
neither its name nor its revision. On the Hub it reads all of these from the repository.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from mteb.models import ModelMeta, SentenceTransformerEncoderWrapper
from sentence_transformers import SentenceTransformer

from ..configuration_llm2clip import LLM2CLIPConfig
from ..encoding.fingerprint import fingerprint_weights
from ..encoding.training_state import warn_of_untrained
from .encoders.files import hash_files


def open_for_mteb(
    folder: str | Path, *, name: str | None = None, device: str | None = None
) -> SentenceTransformerEncoderWrapper:
    """Load an exported folder for `mteb.evaluate`, texts and pictures alike.

    The revision is a digest of weights and settings, so that mteb's store of results cannot give
    one model's scores for another of the same name.

    Args:
        folder: as `export_model` writes it.
        name: `organization/model` in mteb's results; `local/` and the folder's name unless given.
        device: where to load it; sentence-transformers chooses unless given.
    Raises: ValueError for a folder without `modules.json`, or a name without organization.
    """
    folder = Path(folder)
    if not (folder / "modules.json").is_file():
        raise ValueError(
            f"{folder} has no modules.json, which sentence-transformers needs. Give the folder of "
            "an exported model (`llm2clip export`, or `export_model`)."
        )
    name = f"local/{folder.resolve().name}" if name is None else name
    if name.count("/") != 1:
        raise ValueError(f"name={name!r} must be `organization/model`: mteb files results by it.")
    warn_of_untrained(LLM2CLIPConfig.from_pretrained(folder), folder)
    model = SentenceTransformer(
        str(folder), device=device, trust_remote_code=False, local_files_only=True
    )
    wrapper = SentenceTransformerEncoderWrapper(model)
    wrapper.mteb_model_meta = _describe(wrapper.mteb_model_meta, model, folder, name=name)
    return wrapper


def _describe(
    found: ModelMeta, model: SentenceTransformer, folder: Path, *, name: str
) -> ModelMeta:
    """Complete what mteb finds by itself: widths, longest text, similarity, framework."""
    network = model[0].auto_model
    embedding = network.text_model.get_input_embeddings()
    described: ModelMeta = found.model_copy(
        update={
            "name": name,
            "revision": _digest(folder),
            "modalities": sorted(model.modalities),
            "n_parameters": sum(weight.numel() for weight in network.parameters()),
            # mteb multiplies the vocabulary by the width of the shared space.
            "n_embedding_parameters": embedding.weight.numel(),
            "memory_usage_mb": sum(w.nbytes for w in network.parameters()) / 2**20,
            "use_instructions": any(prompt for prompt in model.prompts.values()),
        }
    )
    return described


def _digest(folder: Path) -> str:
    """Forty hexadecimal digits, as a commit has."""
    weights, settings = fingerprint_weights(folder)["weights"], hash_files(folder, ["**/*.json"])
    return hashlib.sha256(f"{weights} {settings}".encode()).hexdigest()[:40]
