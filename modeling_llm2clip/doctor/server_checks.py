"""Compares an embedding endpoint with the model folder that it should serve."""

from __future__ import annotations

import os
import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..configs.serve_config import ServerCheckConfig
from ..encoding.encode import encode_images, encode_texts
from ..model_folders.golden_embeddings import (
    GOLDEN_TEXTS,
    compare_golden,
    find_tolerance,
    measure_distances,
    render_golden_images,
)
from ..model_folders.model_folder import find_model_folder
from ..model_folders.model_loading import load_model
from .endpoint_client import EndpointClient, EndpointError
from .model_report import (
    ConcernError,
    ModelReport,
    NotApplicableError,
    PlannedCheck,
    run_checks,
)
from .model_under_test import SHORT_TEXTS, ModelUnderTest
from .served_difference import Comparison, find_rounding
from .served_inputs import EXACT_TEXTS, render_odd_images, render_photographs
from .served_variants import TextVariants, list_image_variants

_REQUESTS_PER_THREAD = 4
_TEXTS_PER_REQUEST = 3
_WORDS = "a dog and two red apples lie on a wooden table beside an open window at night "
# Words of one token or a few, by which texts differ that have all else in common.
_ENDS, _TOKENS_OF_ENDS = ("cats", "dogs"), 8
_TEXTS = list(dict.fromkeys([*GOLDEN_TEXTS, *SHORT_TEXTS]))
_BLANK_REQUESTS: tuple[list[str], ...] = ([""], ["   "], [], [GOLDEN_TEXTS[0], ""])


@dataclass
class _Served:
    """An endpoint beside the model that it should serve."""

    client: EndpointClient
    tested: ModelUnderTest
    config: ServerCheckConfig
    tolerance: float

    @cached_property
    def in_half_precision(self) -> dict[str, ModelUnderTest]:
        """The model, by the name of each half-precision dtype."""
        found = {}
        for dtype in (torch.float16, torch.bfloat16):
            model, _ = load_model(self.tested.folder, device=self.tested.device, dtype=dtype)
            found[str(dtype).removeprefix("torch.")] = replace(
                self.tested, config=model.config, model=model
            )
        return found

    def write_text(self, num_tokens: int, *, first: int = 0) -> str:
        """Write the longest text of whole words within this number of tokens."""
        known = _WORDS.split()
        first %= len(known)
        words = [*known[first:], *known[:first]] * (num_tokens // len(known) + 1)

        def count(num_words: int) -> int:
            return len(self.tested.list_bare_ids(" ".join(words[:num_words])))

        num_words = bisect_right(range(1, len(words) + 1), num_tokens, key=count)
        return " ".join(words[: max(num_words, 1)])

    def embed(self, inputs: Sequence[Any]) -> Tensor:
        """Send texts or images, in one request where the schema allows it."""
        embed = self.client.embed_texts if isinstance(inputs[0], str) else self.client.embed_images
        return embed(inputs)

    def embed_at_once(self, requests: Sequence[Sequence[Any]]) -> Tensor:
        """Send many requests at once, each with texts or images alone."""
        with ThreadPoolExecutor(self.config.concurrency) as pool:
            return torch.cat(list(pool.map(self.embed, requests)))

    def require_equal(
        self, served: Tensor, inputs: Sequence[Any], *, where: str, in_sequence: bool = False
    ) -> float:
        """Raise ValueError with the cause if embeddings differ; return their distance."""
        compared = Comparison(
            served=served,
            wanted=_encode(self.tested, inputs),
            inputs=inputs,
            tolerance=self.tolerance,
            list_variants=lambda: (
                TextVariants(self.tested).list_variants(inputs)
                if isinstance(inputs[0], str)
                else list_image_variants(self.tested, inputs)
            ),
            encode_in_half=lambda: {
                name: _encode(tested, inputs) for name, tested in self.in_half_precision.items()
            },
            in_sequence=in_sequence,
        )
        if (text := compared.explain()) is not None:
            raise ValueError(f"{where}: {text}")
        return compared.measure()

    def require_equal_alone(self, inputs: Sequence[Any]) -> tuple[Tensor, float]:
        """Send each input alone, and compare them thoroughly; return embeddings and distance."""
        served = torch.cat([self.embed([one]) for one in inputs])
        return served, self.require_equal(served, inputs, where="one at a time", in_sequence=True)

    def check_together(self, *batches: Sequence[Any], where: Sequence[str]) -> str:
        distances = [
            self.require_equal(self.embed(batch), batch, where=name)
            for batch, name in zip(batches, where, strict=True)
        ]
        return self.describe(sum(map(len, batches)), max(distances))

    def describe(self, count: int, distance: float) -> str:
        return f"{count} embeddings at most {distance:.1e} off (allowed {self.tolerance:.2g})"


def _encode(tested: ModelUnderTest, inputs: Sequence[Any]) -> Tensor:
    """Encode texts or images with the model itself; (N, P) float32 of unit length."""
    if isinstance(inputs[0], str):
        return encode_texts(tested.model, tested.processor, list(inputs))
    return encode_images(tested.model, tested.processor, list(inputs))


def _check_model(served: _Served) -> str:
    """Check the folder itself first: a wrong one says nothing about a server."""
    tested = served.tested
    try:
        compared = compare_golden(tested.folder, tested.model, tested.processor)
    except ValueError as error:
        raise ValueError(
            f"The folder itself fails: {error} Check it with llm2clip doctor, without --server."
        ) from error
    if compared is None:
        raise NotApplicableError("the folder has no recorded embeddings; its model is compared")
    return compared


def _check_connection(served: _Served) -> str:
    first = served.client.connect(GOLDEN_TEXTS[0])
    return f"{served.client.urls[0]} embeds as {served.client.model_name!r}, width {first.shape[1]}"


def _check_texts(served: _Served) -> str:
    embeds, distance = served.require_equal_alone(_TEXTS)
    rounding = find_rounding(embeds)
    if rounding is not None and served.config.served_dtype in (None, "float32"):
        raise ConcernError(
            f"{len(_TEXTS)} embeddings at most {distance:.1e} from the model's, but their values "
            f"are rounded to {rounding}"
        )
    return served.describe(len(_TEXTS), distance)


def _alone(list_inputs: Callable[[_Served], Sequence[Any]]) -> Callable[[_Served], str]:
    """Make a check that sends each of these inputs in a request of its own."""

    def check(served: _Served) -> str:
        inputs = list_inputs(served)
        return served.describe(len(inputs), served.require_equal_alone(inputs)[1])

    return check


def _list_exact_texts(served: _Served) -> list[str]:
    """Texts that servers rewrite, and pairs that a cache keyed by part of a text mixes up."""
    shared = served.write_text(max(served.tested.room - _TOKENS_OF_ENDS, 1))
    pairs = [*(f"{shared} {end}" for end in _ENDS), *(f"{end} {shared}" for end in _ENDS)]
    return [*EXACT_TEXTS, *pairs]


def _check_batched_texts(served: _Served) -> str:
    backwards = [_TEXTS[0], *reversed(_TEXTS)]  # the first one twice
    return served.check_together(_TEXTS, backwards, where=("in one request", "in reverse order"))


def _check_mixed_lengths(served: _Served) -> str:
    """Send texts from one token to the limit at once, which shows padding and truncation."""
    room = served.tested.room
    counts = sorted({1, 4, room // 8, room // 4, room // 2, room - room // 8, room})
    # Each begins with another word, so that none equals another that is truncated.
    texts = [served.write_text(count, first=number) for number, count in enumerate(counts)]
    texts = [*texts[::2], *texts[1::2], GOLDEN_TEXTS[0]]
    return served.check_together(texts, where=["short and long texts in one request"])


def _check_concurrent_texts(served: _Served) -> str:
    """Send many requests at once, each with other texts, which shows cross-talk."""
    count = served.config.concurrency * _REQUESTS_PER_THREAD
    chooser = random.Random(0)
    pool = [*_TEXTS, *(f"{text} {n}" for n in range(8) for text in SHORT_TEXTS)]
    requests = [chooser.sample(pool, chooser.randint(1, _TEXTS_PER_REQUEST)) for _ in range(count)]
    texts = [text for request in requests for text in request]
    found = served.embed_at_once(requests)
    distance = served.require_equal(found, texts, where=f"{count} requests at once")
    return f"{count} requests: {served.describe(len(texts), distance)}"


def _check_long_text(served: _Served) -> str:
    """A text beyond the limit must be truncated as by the model, or refused."""
    limit = served.tested.config.max_text_length
    long = f"{_WORDS * (limit // len(_WORDS.split()) + 2)}and an owl"
    try:
        found = served.client.embed_texts([long])
    except EndpointError as error:
        if error.status is None or not 400 <= error.status < 500:
            raise
        return f"a text beyond {limit} tokens is refused with {error.status}"
    distance = served.require_equal(found, [long], where=f"a text beyond {limit} tokens")
    return f"truncated as the model does, {distance:.1e} from it"


def _check_empty_text(served: _Served) -> str:
    """An empty text has no embedding, and a server has to refuse it."""
    errors, statuses = [], set()
    for texts in _BLANK_REQUESTS:
        try:
            served.client.embed_texts(texts)
        except EndpointError as error:
            if error.status is None or error.status >= 500:
                errors.append(f"{texts!r}: {error}")
            else:
                statuses.add(error.status)
        else:
            errors.append(f"{texts!r} gets an answer without an error")
    if errors:
        raise ValueError(f"{'; '.join(errors)}. Blank texts have to be refused with 400 or 422.")
    return f"{len(_BLANK_REQUESTS)} requests refused with {', '.join(map(str, sorted(statuses)))}"


def _embed_with(served: _Served, name: str, value: Any) -> Tensor:
    """Embed the texts with an option that a server may refuse."""
    if served.client.schema == "cohere":
        raise NotApplicableError(f"the schema cohere has no {name}")
    try:
        return served.client.embed_texts(_TEXTS, **{name: value})
    except EndpointError as error:
        if error.status not in (400, 422):
            raise
        raise NotApplicableError(f"{name}={value!r} is refused: {error}") from None


def _check_base64(served: _Served) -> str:
    """Check base64, which OpenAI's client asks for by default."""
    found = _embed_with(served, "encoding_format", "base64")
    wanted = served.client.embed_texts(_TEXTS)
    # The same numbers, once in decimals; a served model may round once more between two requests.
    if found.shape != wanted.shape or not float(
        measure_distances(found, wanted).max()
    ) <= served.tolerance * float(wanted.norm(dim=-1).max()):
        raise ValueError(
            "base64 and float give different embeddings; wanted base64 of little-endian float32."
        )
    return f"{len(_TEXTS)} embeddings equal those in decimals"


def _check_dimensions(served: _Served) -> str:
    """Check that fewer dimensions are the first ones, at unit length."""
    count = max(served.tested.config.projection_dim // 2, 1)
    found = _embed_with(served, "dimensions", count)
    if found.shape[1] != count:
        raise ValueError(f"dimensions={count} gives {found.shape[1]} dimensions.")
    wanted = torch.nn.functional.normalize(_encode(served.tested, _TEXTS)[:, :count], dim=-1)
    distance = float(measure_distances(found, wanted).max())
    # Half of the dimensions have less than the whole length, by which rounding is divided.
    if not distance <= 4 * served.tolerance:
        lengths = found.norm(dim=-1)
        raise ValueError(
            f"dimensions={count} gives embeddings {distance:.1e} from the model's first {count} "
            f"at unit length; their lengths are {lengths.min():.3g} to {lengths.max():.3g}."
        )
    return f"dimensions={count}: {served.describe(len(_TEXTS), distance)}"


def _check_batched_images(served: _Served) -> str:
    if not served.client.batches_images:
        raise NotApplicableError("the schema has one image per request")
    images = [*render_golden_images(), *render_odd_images()]
    return served.check_together([*images, images[0]], where=["in one request"])


def _check_concurrent_inputs(served: _Served) -> str:
    known = [*render_golden_images(), *render_odd_images(), *_TEXTS]
    count = served.config.concurrency * _REQUESTS_PER_THREAD
    inputs = [known[row % len(known)] for row in range(count)]
    random.Random(0).shuffle(inputs)
    found = served.embed_at_once([[one] for one in inputs])
    distances = []
    for kind in (str, Image.Image):
        rows = [row for row, one in enumerate(inputs) if isinstance(one, kind)]
        part = [inputs[row] for row in rows]
        where = f"{count} requests at once"
        distances.append(served.require_equal(found[rows], part, where=where))
    return served.describe(count, max(distances))


_IMAGE = "image"
_PLANNED: tuple[PlannedCheck[_Served], ...] = (
    PlannedCheck("model", _check_model),
    PlannedCheck("connection", _check_connection),
    PlannedCheck("texts", _check_texts, ("connection",)),
    PlannedCheck("exact texts", _alone(_list_exact_texts), ("texts",)),
    PlannedCheck("batched texts", _check_batched_texts, ("texts",)),
    PlannedCheck("mixed lengths", _check_mixed_lengths, ("texts",)),
    PlannedCheck("concurrent texts", _check_concurrent_texts, ("texts",)),
    PlannedCheck("long text", _check_long_text, ("texts",)),
    PlannedCheck("empty text", _check_empty_text, ("connection",)),
    PlannedCheck("base64", _check_base64, ("connection",)),
    PlannedCheck("dimensions", _check_dimensions, ("texts",)),
    PlannedCheck("images", _alone(lambda _: render_golden_images()), ("connection",), _IMAGE),
    # Of the sizes and the detail of photographs, which servers shrink and compress.
    PlannedCheck("photographs", _alone(lambda _: render_photographs()), ("images",), _IMAGE),
    # Libraries decode them differently.
    PlannedCheck("image decoding", _alone(lambda _: render_odd_images()), ("images",), _IMAGE),
    PlannedCheck("batched images", _check_batched_images, ("image decoding",), _IMAGE),
    PlannedCheck(
        "concurrent inputs", _check_concurrent_inputs, ("texts", "image decoding"), _IMAGE
    ),
)


def check_server(
    source: str | Path, config: ServerCheckConfig, *, revision: str | None = None
) -> ModelReport:
    """Check that an endpoint gives the embeddings of a model, and name what differs.

    The model runs here too: it says what was wanted, and what an error, such as a lost prompt,
    would give.

    Args:
        source: Folder or Hub id of the LLM2CLIP model that is served, with a text tower.
        config: Address and schema of the endpoint, and how it is asked.
        revision: Branch, tag or commit of the Hub repository.

    Returns:
        Every check, in order; one that cannot run is marked as skipped with its reason.

    Raises:
        ValueError: There is no such model or device, `config.server` is missing, or the model has
            no text tower.

    Examples:
        >>> config = ServerCheckConfig(server="http://127.0.0.1:8000", schema="jina")
        >>> check_server("my-model", config).healthy  # doctest: +SKIP
        True
    """
    if config.server is None:
        raise ValueError("server=None; give the address of an endpoint.")
    folder = find_model_folder(source, revision=revision)
    model, processor = load_model(folder, device=config.device)
    if not hasattr(model, "text_model"):
        raise ValueError(f"{folder} has no text tower, and texts are what an endpoint is asked.")
    tested = ModelUnderTest(
        folder,
        str(model.device),
        config=model.config,
        model_class=type(model),
        model=model,
        tokenizer=processor.tokenizer,
        processor=processor,
    )
    api_key = os.environ.get(config.api_key_env, "")
    client = EndpointClient(config, model_name=config.model_name or "", api_key=api_key)
    client.model_name = config.model_name or client.find_model_name() or Path(source).name
    dtype = getattr(torch, config.served_dtype) if config.served_dtype else model.dtype

    def find_obstacle(about: str | None) -> str | None:
        if about is None:
            return None
        if not client.takes_images:
            return "the schema openai has no images; give --schema chat, cohere or jina"
        return None if tested.encodes_images else "the folder has no vision tower"

    served = _Served(client, tested, config, find_tolerance(dtype, other_machine=True))
    return ModelReport(config.server, list(run_checks(_PLANNED, served, find_obstacle)))
