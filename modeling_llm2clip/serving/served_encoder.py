"""What a server needs of a model; the model of this package as such, in torch and in ONNX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..encoding.encode import (
    default_batch_size,
    default_token_budget,
    encode_prepared_images,
    encode_tokenized_texts,
    raise_malloc_thresholds,
)
from ..encoding.onnx_encoding import DEFAULT_BATCH_SIZE, DEFAULT_TOKEN_BUDGET, OnnxEncoder
from ..encoding.tokenized_texts import TokenizedText, TokenizedTexts
from ..heads_llm2clip import LogitRule
from ..model_folders.training_images import ImageTally
from ..modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel, LLM2CLIPVisionModel
from ..processing_llm2clip import LLM2CLIPProcessor


class ServedEncoder(Protocol):
    """Embeds texts and images; called by one thread, but `tokenize_texts` and `prepare_image`.

    Attributes:
        modalities: Those of `"text"` and `"image"` that it embeds.
        embedding_dim: P, the width of an embedding.
        max_text_length: Maximum tokens per text; the rest is truncated.
        logit_rule: Turns cosines into logits; None where there is one tower alone.
        token_budget: Maximum tokens per batch by default.
        batch_size: Maximum images per batch by default.
        tally: The images that were embedded so far; empty where a tower's outputs are not known.
    """

    modalities: tuple[str, ...]
    embedding_dim: int
    max_text_length: int
    logit_rule: LogitRule | None
    token_budget: int
    batch_size: int
    tally: ImageTally

    def tokenize_texts(self, texts: Sequence[str]) -> TokenizedTexts:
        """Turn texts into what `encode_texts` takes; called by several threads.

        Args:
            texts: N texts.

        Raises:
            ValueError: A text is blank.
        """

    def encode_texts(self, texts: Sequence[TokenizedText]) -> NDArray[np.float32]:
        """Embed texts.

        Args:
            texts: N texts, each from `tokenize_texts`.

        Returns:
            (N, P) of unit length.
        """

    def prepare_image(self, image: Image.Image) -> Any:
        """Turn an image into what `encode_images` takes; called by several threads.

        Args:
            image: An upright RGB image.
        """

    def encode_images(self, images: Sequence[Any]) -> NDArray[np.float32]:
        """Embed images.

        Args:
            images: N images, each from `prepare_image`.

        Returns:
            (N, P) of unit length.
        """


class ModelEncoder:
    """A loaded model and its processor; see `ServedEncoder`.

    Args:
        model: A whole, text-only or vision-only model.
        processor: Its processor.

    Examples:
        >>> encoder = ModelEncoder(*load_model("my-model"))
        >>> texts = encoder.tokenize_texts(["a dog"])
        >>> encoder.encode_texts(texts).shape == (1, encoder.embedding_dim)
        True
    """

    def __init__(
        self,
        model: LLM2CLIPModel | LLM2CLIPTextModel | LLM2CLIPVisionModel,
        processor: LLM2CLIPProcessor,
    ) -> None:
        self._model: Any = model  # which of its towers are there decides what is called
        self._processor = processor
        towers = {"text": "text_model", "image": "vision_model"}
        self.modalities = tuple(name for name, tower in towers.items() if hasattr(model, tower))
        self.embedding_dim = int(model.config.projection_dim)
        self.max_text_length = processor.longest_text
        head = getattr(model, "logit_head", None)
        self.logit_rule = None if head is None else head.plain_rule()
        self.token_budget = default_token_budget(model.device)
        self.batch_size = default_batch_size(model.device)
        self.tally = ImageTally()
        if model.device.type == "cpu":
            raise_malloc_thresholds()

    def tokenize_texts(self, texts: Sequence[str]) -> TokenizedTexts:
        """Tokenize texts.

        Args:
            texts: N texts.
        """
        return TokenizedTexts(self._processor, texts)

    def encode_texts(self, texts: Sequence[TokenizedText]) -> NDArray[np.float32]:
        """Embed texts, (N, P); the same numbers as `encode_texts` of this package.

        Args:
            texts: N texts, each from `tokenize_texts`.
        """
        return _to_numpy(encode_tokenized_texts(self._model, self._processor, texts))

    def prepare_image(self, image: Image.Image) -> dict[str, Tensor]:
        """Resize and normalize an image.

        Args:
            image: An upright RGB image.
        """
        return dict(self._processor(images=[image]))

    def encode_images(self, images: Sequence[Mapping[str, Tensor]]) -> NDArray[np.float32]:
        """Embed images, (N, P); the same numbers as `encode_images` of this package.

        Args:
            images: N images, each from `prepare_image`.
        """
        embeds = encode_prepared_images(
            self._model,
            images,
            batch_size=self.batch_size,
            on_batch=lambda _, vision_embeds: self.tally.add(vision_embeds),
        )
        return _to_numpy(embeds)


class OnnxModelEncoder:
    """An exported model, run by ONNX Runtime; see `ServedEncoder`.

    Args:
        encoder: The model's graphs.
    """

    def __init__(self, encoder: OnnxEncoder) -> None:
        self._encoder = encoder
        self.modalities = encoder.modalities
        self.embedding_dim = encoder.embedding_dim
        self.max_text_length = encoder.processor.longest_text
        self.logit_rule = encoder.logit_rule
        self.token_budget = DEFAULT_TOKEN_BUDGET
        self.batch_size = DEFAULT_BATCH_SIZE
        self.tally = ImageTally()  # stays empty: a graph gives no outputs of the tower

    def tokenize_texts(self, texts: Sequence[str]) -> TokenizedTexts:
        """Tokenize texts.

        Args:
            texts: N texts.
        """
        return TokenizedTexts(self._encoder.processor, texts)

    def encode_texts(self, texts: Sequence[TokenizedText]) -> NDArray[np.float32]:
        """Embed texts, (N, P).

        Args:
            texts: N texts, each from `tokenize_texts`.
        """
        return _to_numpy(self._encoder.encode_tokenized_texts(texts))

    def prepare_image(self, image: Image.Image) -> dict[str, Tensor]:
        """Resize and normalize an image.

        Args:
            image: An upright RGB image.
        """
        return dict(self._encoder.processor(images=[image]))

    def encode_images(self, images: Sequence[Mapping[str, Tensor]]) -> NDArray[np.float32]:
        """Embed images, (N, P).

        Args:
            images: N images, each from `prepare_image`.
        """
        return _to_numpy(self._encoder.encode_prepared_images(images))


def _to_numpy(embeds: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = embeds.numpy()
    return array
