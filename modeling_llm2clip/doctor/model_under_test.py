"""The model under test, with a naive implementation to compare the package's results with.

Shapes: B texts or images, D width of the LLM, P `projection_dim`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..configuration_llm2clip import LLM2CLIPConfig
from ..encoding.devices import to_float64
from ..pooling_llm2clip import TEXT_POOLINGS

SHORT_TEXTS = (
    "a dog",
    "Two red apples on a wooden table, 1862.",
    "x",
    "Eine Katze schläft auf dem Sofa neben dem Fenster.",
    "東京の夜景 🌃",
)


@dataclass
class ModelUnderTest:
    """A model folder and its loaded parts, which checks fill in; parts not loaded are None.

    `tokenizer` and `processor` come from AutoTokenizer and AutoProcessor.
    """

    folder: Path
    device: str
    config: LLM2CLIPConfig = None  # type: ignore[assignment]
    model_class: Any = None
    model: Any = None
    tokenizer: Any = None
    processor: Any = None

    @property
    def encodes_texts(self) -> bool:
        return hasattr(self.model, "text_model") and self.tokenizer is not None

    @property
    def encodes_images(self) -> bool:
        return hasattr(self.model, "vision_model") and self.processor is not None

    @property
    def room(self) -> int:
        """Maximum number of tokens in a text, excluding the prompt."""
        config = self.config
        num_prompt = len(config.prompt_prefix_ids) + len(config.prompt_suffix_ids)
        return int(config.max_text_length) - num_prompt

    def tokenize(self, texts: Sequence[str], *, padding_side: str = "right") -> Any:
        """Tokenize with only the tokenizer, as pipelines do; ids and mask are (B, L) int64."""
        return self.tokenizer(
            list(texts),
            padding=True,
            padding_side=padding_side,
            truncation=True,
            max_length=self.config.max_text_length,
            return_tensors="pt",
        ).to(self.device)

    def encode_texts(
        self, texts: Sequence[str], *, padding_side: str = "right", as_one_batch: bool = False
    ) -> Tensor:
        """Encode B texts as (B, P) float32 of unit length.

        With `as_one_batch`, all texts are padded to one length, as in training and on accelerators.
        Otherwise, on a CPU, the model splits the texts into small batches with almost no padding.
        """
        batch = self.tokenize(texts, padding_side=padding_side)
        with torch.set_grad_enabled(as_one_batch):  # the weights are frozen, so no graph is built
            features = self.model.get_text_features(batch["input_ids"], batch["attention_mask"])
        return F.normalize(features.pooler_output, dim=-1).cpu()

    def encode_images(self, images: Sequence[Any]) -> Tensor:
        """Encode B images as (B, P) float32 of unit length."""
        batch = self.processor(images=list(images)).to(self.device)
        with torch.no_grad():
            features = self.model.get_image_features(**batch)
        return F.normalize(features.pooler_output, dim=-1).cpu()

    def list_ids(self, text: str) -> list[int]:
        """Tokenize one text with its prompt and with truncation."""
        tokens = self.tokenizer(text, truncation=True, max_length=self.config.max_text_length)
        return [int(i) for i in tokens["input_ids"]]

    def list_bare_ids(self, text: str) -> list[int]:
        """Tokenize one text without prompt, special tokens or truncation."""
        tokens = self.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)
        return [int(i) for i in tokens["input_ids"]]

    @torch.no_grad()
    def pool_by_hand(self, ids: Sequence[int], *, num_unpooled: int) -> Tensor:
        """Pool the LLM's hidden states by hand, skipping the first `num_unpooled` tokens.

        Returns the caption embedding, (1, D) float32.
        """
        row = torch.tensor([list(ids)], device=self.device)
        hidden: Tensor = self.model.text_model(
            input_ids=row, attention_mask=torch.ones_like(row), use_cache=False
        ).last_hidden_state[:, num_unpooled:]  # (1, pooled, width)
        # Uses the packed implementation, which shares no code with the model's padded batches.
        pooled = TEXT_POOLINGS[self.config.text_pooling].packed(to_float64(hidden)[0])[None]
        if self.config.text_dense_width is not None:
            dense = self.model.text_model.pooled_dense
            pooled = pooled @ to_float64(dense.weight).T + to_float64(dense.bias)
        return pooled.to(hidden.device, torch.float32)

    @torch.no_grad()
    def encode_by_hand(self, ids: Sequence[int], *, num_unpooled: int) -> Tensor:
        """Encode one text's ids with `pool_by_hand` as (1, P) float32 of unit length."""
        pooled = self.pool_by_hand(ids, num_unpooled=num_unpooled)
        return F.normalize(self.model.project_caption_embeds(pooled), dim=-1).cpu()

    def encode_instructed(self, texts: Sequence[str], instruction: str) -> Tensor:
        """Encode B texts with an instruction as (B, P) float32.

        The instruction's tokens are pooled only if the prompt's tokens are.
        """
        start = self.config.num_unpooled
        if not self.config.pools_prompt:
            start += len(self.list_bare_ids(instruction))
        ids = (self.list_ids(instruction + text) for text in texts)
        return torch.cat([self.encode_by_hand(row, num_unpooled=start) for row in ids])
