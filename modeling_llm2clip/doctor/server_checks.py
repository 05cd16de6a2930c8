"""Compares an embedding endpoint with the model folder that it is supposed to serve."""

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
from ..configs.serve_config import API_KEY_VARIABLE, ServerCheckConfig
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
from .served_difference import encode, require_same
from .served_inputs import list_exact_texts, render_odd_images, render_photographs, render_small

_AT_ONCE = 8  # requests
_REQUESTS_PER_THREAD = 4
_TEXTS_PER_REQUEST = 3
_WORDS = "a dog and two red apples lie on a wooden table beside an open window at night "
# Endings of one or a few tokens for otherwise equal texts.
_ENDS, _TOKENS_OF_ENDS = ("cats", "dogs"), 8
_TEXTS = list(dict.fromkeys([*GOLDEN_TEXTS, *SHORT_TEXTS]))
# Servers with a batch limit allow at least this many. With more than ten, indices sorted as strings
# end up in a different order.
_MANY = 32
_MANY_TEXTS = [*_TEXTS, *(f"{text} {n}" for n in range(_MANY) for text in SHORT_TEXTS)][:_MANY]
_BLANK_REQUESTS: tuple[list[str], ...] = ([""], ["   "], [], [GOLDEN_TEXTS[0], ""])
_REFUSED = (400, 413, 422)  # statuses
# The two most common instructions, as named in Cohere's schema.
_COHERE_TYPES = {"query": "search_query", "document": "search_document"}


@dataclass
class _Served:
    """An endpoint, and the model that it is supposed to serve."""

    client: EndpointClient
    tested: ModelUnderTest

    @property
    def tolerance(self) -> float:
        return find_tolerance(self.tested.model.dtype, other_machine=True)

    def write_text(self, num_tokens: int, *, first: int = 0) -> str:
        """Return the longest text of whole words that has at most `num_tokens` tokens."""
        known = _WORDS.split()
        first %= len(known)
        words = [*known[first:], *known[:first]] * (num_tokens // len(known) + 1)

        def count(num_words: int) -> int:
            return len(self.tested.list_bare_ids(" ".join(words[:num_words])))

        num_words = bisect_right(range(1, len(words) + 1), num_tokens, key=count)
        return " ".join(words[: max(num_words, 1)])

    def require_equal(self, served: Tensor, inputs: Sequence[Any], *, where: str) -> str:
        """Raise ValueError if embeddings of texts or images differ from the model's own."""
        worst = 0.0
        for is_text in (True, False):
            rows = [row for row, value in enumerate(inputs) if isinstance(value, str) == is_text]
            if rows:
                part = [inputs[row] for row in rows]
                try:
                    worst = max(
                        worst,
                        require_same(self.tested, part, served[rows], tolerance=self.tolerance),
                    )
                except ValueError as error:
                    raise ValueError(f"{where}: {error}") from None
        return self.describe(len(inputs), worst)

    def send_together(self, inputs: Sequence[Any], **options: Any) -> str:
        """Send many inputs in one request, one of them twice."""
        random.Random(0).shuffle(inputs := [*inputs, inputs[0]])
        embeds = self.client.embed(inputs, **options)
        return self.require_equal(embeds, inputs, where=f"{len(inputs)} in one request")

    def send_at_once(self, requests: Sequence[Sequence[Any]]) -> str:
        """Send many requests concurrently."""
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            embeds = torch.cat(list(pool.map(self.client.embed, requests)))
        inputs = [value for request in requests for value in request]
        count = counted(len(requests), "request")
        return f"{count}: {self.require_equal(embeds, inputs, where=f'{count} at once')}"

    def describe(self, num_inputs: int, distance: float) -> str:
        count = counted(num_inputs, "embedding")
        return f"{count}, off by at most {distance:.1e} (allowed {self.tolerance:.2g})"


def _check_model(served: _Served) -> str:
    """Check the folder itself first, because a broken one cannot be used to judge a server."""
    tested = served.tested
    try:
        compared = compare_golden(tested.folder, tested.model, tested.processor)
    except ValueError as error:
        raise ValueError(
            f"The folder itself fails: {error} Check it with llm2clip doctor, without --server."
        ) from error
    if compared is None:
        raise NotApplicableError(
            "the folder has no recorded embeddings; the server is compared with the loaded model"
        )
    return compared


def _check_connection(served: _Served) -> str:
    first = served.client.embed(GOLDEN_TEXTS[:1])
    return f"{served.client.url} serves {served.client.model_name!r}, width {first.shape[1]}"


def _alone(list_inputs: Callable[[_Served], Sequence[Any]]) -> Callable[[_Served], str]:
    """Create a check that sends each input in its own request."""

    def check(served: _Served) -> str:
        inputs = list_inputs(served)
        embeds = torch.cat([served.client.embed([value]) for value in inputs])
        return served.require_equal(embeds, inputs, where="one at a time")

    return check


def _list_exact_texts(served: _Served) -> list[str]:
    """List texts that servers rewrite, and texts that a cache keyed by part of a text confuses."""
    words = served.write_text(max(served.tested.room - _TOKENS_OF_ENDS, 1)).split()
    places = (0, len(words) // 2, len(words))
    alike = [" ".join((*words[:n], end, *words[n:])) for n in places for end in _ENDS]
    special = [f"the {token} token" for token in served.tested.tokenizer.all_special_tokens]
    return [*list_exact_texts(), *alike, *special]


def _check_instructions(served: _Served) -> str:
    """Request each instruction by name; compare with the model's embeddings of instructed texts."""
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
        distance = _measure(embeds, served.tested.encode_instructed(_TEXTS, instruction))
        plain = _measure(embeds, encode(served.tested, _TEXTS))
        # In half precision, an instruction may change embeddings by less than the tolerance.
        if plain <= served.tolerance and plain < distance / 2:
            dropped.append(f"{field}={value!r}")
        elif distance > served.tolerance:
            raise ValueError(
                f"{field}={value!r} returns embeddings {distance:.1e} away from the model's "
                f"(allowed {served.tolerance:.2g}). An instruction must be attended to, but pooled "
                "only if the model pools its prompt."
            )
        distances.append(distance)
    if dropped:
        raise ConcernError(
            f"the server ignores {', '.join(dropped)} and embeds without the instruction. Encode "
            "texts with these instructions elsewhere"
        )
    return f"{', '.join(names)}: {served.describe(len(names) * len(_TEXTS), max(distances))}"


def _measure(served: Tensor, expected: Tensor) -> float:
    if served.shape != expected.shape:
        return torch.inf
    return float(measure_distances(served, expected).max())


def _check_mixed_lengths(served: _Served) -> str:
    """Send texts of very different lengths together, to expose padding and truncation errors."""
    room = served.tested.room
    counts = sorted({1, 4, room // 8, room // 4, room // 2, room - room // 8, room})
    # Each starts with a different word, so none equals a truncated version of another.
    texts = [served.write_text(count, first=number) for number, count in enumerate(counts)]
    return served.send_together([GOLDEN_TEXTS[0], *texts])


def _check_concurrent_texts(served: _Served) -> str:
    """Send many requests concurrently, each with different texts, to expose cross-talk."""
    chooser = random.Random(0)
    sizes = range(_AT_ONCE * _REQUESTS_PER_THREAD)
    return served.send_at_once(
        [chooser.sample(_MANY_TEXTS, chooser.randint(1, _TEXTS_PER_REQUEST)) for _ in sizes]
    )


def _check_concurrent_inputs(served: _Served) -> str:
    known = [*render_golden_images(), *render_odd_images(), *_TEXTS]
    count = _AT_ONCE * _REQUESTS_PER_THREAD
    requests = [[known[row % len(known)]] for row in range(count)]
    random.Random(0).shuffle(requests)
    return served.send_at_once(requests)


def _check_long_text(served: _Served) -> str:
    """Require a text over the token limit to be refused, or truncated the way the model does it."""
    limit = served.tested.config.max_text_length
    long = f"{_WORDS * (limit // len(_WORDS.split()) + 2)}and an owl"
    try:
        embeds = served.client.embed([long])
    except EndpointError as error:
        if error.status is None or not 400 <= error.status < 500:
            raise
        return f"a text of more than {limit} tokens is refused with {error.status}"
    return served.require_equal(embeds, [long], where=f"a text of more than {limit} tokens")


def _check_empty_text(served: _Served) -> str:
    """Require blank texts to be refused, because they have no embedding."""
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
            errors.append(f"{texts!r} gets a response without an error")
    if errors:
        raise ValueError(f"{'; '.join(errors)}. Blank texts must be refused with 400 or 422.")
    return f"{len(_BLANK_REQUESTS)} requests refused with {', '.join(map(str, sorted(statuses)))}"


def _embed_with(served: _Served, name: str, value: Any) -> Tensor:
    """Embed the texts with an option that the server may refuse."""
    try:
        return served.client.embed(_TEXTS, **{name: value})
    except EndpointError as error:
        raise _explain_refusal(error, f"{name}={value!r}") from None


def _explain_refusal(error: EndpointError, option: str) -> Exception:
    if error.status not in _REFUSED:
        return error
    return NotApplicableError(f"{option} is refused: {error}")


def _check_base64(served: _Served) -> str:
    """Check embeddings sent as base64, which OpenAI's client requests by default."""
    try:
        return served.send_together(_MANY_TEXTS[:-1], encoding_format="base64")
    except EndpointError as error:
        raise _explain_refusal(error, "encoding_format='base64'") from None


def _check_dimensions(served: _Served) -> str:
    """Check that `dimensions` keeps the first dimensions of each embedding and renormalizes it."""
    full, distances = served.tested.config.projection_dim, []
    for count in sorted({max(count, 1) for count in (full // 4, full // 2, full - 1)}):
        embeds = _embed_with(served, "dimensions", count)
        if embeds.shape[1] != count:
            raise ValueError(f"dimensions={count} returns {embeds.shape[1]} dimensions.")
        expected = torch.nn.functional.normalize(encode(served.tested, _TEXTS)[:, :count], dim=-1)
        distances.append(_measure(embeds, expected))
        # Renormalizing divides by a length below 1, which amplifies rounding errors.
        if not distances[-1] <= 4 * served.tolerance:
            lengths = embeds.norm(dim=-1)
            raise ValueError(
                f"dimensions={count} returns embeddings {distances[-1]:.1e} away from the model's "
                f"first {count}, renormalized; their lengths are {lengths.min():.3g} to "
                f"{lengths.max():.3g}."
            )
    return served.describe(len(_TEXTS) * len(distances), max(distances))


def _list_small_images() -> list[Image.Image]:
    return [*render_golden_images(), *render_odd_images(), *render_small()]


def _check_mixed_inputs(served: _Served) -> str:
    images = _list_small_images()
    return served.send_together([*images, *_MANY_TEXTS[: _MANY - 1 - len(images)]])


# What a check requires of the schema and, for images, also of the folder.
_OPTION, _IMAGE, _IMAGES, _MIXED = "option", "image", "images", "mixed"
_PLANNED: tuple[PlannedCheck[_Served], ...] = (
    PlannedCheck("model", _check_model),
    PlannedCheck("connection", _check_connection),
    PlannedCheck("texts", _alone(lambda _: _TEXTS), ("connection",)),
    PlannedCheck("exact texts", _alone(_list_exact_texts), ("texts",)),
    PlannedCheck("instructions", _check_instructions, ("texts",)),
    PlannedCheck(
        "batched texts", lambda served: served.send_together(_MANY_TEXTS[:-1]), ("texts",)
    ),
    PlannedCheck("mixed lengths", _check_mixed_lengths, ("texts",)),
    PlannedCheck("concurrent texts", _check_concurrent_texts, ("texts",)),
    PlannedCheck("long text", _check_long_text, ("texts",)),
    PlannedCheck("empty text", _check_empty_text, ("connection",)),
    PlannedCheck("base64", _check_base64, ("batched texts",), _OPTION),
    PlannedCheck("dimensions", _check_dimensions, ("texts",), _OPTION),
    PlannedCheck("images", _alone(lambda _: render_golden_images()), ("connection",), _IMAGE),
    # Images with the sizes and detail of photographs, which servers shrink and compress.
    PlannedCheck("photographs", _alone(lambda _: render_photographs()), ("images",), _IMAGE),
    # Images that libraries decode differently.
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
    """Check that an endpoint returns a model's embeddings, and name the inputs that differ.

    The model also runs locally, in the dtype of its folder, which determines the tolerance.

    Args:
        source: Folder or Hub id of the served LLM2CLIP model, which must have a text tower.
        config: The endpoint and how to query it.
        revision: Branch, tag or commit of the Hub repository.

    Returns:
        All checks, in order; a check that cannot run is marked as skipped, with the reason.

    Raises:
        ValueError: The model or device does not exist, `config.server` is missing, or the model has
            no text tower.

    Examples:
        >>> config = ServerCheckConfig(server="http://127.0.0.1:8000", schema="jina")
        >>> check_server("my-model", config).healthy  # doctest: +SKIP
        True
    """
    if config.server is None:
        raise ValueError("server must be the address of an endpoint, not None.")
    folder = find_model_folder(source, revision=revision)
    model, processor = load_model(folder, device=config.device)
    if not hasattr(model, "text_model"):
        raise ValueError(f"{folder} has no text tower. Choose a model that encodes texts.")
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
    api_key = os.environ.get(API_KEY_VARIABLE, "")
    client = EndpointClient(config, model_name=config.model_name or "", api_key=api_key)
    client.model_name = config.model_name or client.find_model_name() or default_name
    schema = config.schema

    def find_obstacle(about: str | None) -> str | None:
        if about is None or about == _OPTION:
            return "the cohere schema has no such option" if about and schema == "cohere" else None
        if schema == "openai":
            return "the openai schema has no images; use --schema chat, cohere or jina"
        if not tested.encodes_images:
            return "the folder has no vision tower"
        if about == _IMAGES and schema == "chat":
            return "the schema takes one image per request"
        if about == _MIXED and schema != "jina":
            return "the schema takes texts and images in separate requests"
        return None

    served = _Served(client, tested)
    return ModelReport(str(config.server), list(run_checks(_PLANNED, served, find_obstacle)))
