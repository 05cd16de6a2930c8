"""Compares an embedding endpoint with the model folder that it should serve."""

from __future__ import annotations

import os
import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .._suggestions import counted
from ..configs.serve_config import ServerCheckConfig
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
from .served_causes import embed_inputs, read_instructed
from .served_difference import Comparison, encode, find_rounding
from .served_inputs import list_exact_texts, render_odd_images, render_photographs, render_small

_REQUESTS_PER_THREAD = 4
_TEXTS_PER_REQUEST = 3
_WORDS = "a dog and two red apples lie on a wooden table beside an open window at night "
# Endings of one or few tokens for texts that are otherwise equal.
_ENDS, _TOKENS_OF_ENDS = ("cats", "dogs"), 8
_TEXTS = list(dict.fromkeys([*GOLDEN_TEXTS, *SHORT_TEXTS]))
# Beyond ten, numbers that are sorted as strings are in another order.
_MANY = 100
_FEWER = 32  # as servers that limit their batches allow
_MANY_TEXTS = [*_TEXTS, *(f"{text} {n}" for n in range(_MANY) for text in SHORT_TEXTS)][:_MANY]
_BLANK_REQUESTS: tuple[list[str], ...] = ([""], ["   "], [], [GOLDEN_TEXTS[0], ""])
_REFUSED = (400, 413, 422)  # statuses
# Names of the two commonest instructions in Cohere's schema.
_COHERE_TYPES = {"query": "search_query", "document": "search_document"}


@dataclass
class _Served:
    """An endpoint beside the model that it should serve."""

    client: EndpointClient
    tested: ModelUnderTest
    config: ServerCheckConfig
    dtype: torch.dtype

    @property
    def tolerance(self) -> float:
        return find_tolerance(self.dtype, other_machine=True)

    def write_text(self, num_tokens: int, *, first: int = 0) -> str:
        """Write the longest text of whole words within this number of tokens."""
        known = _WORDS.split()
        first %= len(known)
        words = [*known[first:], *known[:first]] * (num_tokens // len(known) + 1)

        def count(num_words: int) -> int:
            return len(self.tested.list_bare_ids(" ".join(words[:num_words])))

        num_words = bisect_right(range(1, len(words) + 1), num_tokens, key=count)
        return " ".join(words[: max(num_words, 1)])

    def require_equal(
        self, served: Tensor, inputs: Sequence[Any], *, where: str, in_sequence: bool = False
    ) -> float:
        """Raise ValueError with the cause if embeddings differ; return their distance.

        Texts and images are compared apart.
        """
        distances = []
        for is_text in (True, False):
            rows = [row for row, value in enumerate(inputs) if isinstance(value, str) == is_text]
            if not rows:
                continue
            part = [inputs[row] for row in rows]
            compared = Comparison(
                self.tested, part, served[rows], encode(self.tested, part), self.tolerance,
                in_sequence,
            )  # fmt: skip
            if (text := compared.explain()) is not None:
                raise ValueError(f"{where}: {text}")
            distances.append(float(compared.measure(compared.expected).max()))
        return max(distances)

    def send_together(self, inputs: Sequence[Any]) -> str:
        """Send many inputs in one request, or fewer to a server that refuses so many."""
        random.Random(0).shuffle(inputs := [*inputs, inputs[0]])
        refused = ""
        try:
            embeds = self.client.embed(inputs)
        except EndpointError as error:
            if error.status not in _REFUSED or len(inputs) <= _FEWER:
                raise
            refused = f"; {len(inputs)} are refused with {error.status}"
            inputs = inputs[:_FEWER]
            embeds = self.client.embed(inputs)
        where = f"{len(inputs)} in one request"
        return self.describe(inputs, self.require_equal(embeds, inputs, where=where)) + refused

    def send_at_once(self, requests: Sequence[Sequence[Any]]) -> str:
        """Send many requests at once."""
        with ThreadPoolExecutor(self.config.concurrency) as pool:
            embeds = torch.cat(list(pool.map(self.client.embed, requests)))
        inputs = [value for request in requests for value in request]
        count = counted(len(requests), "request")
        distance = self.require_equal(embeds, inputs, where=f"{count} at once")
        return f"{count}: {self.describe(inputs, distance)}"

    def describe(self, inputs: Sequence[Any], distance: float) -> str:
        count = counted(len(inputs), "embedding")
        return f"{count} at most {distance:.1e} off (allowed {self.tolerance:.2g})"

    def warn_of_rounding(self, embeds: Tensor, message: str) -> None:
        """Raise ConcernError if the values are rounded to less than the model's precision."""
        rounding = find_rounding(embeds)
        if rounding is not None and (self.dtype == torch.float32 or "float" not in rounding):
            raise ConcernError(f"{message}, but the values are rounded to {rounding}")


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


def _alone(
    list_inputs: Callable[[_Served], Sequence[Any]], *, warns: bool = False
) -> Callable[[_Served], str]:
    """Make a check that sends each of these inputs in a request of its own."""

    def check(served: _Served) -> str:
        inputs = list_inputs(served)
        embeds = torch.cat([served.client.embed([value]) for value in inputs])
        distance = served.require_equal(embeds, inputs, where="one at a time", in_sequence=True)
        if warns:
            served.warn_of_rounding(embeds, served.describe(inputs, distance))
        return served.describe(inputs, distance)

    return check


def _list_exact_texts(served: _Served) -> list[str]:
    """Texts that servers rewrite, and texts that a cache keyed by part of them mixes up."""
    words = served.write_text(max(served.tested.room - _TOKENS_OF_ENDS, 1)).split()
    places = (0, len(words) // 2, len(words))
    alike = [" ".join((*words[:n], end, *words[n:])) for n in places for end in _ENDS]
    return [*list_exact_texts(), *alike]


def _check_instructions(served: _Served) -> str:
    """Ask for each instruction by its name, as `encode_query` and `encode_document` apply it."""
    names = [name for name, text in served.tested.config.instructions.items() if text.strip()]
    if not names:
        raise NotApplicableError("the model has no instructions")
    distances, dropped = [0.0], []
    for name in names:
        field, value = "prompt_name", name
        if served.client.schema == "cohere" and name in _COHERE_TYPES:
            field, value = "input_type", _COHERE_TYPES[name]
        embeds = _embed_with(served, field, value)
        instruction = served.tested.config.instructions[name]
        expected = embed_inputs(served.tested, read_instructed(served.tested, _TEXTS, instruction))
        distance, plain, pooled = (
            _measure(embeds, embedded)
            for embedded in (
                expected,
                encode(served.tested, _TEXTS),
                encode(served.tested, [instruction + text for text in _TEXTS]),
            )
        )
        # In half precision an instruction may change embeddings by less than the tolerance.
        if plain <= served.tolerance and plain < distance / 2:
            dropped.append(f"{field}={value!r}")
        elif distance <= served.tolerance and pooled >= distance / 2:
            distances.append(distance)
        else:
            raise ValueError(
                f"{field}={value!r} gives embeddings {distance:.1e} from the model's (allowed "
                f"{served.tolerance:.2g}). An instruction is attended to, and pooled only if the "
                "model pools its prompt."
            )
    if dropped:
        raise ConcernError(
            f"the server ignores {', '.join(dropped)}: it embeds without the instruction. Encode "
            "such texts elsewhere"
        )
    return f"{', '.join(names)}: {served.describe(names * len(_TEXTS), max(distances))}"


def _measure(served: Tensor, expected: Tensor) -> float:
    if served.shape != expected.shape:
        return torch.inf
    return float(measure_distances(served, expected).max())


def _check_mixed_lengths(served: _Served) -> str:
    """Send texts from one token to the limit at once, which shows padding and truncation."""
    room = served.tested.room
    counts = sorted({1, 4, room // 8, room // 4, room // 2, room - room // 8, room})
    # Each begins with another word, so that none equals another that is truncated.
    texts = [served.write_text(count, first=number) for number, count in enumerate(counts)]
    return served.send_together([GOLDEN_TEXTS[0], *texts])


def _check_concurrent_texts(served: _Served) -> str:
    """Send many requests at once, each with other texts, which shows cross-talk."""
    chooser = random.Random(0)
    sizes = range(served.config.concurrency * _REQUESTS_PER_THREAD)
    return served.send_at_once(
        [chooser.sample(_MANY_TEXTS, chooser.randint(1, _TEXTS_PER_REQUEST)) for _ in sizes]
    )


def _check_concurrent_inputs(served: _Served) -> str:
    known = [*render_golden_images(), *render_odd_images(), *_TEXTS]
    count = served.config.concurrency * _REQUESTS_PER_THREAD
    requests = [[known[row % len(known)]] for row in range(count)]
    random.Random(0).shuffle(requests)
    return served.send_at_once(requests)


def _check_long_text(served: _Served) -> str:
    """A text beyond the limit must be truncated as by the model, or refused."""
    limit = served.tested.config.max_text_length
    long = f"{_WORDS * (limit // len(_WORDS.split()) + 2)}and an owl"
    try:
        embeds = served.client.embed([long])
    except EndpointError as error:
        if error.status is None or not 400 <= error.status < 500:
            raise
        return f"a text beyond {limit} tokens is refused with {error.status}"
    distance = served.require_equal(embeds, [long], where=f"a text beyond {limit} tokens")
    return f"truncated as the model does, {distance:.1e} from it"


def _check_empty_text(served: _Served) -> str:
    """An empty text has no embedding, and a server has to refuse it."""
    errors, statuses = [], set()
    for texts in _BLANK_REQUESTS:
        try:
            served.client.embed(texts)
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
    try:
        return served.client.embed(_TEXTS, **{name: value})
    except EndpointError as error:
        if error.status not in _REFUSED:
            raise
        raise NotApplicableError(f"{name}={value!r} is refused: {error}") from None


def _check_base64(served: _Served) -> str:
    """Check base64, which OpenAI's client asks for by default."""
    embeds = _embed_with(served, "encoding_format", "base64")
    as_numbers = served.client.embed(_TEXTS)
    # The same numbers, once in decimals; a served model may round once more between two requests.
    length = float(as_numbers.norm(dim=-1).max())
    if not _measure(embeds, as_numbers) <= served.tolerance * length:
        raise ValueError(
            "base64 and float give different embeddings; wanted base64 of little-endian float32."
        )
    message = f"{len(_TEXTS)} embeddings equal those in decimals"
    served.warn_of_rounding(embeds, message)
    return message


def _check_dimensions(served: _Served) -> str:
    """Check that fewer dimensions are the first ones, at unit length."""
    count = max(served.tested.config.projection_dim // 2, 1)
    embeds = _embed_with(served, "dimensions", count)
    if embeds.shape[1] != count:
        raise ValueError(f"dimensions={count} gives {embeds.shape[1]} dimensions.")
    expected = torch.nn.functional.normalize(encode(served.tested, _TEXTS)[:, :count], dim=-1)
    distance = _measure(embeds, expected)
    # Half of the dimensions have less than the whole length, by which rounding is divided.
    if not distance <= 4 * served.tolerance:
        lengths = embeds.norm(dim=-1)
        raise ValueError(
            f"dimensions={count} gives embeddings {distance:.1e} from the model's first {count} "
            f"at unit length; their lengths are {lengths.min():.3g} to {lengths.max():.3g}."
        )
    return f"dimensions={count}: {served.describe(_TEXTS, distance)}"


def _list_small_images() -> list[Image.Image]:
    return [*render_golden_images(), *render_odd_images(), *render_small()]


def _check_mixed_inputs(served: _Served) -> str:
    images = _list_small_images()
    return served.send_together([*images, *_MANY_TEXTS[: _MANY - 1 - len(images)]])


# Requirements of a check: on the schema and, for images, also on the folder.
_OPTION, _IMAGE, _IMAGES, _MIXED = "option", "image", "images", "mixed"
_PLANNED: tuple[PlannedCheck[_Served], ...] = (
    PlannedCheck("model", _check_model),
    PlannedCheck("connection", _check_connection),
    PlannedCheck("texts", _alone(lambda _: _TEXTS, warns=True), ("connection",)),
    PlannedCheck("exact texts", _alone(_list_exact_texts), ("texts",)),
    PlannedCheck("instructions", _check_instructions, ("texts",)),
    PlannedCheck(
        "batched texts", lambda served: served.send_together(_MANY_TEXTS[:-1]), ("texts",)
    ),
    PlannedCheck("mixed lengths", _check_mixed_lengths, ("texts",)),
    PlannedCheck("concurrent texts", _check_concurrent_texts, ("texts",)),
    PlannedCheck("long text", _check_long_text, ("texts",)),
    PlannedCheck("empty text", _check_empty_text, ("connection",)),
    PlannedCheck("base64", _check_base64, ("connection",), _OPTION),
    PlannedCheck("dimensions", _check_dimensions, ("texts",), _OPTION),
    PlannedCheck(
        "images", _alone(lambda _: render_golden_images(), warns=True), ("connection",), _IMAGE
    ),
    # Of the sizes and the detail of photographs, which servers shrink and compress.
    PlannedCheck("photographs", _alone(lambda _: render_photographs()), ("images",), _IMAGE),
    # Libraries decode them differently.
    PlannedCheck("image decoding", _alone(lambda _: render_odd_images()), ("images",), _IMAGE),
    PlannedCheck(
        "batched images",
        lambda served: served.send_together(_list_small_images()),
        ("image decoding",),
        _IMAGES,
    ),
    PlannedCheck("mixed inputs", _check_mixed_inputs, ("texts", "image decoding"), _MIXED),
    PlannedCheck(
        "concurrent inputs", _check_concurrent_inputs, ("texts", "image decoding"), _IMAGE
    ),
)


def check_server(
    source: str | Path, config: ServerCheckConfig, *, revision: str | None = None
) -> ModelReport:
    """Check that an endpoint gives the embeddings of a model, and name what differs.

    The model runs here too: it computes the correct embeddings, and those of the commonest errors,
    such as a lost prompt.

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
        raise ValueError(f"{folder} has no text tower. Give a model that encodes texts.")
    tested = ModelUnderTest(
        folder,
        str(model.device),
        config=model.config,
        model_class=type(model),
        model=model,
        tokenizer=processor.tokenizer,
        processor=processor,
    )
    return check_served(tested, config, default_name=Path(source).name)


def check_served(
    tested: ModelUnderTest, config: ServerCheckConfig, *, default_name: str
) -> ModelReport:
    """Compare an endpoint with a loaded model.

    `default_name` is used if neither the configuration nor the server names the model.
    """
    api_key = os.environ.get(config.api_key_env, "")
    client = EndpointClient(config, model_name=config.model_name or "", api_key=api_key)
    client.model_name = config.model_name or client.find_model_name() or default_name
    dtype = getattr(torch, config.served_dtype) if config.served_dtype else tested.model.dtype

    schema = config.schema

    def find_obstacle(about: str | None) -> str | None:
        if about is None or about == _OPTION:
            return "the schema cohere has no such option" if about and schema == "cohere" else None
        if schema == "openai":
            return "the schema openai has no images; give --schema chat, cohere or jina"
        if not tested.encodes_images:
            return "the folder has no vision tower"
        if about == _IMAGES and schema == "chat":
            return "the schema has one image per request"
        if about == _MIXED and schema != "jina":
            return "the schema has texts and images in separate requests"
        return None

    served = _Served(client, tested, config, dtype)
    return ModelReport(str(config.server), list(run_checks(_PLANNED, served, find_obstacle)))
