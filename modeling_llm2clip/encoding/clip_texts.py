"""The texts of transformers' dual encoders, such as CLIP and SigLIP, with their own text towers.

Each family was trained with texts of its own form, which processors leave to the caller:

| family | texts |
| --- | --- |
| `siglip`, `siglip2` | lower case, 64 tokens, padded to 64 and **not** masked: the last token is
pooled, which is padding in most texts (arXiv:2303.15343, arXiv:2502.14786) |
| the others | as many tokens as their tokenizer states (77 in CLIP), padded to the longest of the
batch and masked |
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoProcessor

from ..configs.encoding_config import DUAL_ENCODERS
from ..heads_llm2clip import LogitRule
from ..loading_llm2clip import load_without_code
from .encoder_interface import Encoder

_UNMASKED = ("siglip", "siglip2")


def is_unmasked(config: Any) -> bool:
    """Tell whether a family's texts are in lower case, and padding is read as a part of them."""
    return config.model_type in _UNMASKED


def count_tokens_read(config: Any, tokenizer: Any) -> int:
    """Return the maximum number of tokens of a text."""
    text = config.text_config
    positions = int(text.max_position_embeddings)
    if any(name in text.model_type for name in ("roberta", "altclip")):
        positions -= text.pad_token_id + 1  # they begin after that of padding
    return positions if is_unmasked(config) else min(positions, int(tokenizer.model_max_length))


def read_dual_encoder(source: str | Path) -> Any:
    """Read the configuration of a dual encoder with a text encoder of its own."""
    config = load_without_code(AutoConfig, source)
    if config.model_type not in DUAL_ENCODERS:
        raise ValueError(
            f"{source} is a {config.model_type!r}, whose text encoder is not known here, if it has "
            f"one. Give a whole model of transformers' {', '.join(DUAL_ENCODERS)}."
        )
    return config


def load_dual_encoder(folder: str | Path, *, dtype: str = "auto") -> Any:
    """Load a whole dual encoder, in evaluation mode."""
    model, info = load_without_code(AutoModel, folder, dtype=dtype, output_loading_info=True)
    if info["missing_keys"] or info["mismatched_keys"]:
        lost = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
        raise ValueError(
            f"{folder} lacks weights, which would be random: {lost[:5]}. Save the whole model "
            "again."
        )
    return model.eval()


def find_pooled(features: Any) -> Tensor:
    """Find the projected embedding: a tensor before transformers 5.0, and since then an output."""
    pooled = features if isinstance(features, Tensor) else features.pooler_output
    assert isinstance(pooled, Tensor)
    return pooled


class _Tokens:
    """Tokenizes texts for a dual encoder, in the place of a processor of this package."""

    def __init__(self, tokenizer: Any, config: Any) -> None:
        self.tokenizer = tokenizer
        self.longest_text = count_tokens_read(config, tokenizer)
        self.is_unmasked = is_unmasked(config)

    def list_ids(self, texts: Iterable[str]) -> tuple[list[list[int]], list[bool]]:
        """Return the token ids of each text, and whether it was truncated."""
        spelled = [text.lower() if self.is_unmasked else text for text in texts]
        whole = self.tokenizer(spelled, truncation=False, verbose=False)["input_ids"]
        encoded = self.tokenizer(
            spelled,
            truncation=True,
            max_length=self.longest_text,
            padding="max_length" if self.is_unmasked else False,
        )
        return encoded["input_ids"], [len(ids) > self.longest_text for ids in whole]


class ClipTextEncoder(Encoder):
    """The text side of a dual encoder, into the space that it shares with its images.

    Args:
        folder: Its folder.
        device: Where it computes.
    """

    projects_at_once = True
    modalities = ("text",)
    logit_rule: LogitRule | None = None
    batch_size = 1
    _lacks = "The text encoder of a dual encoder embeds {there}s alone, and no {wanted}s."

    def __init__(self, folder: Path, device: torch.device) -> None:
        config = read_dual_encoder(folder)
        tokens = _Tokens(load_without_code(AutoProcessor, folder).tokenizer, config)
        self._is_masked = not tokens.is_unmasked
        self._model = load_dual_encoder(folder).to(device)
        self.processor = cast(Any, tokens)
        self.device = device
        self.token_budget = 4096 if device.type == "cpu" else 16384
        self.embedding_dim = int(
            config.text_config.projection_size if tokens.is_unmasked else config.projection_dim
        )

    @torch.no_grad()
    def encode_tokens(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Run one batch of texts, (B, L) int64 each; returns (B, P) of unit length."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        names = ("input_ids", "attention_mask") if self._is_masked else ("input_ids",)
        features = self._model.get_text_features(**{n: inputs[n].to(self.device) for n in names})
        return F.normalize(find_pooled(features).float(), dim=-1)

    def encode_pixels(self, pixel_values: Tensor, **_: Tensor) -> Tensor:
        """Refuse images."""
        raise NotImplementedError(self._lacks)

    def project(self, modality: str, embeds: Tensor) -> Tensor:  # noqa: ARG002
        """Return embeddings as they are: they are in the shared space."""
        return embeds
