"""Common interface to models that embed texts and images, whatever backend runs them.

N is the number of texts or images, B the batch size, D the width of a tower, P `projection_dim`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..data.images.image_sources import open_image
from ..heads_llm2clip import LogitRule
from ..packing_llm2clip import plan_token_batches
from ..processing_llm2clip import LLM2CLIPProcessor
from .batches import (
    OnBatch,
    PreparedImages,
    encode_distinct,
    iterate_batches,
    join_images,
    prepare_batches,
    prepare_images,
    require_finite,
    split_evenly,
)
from .pixel_normalization import PixelNormalization
from .precision import float32_as_such
from .tokenized_texts import TokenizedText, TokenizedTexts

_TOKENS_PER_TEXT = 64  # turns a batch size into a token budget


def choose_batches(device: torch.device, batch_size: int | None = None) -> tuple[int, int]:
    """Return the maximum tokens and images per batch; without `batch_size`, the device decides."""
    # On a CPU, batches are split further, and larger batches of images overflow the caches.
    return (
        (batch_size * _TOKENS_PER_TEXT, batch_size)
        if batch_size is not None
        else ((4096, 8) if device.type == "cpu" else (16384, 64))
    )


class EncodedImages(NamedTuple):
    """The images of a batch that could be read.

    Attributes:
        rows: Row of each readable image.
        embeds: (B, P) float32 of unit length, on the CPU by default; or (B, D) if not projected.
        tower_embeds: (B, D) before the projection; None if the encoder only returns projections.
        errors: Error message for each unreadable image, by the image's row.
    """

    rows: list[int]
    embeds: Tensor
    tower_embeds: Tensor | None
    errors: dict[int, str]


class Encoder(ABC):
    """A model that embeds texts and images.

    Results are float32 on the CPU, in the order of the inputs.

    Attributes:
        processor: The model's processor.
        modalities: Supported inputs: `"text"`, `"image"` or both.
        embedding_dim: P.
        device: Device that computes.
        token_budget: Default maximum tokens per batch.
        batch_size: Default maximum images per batch.
        projects_at_once: Whether the encoder returns only unit embeddings, never embeddings before
            the projection.
        runs_ahead: Whether the device computes asynchronously, as a GPU does. Embeddings then stay
            on the device until many are copied together.
        normalization: Steps that the device runs instead of the processor; None if there are none.
        min_jpeg_side: Minimum side of a JPEG decoded at a reduced size, as in `load_images`. An
            `open_image` passed to `iterate_images` must apply this minimum itself.
    """

    normalization: PixelNormalization | None = None
    min_jpeg_side: int | None = None
    projects_at_once: ClassVar[bool]
    runs_ahead = False
    _lacks: ClassVar[str]  # error message for an unsupported modality
    _plan_texts: Callable[..., list[list[int]]] = staticmethod(plan_token_batches)
    processor: LLM2CLIPProcessor
    modalities: tuple[str, ...]
    embedding_dim: int
    device: torch.device
    token_budget: int
    batch_size: int

    @property
    def logit_rule(self) -> LogitRule | None:
        """Rule that turns cosines into logits; None if there is none."""
        return None

    @property
    def max_text_length(self) -> int:
        """Maximum tokens per text; the rest is truncated."""
        return self.processor.longest_text

    def prepare_texts(self, texts: Sequence[TokenizedText]) -> dict[str, Any]:
        """Prepare a batch for `encode_tokens`: ids and mask, both (B, L). Runs in a thread."""
        ids = [torch.from_numpy(text.ids).long() for text in texts]
        input_ids = pad_sequence(
            ids, batch_first=True, padding_value=self.processor.tokenizer.pad_token_id
        )
        attention_mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def prepare_images(self, images: Sequence[Any]) -> PreparedImages:
        """Prepare a batch of images for `encode_pixels`. Runs in a thread."""
        return prepare_images(
            self.processor,
            images,
            open_image=partial(open_image, min_jpeg_side=self.min_jpeg_side),
            normalization=self.normalization,
        )

    @abstractmethod
    def encode_tokens(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode one batch of texts, given as ids and mask, (B, L) int64, padded on the right."""

    @abstractmethod
    def encode_pixels(self, pixel_values: Tensor, **others: Tensor) -> Tensor:
        """Encode one batch of images from the processor, (B, 3, H, W) float32."""

    def project(self, modality: str, embeds: Tensor) -> Tensor:  # noqa: ARG002
        """Map the output of `encode_tokens` or `encode_pixels` to unit embeddings.

        An encoder whose output is already projected returns it unchanged. The result is on the
        device of `embeds`.
        """
        return embeds

    def encode_texts(
        self,
        texts: Iterable[str] | Iterable[TokenizedText],
        *,
        project: bool = True,
        token_budget: int | None = None,
        show_progress: bool = False,
        on_batch: OnBatch | None = None,
        num_unpooled: int | None = None,
    ) -> Tensor:
        """Encode texts, already tokenized or not; see the function `encode_texts`.

        `num_unpooled` is the number of tokens of prompt and instruction to leave out of pooling,
        for models of this package. None leaves out only the prompt.
        """
        self._require("text", project=project)
        first = texts[0] if isinstance(texts, list) and texts else None
        if not isinstance(texts, TokenizedTexts) and not isinstance(first, TokenizedText):
            texts = TokenizedTexts(self.processor, cast(Iterable[str], texts))
        tokens = list(cast(Iterable[TokenizedText], texts))
        budget = self.token_budget if token_budget is None else token_budget
        if budget < 1:
            raise ValueError(f"{token_budget=} must be positive, or None for the default.")

        lengths = [len(text.ids) for text in tokens]
        options: Any = {} if num_unpooled is None else {"num_unpooled": num_unpooled}
        return self._encode(
            "text",
            tokens,
            project=project,
            batches=lambda rows: self._plan_texts(
                [lengths[row] for row in rows], token_budget=budget
            ),
            prepare=self.prepare_texts,
            encode=lambda inputs: self.encode_tokens(**inputs, **options),
            on_batch=on_batch,
            sizes=lengths,  # each token costs about the same, and the longest texts come first
            unit=" tokens",
            show_progress=show_progress,
        )

    def encode_images(
        self,
        images: Sequence[Any],
        *,
        project: bool = True,
        batch_size: int | None = None,
        num_workers: int | None = None,
        show_progress: bool = False,
        on_batch: OnBatch | None = None,
    ) -> Tensor:
        """Encode images; see the function `encode_images`."""
        self._require("image", project=project)
        if isinstance(images, str | bytes) or not isinstance(images, Sequence) or not images:
            raise ValueError(f"images must be a list of at least one image, not {images!r}.")
        size = self.batch_size if batch_size is None else batch_size
        if size < 1 or (num_workers is not None and num_workers < 1):
            raise ValueError(f"{batch_size=}, {num_workers=}: each must be at least one.")

        return self._encode(
            "image",
            images,
            project=project,
            batches=lambda rows: split_evenly(len(rows), size=size),
            prepare=self.prepare_images,
            encode=lambda prepared: self.encode_pixels(**prepared.inputs),
            num_workers=num_workers,
            on_batch=on_batch,
            unit=" images",
            show_progress=show_progress,
        )

    def _encode(
        self, modality: str, inputs: Sequence[Any], *, project: bool, **options: Any
    ) -> Tensor:
        finish = partial(self.project, modality) if project else Tensor.float
        if self.runs_ahead:
            return encode_distinct(inputs, device=self.device, finish=finish, **options)
        embeds = encode_distinct(inputs, device=self.device, **options)
        if project and not self.projects_at_once:
            embeds = finish(embeds)
            require_finite(embeds, range(len(embeds)), inputs)
        return embeds

    def iterate_texts(
        self,
        texts: Sequence[TokenizedText],
        plan: Sequence[Sequence[int]],
        *,
        project: bool = True,
    ) -> Iterator[Tensor]:
        """Yield the embeddings of each batch of a plan, which lists the rows of each batch.

        If the encoder computes asynchronously, the embeddings stay on its device and are not
        checked.
        """
        self._require("text", project=project)

        def encode(inputs: Any) -> Tensor:
            embeds = self.encode_tokens(**inputs)
            return self.project("text", embeds) if project else embeds

        for _, embeds in iterate_batches(
            texts, plan, prepare=self.prepare_texts, encode=encode, device=self.device,
            to_cpu=not self.runs_ahead,
        ):  # fmt: skip
            yield embeds

    @torch.no_grad()
    def iterate_images(
        self,
        images: Sequence[Any],
        plan: Sequence[Sequence[int]],
        *,
        project: bool = True,
        num_workers: int | None = None,
        open_image: Callable[[Any], Any] = open_image,
        on_error: Callable[[Any, ValueError], str] | None = None,
        to_cpu: bool = True,
    ) -> Generator[EncodedImages]:
        """Yield the readable images of each batch of a plan; threads open them.

        `open_image` and `on_error` are as in `prepare_images`. Without `to_cpu`, embeddings stay on
        the device, and the caller must check them.
        """
        self._require("image", project=project)
        parts = ([images[row] for row in rows] for rows in plan)
        prepare = partial(
            prepare_images, self.processor, open_image=open_image, on_error=on_error,
            normalization=self.normalization,
        )  # fmt: skip
        in_threads = prepare_batches(
            parts, prepare, device=self.device, num_workers=num_workers, join=join_images
        )
        with closing(in_threads) as batches, float32_as_such():
            for rows, prepared in zip(plan, batches, strict=True):
                readable = [rows[place] for place in prepared.places]
                errors = {rows[place]: error for place, error in prepared.errors.items()}
                tower_embeds = None
                embeds = torch.empty(0, self.embedding_dim, device="cpu" if to_cpu else self.device)
                if readable:
                    embeds = self.encode_pixels(**prepared.inputs)
                    tower_embeds = None if self.projects_at_once else embeds
                    if project:
                        embeds = self.project("image", embeds)
                    embeds = embeds.float()
                if readable and to_cpu:
                    embeds = embeds.cpu()
                    require_finite(embeds, readable, images)
                yield EncodedImages(readable, embeds, tower_embeds, errors)

    def _require(self, modality: str, *, project: bool) -> None:
        if modality not in self.modalities:
            raise ValueError(self._lacks.format(there=self.modalities[0], wanted=modality))
        if self.projects_at_once and not project:
            raise ValueError(
                "project=False: this model returns only projected embeddings, as ONNX graphs do. "
                "Use the torch model."
            )
