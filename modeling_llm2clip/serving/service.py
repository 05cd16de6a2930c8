"""The service behind every route, independent of HTTP: embedding, classification and search."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from .._suggestions import counted
from ..configs.serve_config import ServeConfig
from ..configuration_llm2clip import LLM2CLIPConfig
from ..data.labels import check_templates, make_labels
from ..encoding.batches import (
    PreparedImages,
    default_num_workers,
    join_images,
    require_finite,
    use_one_core,
)
from ..encoding.devices import find_device, require_compiler
from ..encoding.encode import TorchEncoder, average_prompts
from ..encoding.encoder_interface import Encoder
from ..encoding.layer_compilation import compile_layers
from ..encoding.precision import float32_as_such
from ..encoding.tokenized_texts import TokenizedText, TokenizedTexts
from ..image_loading_llm2clip import get_image_limits
from ..model_folders.model_folder import find_model_folder
from ..model_folders.model_loading import load_model, require_trained
from ..model_folders.onnx_folder import find_onnx_folder, load_onnx_encoder
from ..model_folders.training_images import TrainingImages, read_training_images
from ..processing_llm2clip import clean_list
from ..search.filters import FilterError, check_filter
from ..search.image_index import ImageIndex
from ..search.index_about import EVERY_IMAGE, IndexUnavailableError
from ..search.index_encoding import subtract_negatives
from ..search.model_identity import restore_tally
from ..search.tag_images import Tag, rank_labels
from .batching import BatchWorker, Lane, OnBatch, await_all_or_none
from .image_inputs import decode_sent_image
from .service_results import ClassifiedImages, EmbeddedInputs, FoundImages, RequestError

Input: TypeAlias = str | bytes | Image.Image
Query: TypeAlias = Input | list[Input]
"""Inputs of one query; if there are several, their embeddings are averaged."""
T = TypeVar("T")

_TOKENIZED_AT_ONCE = 64  # texts


class EmbeddingService:
    """Serves a model, and optionally an index, to many concurrent callers.

    Args:
        encoder: Encoder of the model to serve.
        config: Limits and batching options.
        model_name: Name of the model in requests and responses.
        model_config: Configuration that defines the model's instructions; None for no instructions.
        index: Index to search, built with the same model.
        training_images: Summary of the images that the model was trained on; None if unknown.
        on_batch: Called after each batch, in the thread that runs the model.

    Attributes:
        num_pending: Number of texts and images in progress or queued.

    Examples:
        >>> from asyncio import run
        >>> from pathlib import Path
        >>> service = EmbeddingService.open("my-model")
        >>> embedded = run(service.embed(["a dog", Path("dog.png").read_bytes()]))
        >>> embedded.embeds.shape == (2, service.encoder.embedding_dim)
        True
        >>> service.close()
    """

    def __init__(
        self,
        encoder: Encoder,
        config: ServeConfig | None = None,
        *,
        model_name: str,
        model_config: LLM2CLIPConfig | None = None,
        index: ImageIndex | None = None,
        training_images: TrainingImages | None = None,
        on_batch: OnBatch | None = None,
    ) -> None:
        self.encoder = encoder
        self.config = config = config or ServeConfig()
        self._limits = get_image_limits(**config.list_limits())
        self.model_name = model_name
        self.index = index
        self.training_images = training_images
        self.on_batch = on_batch

        @torch.no_grad()
        def encode_images(images: Sequence[PreparedImages]) -> NDArray[np.float32]:
            batch = join_images(list(enumerate(images)))
            with float32_as_such():
                embeds = encoder.project("image", encoder.encode_pixels(**batch.inputs))
            embeds = embeds.float().cpu()
            require_finite(embeds, range(len(embeds)))
            return embeds.numpy()

        def encode_texts(texts: Sequence[Any], lane: str) -> NDArray[np.float32]:
            options = {} if lane == "text" else {"num_unpooled": unpooled[lane]}
            return encoder.encode_texts(texts, **options).numpy()  # type: ignore[arg-type]

        # Texts can share a batch only if the same number of tokens is left out of pooling.
        self._instructions, unpooled = _list_instructions(encoder, model_config)
        lanes = [
            Lane(name, partial(encode_texts, lane=name), encoder.token_budget) for name in unpooled
        ]
        lanes.append(Lane("image", encode_images, encoder.batch_size))
        self._worker = BatchWorker(
            lanes,
            on_batch=lambda lane, *counts: (
                self.on_batch and self.on_batch(lane.partition(" ")[0], *counts)
            ),
        )
        # Separate threads, so slow image decoding delays neither texts nor searches.
        self._text_threads, self._image_threads, self._search_threads = (
            ThreadPoolExecutor(default_num_workers(), initializer=use_one_core) for _ in range(3)
        )
        self._lock = threading.Lock()
        self.num_pending = 0
        self._is_closed = False

    @classmethod
    def open(
        cls, model: str | Path, config: ServeConfig | None = None, *, index: str | None = None
    ) -> EmbeddingService:
        """Load a model and optionally open an index.

        Args:
            model: Folder or Hub id of a trained model.
            config: Limits and batching options.
            index: Image index written by `llm2clip index`; None for no search.

        Raises:
            ValueError: The model is untrained, the device is not available, or the index was built
                with another model.
        """
        config = config or ServeConfig()
        if config.compile:
            require_compiler(find_device(config.device))
        is_onnx = config.backend == "onnx"
        source = find_onnx_folder(model) if is_onnx else find_model_folder(model)
        images = None if index is None else ImageIndex.open(index, model=source)
        if is_onnx:
            saved = LLM2CLIPConfig.from_pretrained(source, local_files_only=True)
            require_trained(saved, purpose="serving", source=source)
            encoder: Encoder = load_onnx_encoder(source, weights=config.text_weights)
        else:
            # In bfloat16, an embedding depends a little on the rest of its batch. A CPU's requests
            # are small, so there an automatic precision is the stored dtype.
            precision = (
                None
                if config.precision == "auto" and find_device(config.device).type == "cpu"
                else config.precision
            )
            loaded, processor = load_model(source, device=config.device, precision=precision)
            require_trained(loaded.config, purpose="serving", source=model)
            if config.compile:
                compile_layers(loaded)
            saved, encoder = loaded.config, TorchEncoder(loaded, processor)
        return cls(
            encoder,
            config,
            model_name=config.model_name or Path(model).resolve().name,
            model_config=saved,
            index=images,
            training_images=read_training_images(source),
        )

    @property
    def is_alive(self) -> bool:
        """True as long as the thread that runs the model is alive."""
        return self._worker.is_alive

    def close(self) -> None:
        """Finish the queued batches and stop all threads; calling it again has no effect."""
        self._is_closed = True
        self._worker.close()
        for threads in (self._text_threads, self._image_threads, self._search_threads):
            threads.shutdown(wait=False, cancel_futures=True)

    async def embed(
        self,
        inputs: Sequence[Input],
        *,
        dimensions: int | None = None,
        truncate: bool = True,
        prompt_name: str | None = None,
    ) -> EmbeddedInputs:
        """Embed texts and images, in the order given.

        Args:
            inputs: One or more texts and images.
            dimensions: Keep the first dimensions of each embedding, renormalized; None keeps all.
            truncate: Truncate texts that exceed the model's token limit instead of refusing them.
            prompt_name: Name of the instruction to prepend to texts, such as `query` or `document`;
                None for no instruction.

        Raises:
            RequestError: An input cannot be embedded, or the queue is full.
        """
        self._check(inputs, dimensions)
        instruction, lane = self._find_instruction(prompt_name)
        texts = [place for place, value in enumerate(inputs) if isinstance(value, str)]
        images = [place for place, value in enumerate(inputs) if not isinstance(value, str)]
        work: dict[str, Any] = {}
        with self._admit(len(inputs)):
            if texts:
                contents = [str(inputs[place]) for place in texts]
                work["text"] = self._embed_texts(contents, instruction, lane, truncate=truncate)
            if images:
                work["image"] = self._embed_images([inputs[place] for place in images])
            done = dict(zip(work, await await_all_or_none(work.values()), strict=True))
        embeds = np.empty((len(inputs), self.encoder.embedding_dim), dtype=np.float32)
        num_tokens, truncated = 0, []
        if texts:
            embeds[texts], num_tokens, truncated = done["text"]
        if images:
            embeds[images] = done["image"]
        if dimensions is not None and dimensions < embeds.shape[1]:
            embeds = embeds[:, :dimensions]
            embeds = embeds / np.linalg.norm(embeds, axis=1, keepdims=True)
        truncated = [texts[place] for place in truncated]
        return EmbeddedInputs(embeds=embeds, num_tokens=num_tokens, truncated=truncated)

    async def classify(
        self,
        images: Sequence[bytes | Image.Image],
        labels: Sequence[str],
        *,
        templates: Sequence[str] = ("{}",),
        top_k: int | None = None,
    ) -> ClassifiedImages:
        """Classify images by any labels (zero-shot).

        Args:
            images: One or more images.
            labels: Candidate labels, without duplicates.
            templates: Prompts with `{}` for the label; embeddings of several prompts are averaged.
            top_k: Number of labels to return per image; None for all labels.

        Raises:
            RequestError: An input is invalid, the model lacks a tower, or the queue is full.
        """
        rule = self.encoder.logit_rule
        if rule is None:
            raise RequestError(400, "This model has only one tower; classification needs both.")
        with _refusing("templates"):
            check_templates(templates)
        with _refusing("candidate_labels"):
            candidates = make_labels(labels, templates=templates)
        prompts = [prompt for label in candidates for prompt in label.prompts]
        embedded = await self.embed([*prompts, *images])

        def rank() -> list[list[Tag]]:
            rows = torch.from_numpy(embedded.embeds)
            num_prompts = [len(label.prompts) for label in candidates]
            label_embeds = average_prompts(rows[: len(prompts)], num_prompts)
            image_embeds, most = rows[len(prompts) :], top_k or len(candidates)
            return rank_labels(image_embeds, label_embeds, candidates, rule=rule, top_k=most)

        tags = await self._run(self._text_threads, rank)
        truncated = sorted({place // len(templates) for place in embedded.truncated})
        return ClassifiedImages(tags=tags, num_tokens=embedded.num_tokens, truncated=truncated)

    async def search(
        self,
        queries: Sequence[Query],
        *,
        negative: Sequence[Input] = (),
        top_k: int = 6,
        threshold: float | None = None,
        where: str | None = None,
        prompt_name: str | None = None,
    ) -> FoundImages:
        """Find the images in the index that best match texts and images.

        Args:
            queries: Texts and images; a nested list is a single query, whose embeddings are
                averaged.
            negative: Texts and images that every query moves away from; see `ImageIndex.search`.
            top_k: Number of images to return per query.
            threshold: Lowest cosine of a hit; None to return all `top_k` images.
            where: Filter over the columns of the index; see `ImageIndex.search`.
            prompt_name: Name of the instruction to prepend to texts; None for no instruction.

        Raises:
            RequestError: There is no index, the index was removed or replaced by an index for
                another model, a query or the filter is invalid, or the queue is full.
        """
        index = self.index
        if index is None:
            raise RequestError(
                404, "This server has no index. Start it with --index DB.", code="no_index"
            )
        if where is not None:  # before anything is encoded
            with _refusing():
                check_filter(where, index.columns)
        parts_of = [query if isinstance(query, list) else [query] for query in queries]
        if empty := [number for number, parts in enumerate(parts_of) if not parts]:
            raise RequestError(
                400, f"Query number {empty[0] + 1} is empty. Send a text or an image."
            )
        query_of = [number for number, parts in enumerate(parts_of) for _ in parts]
        inputs = [part for parts in [*parts_of, negative] for part in parts]
        embedded = await self.embed(inputs, prompt_name=prompt_name)
        embeds, negatives = np.split(embedded.embeds, [len(query_of)])
        starts = np.searchsorted(query_of, np.arange(1, len(parts_of)))
        means = np.stack([rows.mean(axis=0) for rows in np.split(embeds, starts)])
        with _refusing():
            if len(negatives):
                means = subtract_negatives(means, negatives)
            try:
                results = await self._run(
                    self._search_threads,
                    lambda: index.search(means, top_k=top_k, threshold=threshold, where=where),
                )
            except IndexUnavailableError as error:
                raise RequestError(503, str(error), code="index_unavailable") from error
        # A truncated negative affects every query.
        places = (query_of[place:][:1] or range(len(parts_of)) for place in embedded.truncated)
        truncated = sorted(set(chain.from_iterable(places)))
        return FoundImages(results=results, num_tokens=embedded.num_tokens, truncated=truncated)

    def describe_far_images(self) -> str | None:
        """Describe how the images in the index differ from the training images.

        Returns:
            The description; None if the model was trained on similar images or if its training
            images are unknown.
        """
        if self.training_images is None or self.index is None:
            return None
        return self.training_images.describe_far(restore_tally(self.index.about))

    async def find_index_error(self) -> tuple[int | None, str | None]:
        """Check whether the index can be searched.

        Returns:
            The number of images, or None if unknown; and the error that prevents a search, or None.
        """
        index = self.index
        if index is None:
            return None, None
        try:
            return await asyncio.to_thread(index.count, EVERY_IMAGE), None
        except IndexUnavailableError as error:
            return None, str(error)

    def _check(self, inputs: Sequence[Input], dimensions: int | None) -> None:
        width = self.encoder.embedding_dim
        if not inputs:
            raise RequestError(400, "There is nothing to embed. Send at least one text or image.")
        for number, value in enumerate(inputs, 1):
            if not isinstance(value, str | bytes | Image.Image):
                raise RequestError(
                    400,
                    f"Input number {number} is of type {type(value).__name__}. Pass a text, the "
                    "bytes of an image, or a PIL image.",
                )
        if len(inputs) > self.config.max_queue:
            raise RequestError(
                413,
                f"The request has {len(inputs)} inputs. Send at most {self.config.max_queue}.",
                code="too_many_inputs",
            )
        if dimensions is not None and not 1 <= dimensions <= width:
            raise RequestError(
                400,
                f"dimensions must be between 1 and {width}, the width of this model's embeddings, "
                f"not {dimensions}.",
                param="dimensions",
            )
        modalities = {"text" if isinstance(value, str) else "image" for value in inputs}
        for modality in modalities.difference(self.encoder.modalities):
            raise RequestError(
                400,
                f"This model has no {modality} tower. Send {self.encoder.modalities[0]}s.",
                code="modality_not_supported",
            )

    @contextmanager
    def _admit(self, count: int) -> Iterator[None]:
        with self._lock:
            if self._is_closed:
                raise RequestError(503, "The server is stopping.", retry_after_s=1)
            if self.num_pending + count > self.config.max_queue:
                raise RequestError(
                    429,
                    f"The queue is full: {self.num_pending} texts and images are waiting, so there "
                    f"is not enough room for {count} more. Try again later.",
                    code="queue_full",
                    retry_after_s=1,
                )
            self.num_pending += count
        try:
            yield
        finally:
            with self._lock:
                self.num_pending -= count

    def _find_instruction(self, name: str | None) -> tuple[str, str]:
        """Return an instruction's text, and the name of its lane."""
        if name is None:
            return "", "text"
        if name not in self._instructions:
            known = ", ".join(map(repr, self._instructions))
            raise RequestError(
                400,
                f"The model has no instruction {name!r}. Choose one of {known}, or omit it.",
                param="prompt_name",
                code="unknown_prompt",
            )
        return self._instructions[name]

    async def _embed_texts(
        self, texts: list[str], instruction: str, lane: str, *, truncate: bool
    ) -> tuple[NDArray[np.float32], int, list[int]]:
        """Return embeddings (N, P), the number of tokens, and the truncated texts' positions."""
        tokens: list[TokenizedText] = []
        truncated: list[int] = []
        tokenize = partial(TokenizedTexts, self.encoder.processor)
        with _refusing(code="invalid_text"):
            # Before the instruction is added, so blank texts are detected and reported by number.
            await self._run(self._text_threads, partial(clean_list, texts))
            texts = [instruction + text for text in texts]
            # In parts, so other requests can be tokenized in between.
            for start in range(0, len(texts), _TOKENIZED_AT_ONCE):
                part = texts[start : start + _TOKENIZED_AT_ONCE]
                tokenized = await self._run(self._text_threads, partial(tokenize, part))
                tokens += tokenized
                truncated += (np.flatnonzero(tokenized.is_truncated) + start).tolist()
        if truncated and not truncate:
            raise RequestError(
                400,
                f"The model's limit of {self.encoder.max_text_length} tokens is exceeded by "
                f"{len(truncated)} of {counted(len(texts), 'text')} (first: number "
                f"{truncated[0] + 1}). Shorten them, or allow truncation.",
                code="text_too_long",
            )
        lengths = [len(text.ids) for text in tokens]
        embeds = await asyncio.wrap_future(self._worker.submit(lane, tokens, lengths))
        return embeds, sum(lengths), truncated

    async def _embed_images(self, images: Sequence[Any]) -> NDArray[np.float32]:
        """Embed images in parts, because decoding thousands at once would exhaust memory."""
        size = self.encoder.batch_size
        running: deque[asyncio.Future[NDArray[np.float32]]] = deque()
        parts: list[NDArray[np.float32]] = []
        try:
            for start in range(0, len(images), size):
                prepared = await await_all_or_none(
                    self._run(self._image_threads, partial(self._prepare, image))
                    for image in images[start : start + size]
                )
                computed = self._worker.submit("image", prepared, [1] * len(prepared))
                running.append(asyncio.wrap_future(computed))
                if len(running) > 1:  # encode one part while decoding the next
                    parts.append(await running.popleft())
            parts += [await future for future in running]
        finally:
            for future in running:
                future.cancel()
        return np.concatenate(parts)

    def _prepare(self, image: bytes | Image.Image) -> PreparedImages:
        decoded = (
            image if isinstance(image, Image.Image) else decode_sent_image(image, self._limits)
        )
        with _refusing(code="invalid_image"):
            return self.encoder.prepare_images([decoded])

    async def _run(self, threads: ThreadPoolExecutor, function: Callable[[], T]) -> T:
        return await asyncio.wrap_future(threads.submit(function))


def _list_instructions(
    encoder: Encoder, config: LLM2CLIPConfig | None
) -> tuple[dict[str, tuple[str, str]], dict[str, int | None]]:
    """Return each instruction's text and lane, and each lane's number of unpooled tokens."""
    lanes: dict[str, int | None] = {"text": None}
    # Every model accepts sentence-transformers' names for queries and documents.
    instructions = {"query": ("", "text"), "document": ("", "text")}
    if config is None:
        return instructions, lanes
    for name, text in config.instructions.items():
        lane = "text"
        if not config.pools_prompt:
            ids = encoder.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
            lane = f"text {name}"
            lanes[lane] = config.num_unpooled + len(ids)
        instructions[name] = (text, lane)
    return instructions, lanes


@contextmanager
def _refusing(param: str | None = None, *, code: str | None = None) -> Iterator[None]:
    """Convert a ValueError into a RequestError with status 400 and, for a filter, its own code."""
    try:
        yield
    except FilterError as error:
        raise RequestError(400, str(error), param="where", code="invalid_filter") from None
    except ValueError as error:
        raise RequestError(400, str(error), param=param, code=code) from None
