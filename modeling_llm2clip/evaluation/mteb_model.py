"""A saved model as mteb takes it: mteb's own wrapper of sentence-transformers, fully described.

mteb wraps a `SentenceTransformer` by itself, but then takes it for a model of texts and knows
neither its name nor its revision. On the Hub it reads all of these from the repository.
"""

from __future__ import annotations

from pathlib import Path

from mteb.models import ModelMeta, SentenceTransformerEncoderWrapper
from sentence_transformers import SentenceTransformer

from ..encoding.fingerprint import fingerprint_weights

_CITATION = """@article{huang2024llm2clip,
  title = {LLM2CLIP: Powerful Language Model Unlocks Richer Visual Representation},
  author = {Huang, Weiquan and Wu, Aoqi and Yang, Yifan and Luo, Xufang and Yang, Yuqing and
            Hu, Liang and Dai, Qi and Dai, Xiyang and Chen, Dongdong and Luo, Chong and Qiu, Lili},
  journal = {arXiv preprint arXiv:2411.04997},
  year = {2024}
}"""


def open_for_mteb(
    folder: str | Path, *, name: str | None = None, device: str | None = None
) -> SentenceTransformerEncoderWrapper:
    """Load an exported folder for `mteb.evaluate`, texts and pictures alike.

    The revision is the weights' digest, so that mteb's store of results cannot give one model's
    scores for another of the same name.

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
    model = SentenceTransformer(str(folder), device=device)
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
            "revision": fingerprint_weights(folder)["weights"],
            "modalities": sorted(model.modalities),
            "n_parameters": sum(weight.numel() for weight in network.parameters()),
            # mteb multiplies the vocabulary by the width of the shared space.
            "n_embedding_parameters": embedding.weight.numel(),
            "memory_usage_mb": sum(w.nbytes for w in network.parameters()) / 2**20,
            "use_instructions": any(prompt for prompt in model.prompts.values()),
            "citation": _CITATION,
        }
    )
    return described
