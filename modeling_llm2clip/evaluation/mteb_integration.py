"""A saved model as mteb takes it: mteb's own wrapper of sentence-transformers, fully described.

A published model needs this only for tasks that join an image and a text in one input:
`mteb.get_model("owner/model")` reads from the repository that it is a sentence-transformers model
for texts and images (`trust_remote_code=True` where this package is not imported).

A local folder needs it always. mteb reads no file of it: it looks up the path as a name, first in
its registry, then on the Hub, and raises "No model implementation is available for this model". It
has no entry points, and a folder cannot change that. A `SentenceTransformer` object is taken for a
model of texts, without name and revision.
"""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mteb.models import ModelMeta, SentenceTransformerEncoderWrapper
from mteb.models.model_implementations import MODEL_REGISTRY
from sentence_transformers import SentenceTransformer

from ..configuration_llm2clip import LLM2CLIPConfig
from ..model_folders.fingerprint import fingerprint_weights
from ..model_folders.training_state import warn_of_untrained
from .encoders.files import hash_files

_FUSED = ("image", "text")


class FusingWrapper(SentenceTransformerEncoderWrapper):  # type: ignore[misc]
    """mteb's wrapper, which also takes inputs of an image and a text together.

    Their embeddings are added up, as mteb's own wrapper of CLIP does; here both have unit length.
    """

    mteb_model_meta: ModelMeta

    def encode(self, inputs: Any, **settings: Any) -> Any:
        """Encode what mteb's loader gives; see mteb's `EncoderProtocol`."""
        if not set(_FUSED) <= set(inputs.dataset.features):
            return super().encode(inputs, **settings)
        whole = self.mteb_model_meta
        try:
            return sum(self._encode_one(whole, name, inputs, settings) for name in _FUSED)
        finally:
            self.mteb_model_meta = whole

    def _encode_one(self, meta: ModelMeta, modality: str, inputs: Any, settings: Any) -> Any:
        """Encode one modality; of a row mteb's wrapper takes those that the description names."""
        self.mteb_model_meta = meta.model_copy(update={"modalities": [modality]})
        return torch.as_tensor(super().encode(inputs, **settings)).float()


def open_for_mteb(
    folder: str | Path, *, name: str | None = None, device: str | None = None
) -> SentenceTransformerEncoderWrapper:
    """Load an exported folder for `mteb.evaluate`, texts and images alike.

    The revision is a digest of weights and settings, so that mteb's store of results cannot give
    one model's scores for another of the same name. From then on mteb knows the model:
    `mteb.get_model(str(folder))` and `mteb.get_model(name)` load it too, in this process alone.

    Args:
        folder: as `save_model` writes it.
        name: `organization/model` in mteb's results; `local/` and the folder's name unless given.
        device: where to load it; sentence-transformers chooses unless given.
    Raises: ValueError for a folder without `modules.json`, or a name without organization.
    """
    folder = Path(folder)
    if not (folder / "modules.json").is_file():
        raise ValueError(
            f"{folder} has no modules.json, which sentence-transformers needs. Give the folder of "
            "an exported model (`llm2clip export`, or `save_model`)."
        )
    name = f"local/{folder.resolve().name}" if name is None else name
    if name.count("/") != 1:
        raise ValueError(f"name={name!r} must be `organization/model`: mteb files results by it.")
    warn_of_untrained(LLM2CLIPConfig.from_pretrained(folder), folder)
    model = SentenceTransformer(
        str(folder), device=device, trust_remote_code=False, local_files_only=True
    )
    wrapper = FusingWrapper(model)
    wrapper.mteb_model_meta = _describe(wrapper.mteb_model_meta, model, folder, name=name)
    MODEL_REGISTRY[name] = MODEL_REGISTRY[str(folder)] = wrapper.mteb_model_meta
    return wrapper


def _load_for_mteb(
    name: str, *, folder: Path, revision: str, device: str | None = None
) -> SentenceTransformerEncoderWrapper:
    """Load a folder that was opened before.

    Raises: ValueError where its files are others now.
    """
    if _digest(folder) != revision:
        raise ValueError(
            f"{folder} changed since it was opened as {name}. Open it again with open_for_mteb."
        )
    return open_for_mteb(folder, name=name, device=device)


def _describe(
    found: ModelMeta, model: SentenceTransformer, folder: Path, *, name: str
) -> ModelMeta:
    """Complete what mteb finds by itself: widths, longest text, similarity, framework."""
    network = model[0].auto_model
    embedding = network.text_model.get_input_embeddings()
    described: ModelMeta = found.model_copy(
        update={
            "name": name,
            "loader": partial(_load_for_mteb, folder=folder),
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
