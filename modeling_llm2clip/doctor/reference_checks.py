"""Checks against references: recorded embeddings, and sentence-transformers."""

from __future__ import annotations

import gc
import json
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base_llm2clip import (
    SETTINGS_FILE,
    check_instructions,
    find_instructions,
)
from ..loading_llm2clip import naming_code
from ..model_folders.golden_embeddings import (
    GOLDEN_FILE,
    compare_golden,
    find_tolerance,
    measure_distances,
    render_golden_images,
)
from .model_report import NotApplicableError
from .model_under_test import SHORT_TEXTS, ModelUnderTest

# All equal for unit embeddings; without a setting sentence-transformers takes the cosine.
_COSINES = ("cosine", "dot", None)


def check_golden_embeddings(tested: ModelUnderTest) -> str:
    """Require the embeddings that were recorded when the folder was written."""
    if not (tested.folder / GOLDEN_FILE).is_file():
        raise NotApplicableError(f"the folder has no {GOLDEN_FILE} to compare with")
    if tested.processor is None:
        raise NotApplicableError("there is no processor to prepare the recorded inputs with")
    compared = compare_golden(tested.folder, tested.model, tested.processor)
    assert compared is not None
    return compared


def check_sentence_transformers(tested: ModelUnderTest) -> str:
    """Require the model's own embeddings from sentence-transformers; frees the model."""
    if find_spec("sentence_transformers") is None:
        raise NotApplicableError(
            "sentence-transformers is not installed (modeling_llm2clip[sentence-transformers])"
        )
    if not (tested.folder / "modules.json").is_file():
        raise NotApplicableError(
            "the folder has no modules.json: sentence-transformers would load it, but not bring "
            "its embeddings to unit length; save_pretrained of the model writes that file"
        )
    if tested.processor is None:
        raise NotApplicableError(
            "sentence-transformers loads no model without its processor; save_pretrained of the "
            "processor adds it"
        )
    tolerance, dtype = find_tolerance(tested.model.dtype), tested.model.dtype
    settings = _read_settings(tested)
    _require_plain_settings(settings)
    prompts = _list_instructions(settings) if tested.encodes_texts else {}
    if prompts:
        check_instructions(
            tested.tokenizer,
            prompts,
            num_suffix=len(tested.config.prompt_suffix_ids),
            max_text_length=tested.config.max_text_length,
        )
    _require_equal_instructions(tested)
    wanted = _encode_with_model(tested, prompts)
    tested.model = None
    gc.collect()  # a large LLM does not fit twice
    found = _encode_with_sentence_transformers(tested, prompts, content=set(wanted))
    distances = {
        what: float(measure_distances(found[what], embeddings).max())
        for what, embeddings in wanted.items()
        if what in found
    }
    if not distances:
        raise ValueError(
            f"sentence-transformers offers none of {sorted(wanted)}, which the model encodes. "
            "Export the folder again."
        )
    errors = [f"{what} by {d:.1e}" for what, d in distances.items() if not d <= tolerance]
    if errors:
        raise ValueError(
            f"sentence-transformers gives other embeddings than AutoModel: {', '.join(errors)} "
            f"(allowed in {dtype}: {tolerance:.0e}). Export the folder again."
        )
    left_out = (
        f"; not offered: {', '.join(set(wanted) - set(found))}" if len(found) < len(wanted) else ""
    )
    largest = max(distances.values())
    return f"{', '.join(distances)}: at most {largest:.1e} from AutoModel's{left_out}"


def _require_equal_instructions(tested: ModelUnderTest) -> None:
    in_config = tested.config.instructions
    if find_instructions(tested.folder, in_config) != in_config:
        raise ValueError(
            f"config.json has the instructions {in_config}, {SETTINGS_FILE} has others: a model "
            "that is loaded and saved elsewhere would lose these. Make both equal, or save the "
            "folder again with SentenceTransformer(folder).save_pretrained(folder)."
        )


def _read_settings(tested: ModelUnderTest) -> dict[str, Any]:
    path = tested.folder / SETTINGS_FILE
    settings: dict[str, Any] = {}
    if path.is_file():
        settings = json.loads(path.read_text(encoding="utf-8"))
    return settings


def _list_instructions(settings: dict[str, Any]) -> dict[str, str]:
    return {name: text for name, text in (settings.get("prompts") or {}).items() if text.strip()}


def _require_plain_settings(settings: dict[str, Any]) -> None:
    errors = []
    default = settings.get("default_prompt_name")
    if default in _list_instructions(settings):
        errors.append(
            f"default_prompt_name={default!r} puts an instruction before every text, which "
            "AutoModel and pipelines do not"
        )
    if settings.get("similarity_fn_name") not in _COSINES:
        errors.append(f"similarity_fn_name={settings['similarity_fn_name']!r} is not the cosine")
    if errors:
        raise ValueError(f"{SETTINGS_FILE}: {'; '.join(errors)}. Set null and 'cosine'.")


@torch.no_grad()
def _encode_with_model(tested: ModelUnderTest, prompts: dict[str, str]) -> dict[str, Tensor]:
    embeddings = {}
    if tested.encodes_texts:
        embeddings["texts"] = tested.encode_texts(SHORT_TEXTS)
    if tested.encodes_images:
        embeddings["images"] = tested.encode_images(render_golden_images())
    num_prefix = len(tested.config.prompt_prefix_ids)
    for name, instruction in prompts.items():
        num_ids = len(tested.list_ids(instruction, enclosed=False))
        pooled = tested.pool_by_hand(
            tested.list_ids(instruction + SHORT_TEXTS[0]), num_unpooled=num_prefix + num_ids
        )
        features = tested.model.project_caption_embeds(pooled)
        embeddings[f"texts with {name!r}"] = F.normalize(features, dim=-1).cpu()
    return embeddings


def _encode_with_sentence_transformers(
    tested: ModelUnderTest, prompts: dict[str, str], *, content: set[str]
) -> dict[str, Tensor]:
    from sentence_transformers import SentenceTransformer

    with naming_code(tested.folder):
        encoder = SentenceTransformer(
            str(tested.folder),
            device=tested.device,
            local_files_only=True,
            trust_remote_code=False,
        )

    def encode(inputs: list[Any], **settings: Any) -> Tensor:
        embeddings: Tensor = encoder.encode(
            inputs,
            convert_to_tensor=True,
            show_progress_bar=False,
            **settings,
        )
        return embeddings.float().cpu()

    found = {}
    if "texts" in content:
        found["texts"] = encode(list(SHORT_TEXTS))
    if "images" in content and "image" in encoder.modalities:
        found["images"] = encode(list(render_golden_images()))
    for name in prompts:
        found[f"texts with {name!r}"] = encode([SHORT_TEXTS[0]], prompt_name=name)
    return found
