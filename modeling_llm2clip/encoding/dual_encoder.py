"""Runs dual encoders of transformers, such as CLIP and SigLIP, with their own text encoders.

Each family was trained on texts in a format of its own, which processors leave to the caller:

| family | texts |
| --- | --- |
| `siglip`, `siglip2` | lower case, 64 tokens, padded to 64 and **not** masked: the last token,
which is padding in most texts, is pooled (arXiv:2303.15343, arXiv:2502.14786) |
| the others | at most the tokenizer's maximum length (77 in CLIP), padded to the longest text in
the batch, and masked |
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoProcessor

from ..configs.encoding_config import DUAL_ENCODERS
from ..image_loading_llm2clip import load_images
from ..loading_llm2clip import list_weight_files, load_without_code, naming_fields
from .encoder_interface import Encoder, choose_batches
from .precision import float32_as_such


def require_dual_encoder(model_type: str, source: str | Path) -> None:
    """Raise ValueError unless a model is a dual encoder with a known text encoder."""
    if model_type not in DUAL_ENCODERS:
        raise ValueError(
            f"{source} is a {model_type!r}, which has no text encoder that is supported here. "
            f"Supported models of transformers: {', '.join(DUAL_ENCODERS)}."
        )


class DualEncoderProcessor:
    """Prepares texts and images for a dual encoder; a counterpart of `LLM2CLIPProcessor`.

    Attributes:
        config: The model's configuration.
        is_unmasked: Whether texts are lowercased and their padding is left unmasked.
        longest_text: Maximum number of tokens of a text.
    """

    def __init__(self, folder: Path) -> None:
        with naming_fields(folder):
            self._read(folder)

    def _read(self, folder: Path) -> None:
        self.config: Any = load_without_code(AutoConfig, folder)
        require_dual_encoder(self.config.model_type, folder)
        processor = load_without_code(AutoProcessor, folder)
        self.tokenizer, self.image_processor = processor.tokenizer, processor.image_processor
        self.is_unmasked = self.config.model_type in ("siglip", "siglip2")
        text = self.config.text_config
        self.longest_text = int(text.max_position_embeddings)
        if any(name in text.model_type for name in ("roberta", "altclip")):
            self.longest_text -= text.pad_token_id + 1  # positions start after the padding id
        if not self.is_unmasked:
            self.longest_text = min(self.longest_text, int(self.tokenizer.model_max_length))

    def spell(self, text: str) -> str:
        """Return a text in the form that is passed to the tokenizer, for example lowercased."""
        return text.lower() if self.is_unmasked else text

    def list_ids(self, texts: Sequence[str]) -> tuple[list[list[int]], list[bool]]:
        """Return the token ids of each text, and whether it was truncated."""
        spelled = [self.spell(text) for text in texts]
        ids = list(self.tokenizer(spelled, truncation=False, verbose=False)["input_ids"])
        is_truncated = [len(row) > self.longest_text for row in ids]
        for row in (row for row, is_long in enumerate(is_truncated) if is_long):
            ids[row] = self.tokenizer(  # only the tokenizer knows which tokens to keep
                spelled[row], truncation=True, max_length=self.longest_text
            )["input_ids"]
        if self.is_unmasked:
            options = {"padding": "max_length", "max_length": self.longest_text}
            ids = self.tokenizer.pad({"input_ids": ids}, **options)["input_ids"]
        return ids, is_truncated

    def __call__(self, *, images: Sequence[Any]) -> dict[str, Tensor]:
        """Load images (upright, on white, as RGB) and convert them to tensors."""
        return dict(self.image_processor(load_images(list(images)), return_tensors="pt"))


class DualEncoder(Encoder):
    """A dual encoder of transformers, which embeds texts and images in one space.

    Args:
        folder: The model's folder.
        processor: The model's processor.
        device: Device to compute on.
        dtype: Dtype of the weights; by default, the dtype in the files.
    """

    projects_at_once = True
    modalities = ("text", "image")

    def __init__(
        self,
        folder: Path,
        processor: DualEncoderProcessor,
        device: torch.device,
        *,
        dtype: str = "auto",
    ) -> None:
        list_weight_files(folder)  # requires safetensors, because the fingerprint reads only these
        model, info = load_without_code(
            AutoModel,
            folder,
            dtype=dtype,
            # With other implementations, AIMv2's texts attend to later tokens if a batch has no
            # padding.
            attn_implementation={"text_config": "eager"},
            output_loading_info=True,
        )
        if info["missing_keys"] or info["mismatched_keys"]:
            lost = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
            raise ValueError(
                f"{folder} lacks weights, which would be initialized at random: {lost[:5]}. Save "
                "the whole model again."
            )
        self._model = model.eval().to(device)
        self._is_masked = not processor.is_unmasked
        self.processor = cast(Any, processor)
        self.device = device
        self.token_budget, self.batch_size = choose_batches(device)
        with torch.no_grad(), float32_as_such():
            self.embedding_dim = self.encode_tokens(*torch.ones(2, 1, 1, dtype=torch.long)).shape[1]

    def encode_tokens(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode a batch of ids and mask, (B, L) int64; returns (B, P) of unit length."""
        mask = {"attention_mask": attention_mask.to(self.device)} if self._is_masked else {}
        features = self._model.get_text_features(input_ids=input_ids.to(self.device), **mask)
        return F.normalize(features.pooler_output.float(), dim=-1)

    def encode_pixels(self, pixel_values: Tensor, **others: Tensor) -> Tensor:
        """Encode one batch of images from the processor; returns (B, P) of unit length."""
        inputs = {"pixel_values": pixel_values.to(self._model.dtype), **others}
        features = self._model.get_image_features(
            **{name: value.to(self.device) for name, value in inputs.items()}
        )
        return F.normalize(features.pooler_output.float(), dim=-1)
