"""Reads a sentence-transformers model so the text tower reproduces its embeddings exactly.

sentence-transformers itself loads the model and encodes a few texts. The model's steps before and
after the network become settings of this package, and the built model must return the same
embeddings.

Shapes: N is the number of texts, D the width of the pooled hidden states, D' the width of the
embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from .._extras import EMBEDDER, require
from ..configs.build_config import DEFAULT_TEXT_LENGTH, BuildConfig
from ..encoding.encode import encode_texts
from ..heads_llm2clip import PooledDense
from ..loading_llm2clip import load_without_code, naming_code
from ..model_folders.golden_embeddings import GOLDEN_TEXTS, find_tolerance
from ..modeling_llm2clip import LLM2CLIPModel
from ..pooling_llm2clip import TEXT_POOLINGS
from ..processing_llm2clip import LLM2CLIPProcessor
from .part_loading import naming
from .text_towers import find_file, require_decoder
from .tower_checks import find_direction_errors

# sentence-transformers' names of poolings, and ours if the prompt is pooled as well.
_POOLINGS = {
    p.sentence_transformers: name for name, p in TEXT_POOLINGS.items() if p.sentence_transformers
}
_TEXTS = (*GOLDEN_TEXTS, "x", '"(1) it\'s 7 p.m.", she said', " ".join(["a dog on a mat"] * 150))
_WAY_OUT = (
    "Use another embedder; or build on the network as an ordinary LLM, with another --prompt, and "
    "fine-tune it."
)


@dataclass(frozen=True)
class TextEmbedder:
    """Everything in a sentence-transformers model except its network.

    Attributes:
        prompt: Text that precedes every caption.
        pooling: One of `TEXT_POOLINGS`.
        max_length: Maximum number of tokens per text.
        dense: Weight (D', D) and bias (D') that combine the embedder's Dense modules and
            truncation; None if it has neither.
        normalizes: Whether the embeddings have unit length.
        embeds: The embedder's embeddings of sample texts, (N, D') float32.
        bidirectional: Whether tokens attend to later tokens.
    """

    prompt: str
    pooling: str
    max_length: int
    dense: tuple[Tensor, Tensor] | None
    normalizes: bool
    embeds: Tensor
    bidirectional: bool = True

    def join_network(self, text_model: PreTrainedModel) -> TextEmbedder:
        """Add the Dense modules, in the tower's dtype, and detect if the tower attends causally."""
        if self.dense is not None:
            weight, bias = self.dense
            layer = PooledDense(weight.shape[1], weight.shape[0])
            layer.load_state_dict({"weight": weight, "bias": bias})
            setattr(layer, "_is_hf_initialized", True)  # noqa: B010 (or transformers resets it)
            text_model.pooled_dense = layer.to(text_model.dtype)
        is_causal = not find_direction_errors(text_model, bidirectional=False)
        return replace(self, bidirectional=not is_causal)

    def require_same_embeddings(self, model: LLM2CLIPModel, processor: LLM2CLIPProcessor) -> None:
        embeds = encode_texts(model, processor, _TEXTS, project=False).cpu()
        if self.normalizes:
            embeds = F.normalize(embeds, dim=-1)
        expected = F.normalize(self.embeds, dim=-1) if self.normalizes else self.embeds
        distances = (embeds - expected).norm(dim=-1) / expected.norm(dim=-1)
        row = int(distances.nan_to_num(nan=torch.inf).argmax())
        if not distances[row] <= find_tolerance(model.text_model.dtype):
            raise ValueError(
                f"The built model does not reproduce the embeddings of sentence-transformers: with "
                f"the prompt {self.prompt!r}, the embedding of {_TEXTS[row][:40]!r} differs by "
                f"{distances[row]:.1e}. {_WAY_OUT}"
            )


@torch.inference_mode()
def read_embedder(source: str | Path, config: BuildConfig) -> TextEmbedder:
    """Read an embedder's steps before and after its network, and encode sample texts.

    Raises ValueError for a step that cannot be reproduced exactly.
    """
    require(EMBEDDER)
    from sentence_transformers import SentenceTransformer

    _require_modules(source)
    with naming(source):
        require_decoder(load_without_code(AutoConfig, source), source, takes_encoders=True)
    with naming(source), naming_code(source):
        encoder = SentenceTransformer(
            str(source),
            device="cpu",
            model_kwargs={"dtype": getattr(torch, config.dtype)},
            trust_remote_code=False,
        ).eval()
    pooling, denses, normalizes = _split_modules(encoder, source)
    if normalizes and not config.normalize_text_before_adapter:
        raise ValueError(
            f"normalize_text_before_adapter=False cannot be used: {source} ends with Normalize. "
            "Remove it."
        )
    prompt = _choose_prompt(encoder, config, source)
    own_length = encoder.max_seq_length or config.max_text_length or DEFAULT_TEXT_LENGTH
    if (length := config.max_text_length or own_length) > own_length:
        raise ValueError(
            f"max_text_length={length} exceeds the limit of {source}, {own_length} tokens. Remove "
            "it."
        )
    encoder.max_seq_length = length
    dim = config.truncate_dim or encoder.truncate_dim
    embeds = encoder.encode(
        list(_TEXTS), prompt=prompt, truncate_dim=dim, convert_to_tensor=True,
        show_progress_bar=False,
    )  # fmt: skip
    if dim is not None and dim > embeds.shape[1]:
        raise ValueError(
            f"truncate_dim={dim}, but the embeddings of {source} have {embeds.shape[1]} dimensions."
        )
    # Excluding an empty prompt leaves the special tokens in the mean.
    excludes = bool(prompt) and not pooling.include_prompt and pooling.pooling_mode == "mean"
    return TextEmbedder(
        prompt=prompt,
        pooling="mean" if excludes else _POOLINGS[pooling.pooling_mode],
        max_length=encoder.max_seq_length,
        dense=_fold(denses, width=pooling.embedding_dimension, dim=dim),
        normalizes=normalizes,
        embeds=embeds.float().cpu().clone(),
    )


def _require_modules(source: str | Path) -> None:
    if find_file(source, "modules.json") is None:
        raise ValueError(
            f"{source} has no modules.json, so it is not a sentence-transformers model, and its "
            "pooling is unknown. To build on it as an LLM, choose another --prompt."
        )


def _split_modules(encoder: Any, source: str | Path) -> tuple[Any, list[Any], bool]:
    """Return the pooling, the Dense modules, and whether the last step normalizes."""
    from sentence_transformers.sentence_transformer.modules import (
        Dense,
        Normalize,
        Pooling,
        Transformer,
    )

    modules = list(encoder)
    normalizes = type(modules[-1]) is Normalize
    first, *denses = modules[: -1 if normalizes else None]
    pooling: Any = denses.pop(0) if denses else None
    errors = []
    if type(first) is not Transformer or type(pooling) is not Pooling:
        errors.append("it does not start with Transformer and Pooling")
    elif pooling.pooling_mode not in _POOLINGS:
        errors.append(f"pooling_mode={pooling.pooling_mode!r} is not one of {list(_POOLINGS)}")
    for module in denses:
        if type(module) is not Dense:
            errors.append(f"{type(module).__name__} is not a Dense")
        elif not isinstance(module.activation_function, nn.Identity):
            errors.append(f"a Dense has the activation {type(module.activation_function).__name__}")
        elif module.use_residual or module.module_input_name != module.module_output_name:
            errors.append("a Dense uses more than the embedding")
    if errors:
        names = ", ".join(type(module).__name__ for module in modules)
        raise ValueError(
            f"{source} cannot be reproduced exactly: {'; '.join(errors)}. Its modules are {names}; "
            "supported are Transformer, Pooling, Dense without activation, and Normalize. "
            f"{_WAY_OUT}"
        )
    return pooling, denses, normalizes


def _choose_prompt(encoder: Any, config: BuildConfig, source: str | Path) -> str:
    if config.prompt_prefix is not None:
        return config.prompt_prefix
    prompts = {name: text for name, text in encoder.prompts.items() if text is not None}
    name = config.prompt_name or encoder.default_prompt_name
    if name is not None and name not in prompts:
        raise ValueError(
            f"{source} has no prompt {name!r}; it has {sorted(prompts)}. Choose one of them, or "
            "set prompt_prefix to the text of a prompt."
        )
    return "" if name is None else str(prompts[name])


def _fold(denses: Sequence[Any], *, width: int, dim: int | None) -> tuple[Tensor, Tensor] | None:
    """Combine the Dense modules and the truncation to `dim`; None if there are neither."""
    if not denses and dim in (None, width):
        return None
    weight, bias = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    for linear in (module.linear for module in denses):
        weight, bias = linear.weight.double() @ weight, linear.weight.double() @ bias
        if linear.bias is not None:
            bias = bias + linear.bias.double()
    return weight[:dim].float().clone(), bias[:dim].float().clone()
