"""Compares an embedding endpoint with the model folder that it is meant to serve."""

from __future__ import annotations

import os
import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..configs.server_check_config import ServerCheckConfig
from ..encoding.encode import encode_images, encode_texts
from ..encoding.float32 import float32_as_such
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
from .model_report import Check, ConcernError, ModelReport, NotApplicableError
from .model_under_test import SHORT_TEXTS, ModelUnderTest
from .served_difference import Comparison, find_rounding
from .served_inputs import EXACT_TEXTS, render_photographs
from .served_variants import TextVariants, Variant, list_image_variants

_EXIF_ORIENTATION, _ROTATED = 0x0112, 6
_REQUESTS_PER_THREAD = 4
_TEXTS_PER_REQUEST = 3
_WORDS = "a dog and two red apples lie on a wooden table beside an open window at night "
# Words of one token or a few, by which texts differ that have all else in common.
_ENDS, _TOKENS_OF_ENDS = ("cats", "dogs"), 8
_BLANK_REQUESTS: tuple[list[str], ...] = ([""], ["   "], [], [GOLDEN_TEXTS[0], ""])


@dataclass
class _Served:
    """An endpoint beside the model that it is meant to serve."""

    client: EndpointClient
    tested: ModelUnderTest
    config: ServerCheckConfig
    texts: list[str]
    tolerance: float
    unit_dimensions: int

    @cached_property
    def in_half_precision(self) -> dict[str, ModelUnderTest]:
        """The model in each half precision."""
        found = {}
        for dtype in (torch.float16, torch.bfloat16):
            model, _ = load_model(self.tested.folder, device=self.tested.device, dtype=dtype)
            found[str(dtype).removeprefix("torch.")] = ModelUnderTest(
                self.tested.folder,
                self.tested.device,
                config=model.config,
                model=model,
                processor=self.tested.processor,
            )
        return found

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens that the model puts around every text."""
        config = self.tested.config
        return len(config.prompt_prefix_ids) + len(config.prompt_suffix_ids)

    def write_text(self, num_tokens: int, *, first: int = 0) -> str:
        """Write the longest text of whole words with no more than this many tokens."""
        tokens, known = TextVariants(self.tested), _WORDS.split()
        first %= len(known)
        words = [*known[first:], *known[:first]] * (num_tokens // len(known) + 1)

        def count(num_words: int) -> int:
            return len(tokens.list_ids(" ".join(words[:num_words])))

        num_words = bisect_right(range(1, len(words) + 1), num_tokens, key=count)
        return " ".join(words[: max(num_words, 1)])

    def encode(self, inputs: Sequence[Any]) -> Tensor:
        """Encode texts or images with the model itself; (N, P) float32 of unit length."""
        return _encode(self.tested, inputs)

    def compare(
        self, served: Tensor, inputs: Sequence[Any], *, in_sequence: bool = False
    ) -> Comparison:
        """Put the endpoint's embeddings beside the model's own."""
        is_text = isinstance(inputs[0], str)

        def list_variants() -> Sequence[Variant]:
            if is_text:
                return TextVariants(self.tested).list_variants(inputs)
            return list_image_variants(self.tested, inputs)

        def encode_in_half() -> dict[str, Tensor]:
            models = self.in_half_precision.items()
            return {name: _encode(tested, inputs) for name, tested in models}

        return Comparison(
            served=served,
            wanted=self.encode(inputs),
            inputs=[_name(one, row) for row, one in enumerate(inputs)],
            tolerance=self.tolerance,
            list_variants=list_variants,
            variant_inputs=inputs,
            encode_in_half=encode_in_half,
            in_sequence=in_sequence,
        )

    def require_equal(self, served: Tensor, inputs: Sequence[Any], *, where: str) -> float:
        """Raise ValueError with the cause where embeddings differ; returns the distance."""
        compared = self.compare(served, inputs)
        if (text := compared.explain()) is not None:
            raise ValueError(f"{where}: {text}")
        return compared.measure()

    def require_equal_alone(self, inputs: Sequence[Any]) -> tuple[Tensor, float]:
        """Send each input alone, as `require_equal`; returns the embeddings too.

        Errors are looked for also in what half precision allows.
        """
        embed = self.client.embed_texts if isinstance(inputs[0], str) else self.client.embed_images
        served = torch.cat([embed([one]) for one in inputs])
        compared = self.compare(served, inputs, in_sequence=True)
        if (text := compared.explain(thorough=True)) is not None:
            raise ValueError(f"one at a time: {text}")
        return served, compared.measure()


def _encode(tested: ModelUnderTest, inputs: Sequence[Any]) -> Tensor:
    if isinstance(inputs[0], str):
        return encode_texts(tested.model, tested.processor, list(inputs))
    return encode_images(tested.model, tested.processor, list(inputs))


def _name(one: Any, row: int) -> str:
    if not isinstance(one, str):
        return f"image {row}"
    return repr(one if len(one) <= 32 else f"{one[:24]}… ({len(one)} characters)")


def _check_model(served: _Served) -> str:
    """The folder itself has to give what it recorded, or nothing can be said of a server."""
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
    texts = served.texts
    embeds, distance = served.require_equal_alone(texts)
    rounding = find_rounding(embeds)
    if rounding is not None and served.config.served_dtype in (None, "float32"):
        raise ConcernError(
            f"{len(texts)} embeddings at most {distance:.1e} from the model's, but their values "
            f"are rounded to {rounding}"
        )
    return _describe(len(texts), distance, served)


def _check_exact_texts(served: _Served) -> str:
    """Texts with what servers rewrite, and pairs that a cache by part of a text takes for one."""
    room = served.tested.config.max_text_length - served.num_prompt_tokens
    shared = served.write_text(max(room - _TOKENS_OF_ENDS, 1))
    texts = [
        *EXACT_TEXTS,
        *(f"{shared} {end}" for end in _ENDS),
        *(f"{end} {shared}" for end in _ENDS),
    ]
    return _describe(len(texts), served.require_equal_alone(texts)[1], served)


def _check_batched_texts(served: _Served) -> str:
    texts = served.texts
    distance = served.require_equal(served.client.embed_texts(texts), texts, where="in one request")
    backwards = [texts[0], *reversed(texts)]  # the first one twice
    found = served.client.embed_texts(backwards)
    distance = max(distance, served.require_equal(found, backwards, where="in reverse order"))
    return _describe(len(texts) + len(backwards), distance, served)


def _check_mixed_lengths(served: _Served) -> str:
    """Texts from one token to the limit in one request, where padding and truncation show."""
    room = served.tested.config.max_text_length - served.num_prompt_tokens
    counts = sorted({1, 4, room // 8, room // 4, room // 2, room - room // 8, room})
    # Each begins with another word, so that none equals another that is truncated.
    texts = [served.write_text(count, first=number) for number, count in enumerate(counts)]
    texts = [*texts[::2], *texts[1::2], GOLDEN_TEXTS[0]]
    found = served.client.embed_texts(texts)
    distance = served.require_equal(found, texts, where="short and long texts in one request")
    return _describe(len(texts), distance, served)


def _check_concurrent_texts(served: _Served) -> str:
    """Many requests at once, each with other texts, as cross-talk between requests shows."""
    count = served.config.concurrency * _REQUESTS_PER_THREAD
    chooser = random.Random(0)
    pool = [*served.texts, *(f"{text} {n}" for n in range(8) for text in SHORT_TEXTS)]
    requests = [chooser.sample(pool, chooser.randint(1, _TEXTS_PER_REQUEST)) for _ in range(count)]
    found = _send_at_once(served, served.client.embed_texts, requests)
    texts = [text for request in requests for text in request]
    distance = served.require_equal(found, texts, where=f"{count} requests at once")
    return f"{count} requests: {_describe(len(texts), distance, served)}"


def _send_at_once(
    served: _Served, embed: Callable[[Any], Tensor], requests: Sequence[Any]
) -> Tensor:
    with ThreadPoolExecutor(served.config.concurrency) as pool:
        return torch.cat(list(pool.map(embed, requests)))


def _check_long_text(served: _Served) -> str:
    """A text beyond the limit: truncated as the model does, or refused."""
    limit = served.tested.config.max_text_length
    long = _WORDS * (limit // len(_WORDS.split()) + 2)
    long = f"{long}and an owl"
    try:
        found = served.client.embed_texts([long])
    except EndpointError as error:
        if error.status is None or not 400 <= error.status < 500:
            raise
        return f"a text beyond {limit} tokens is refused with {error.status}"
    distance = served.require_equal(found, [long], where=f"a text beyond {limit} tokens")
    return f"truncated as the model does, {distance:.1e} from it"


def _check_empty_text(served: _Served) -> str:
    """An empty text has no embedding: a server has to say so."""
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


def _check_base64(served: _Served) -> str:
    """OpenAI's client asks for base64 by default."""
    if served.client.schema == "cohere":
        raise NotApplicableError("the schema cohere has no encoding_format")
    texts = served.texts
    try:
        found = served.client.embed_texts(texts, encoding_format="base64")
    except EndpointError as error:
        if error.status not in (400, 422):
            raise
        raise NotApplicableError(f"encoding_format='base64' is refused: {error}") from None
    wanted = served.client.embed_texts(texts)
    # The same numbers, once in decimals; a served model may round once more between two requests.
    if found.shape != wanted.shape or not float(
        measure_distances(found, wanted).max()
    ) <= served.tolerance * float(wanted.norm(dim=-1).max()):
        raise ValueError(
            "base64 and float give different embeddings; wanted base64 of little-endian float32."
        )
    return f"{len(texts)} embeddings equal those in decimals"


def _check_dimensions(served: _Served) -> str:
    """Fewer dimensions are the first ones at unit length."""
    if served.client.schema == "cohere":
        raise NotApplicableError("the schema cohere has other names for it")
    texts, count = served.texts, max(served.unit_dimensions // 2, 1)
    try:
        found = served.client.embed_texts(texts, dimensions=count)
    except EndpointError as error:
        if error.status not in (400, 422):
            raise
        raise NotApplicableError(f"dimensions={count} is refused: {error}") from None
    if found.shape[1] != count:
        raise ValueError(f"dimensions={count} gives {found.shape[1]} dimensions.")
    wanted = torch.nn.functional.normalize(served.encode(texts)[:, :count], dim=-1)
    distance = float(measure_distances(found, wanted).max())
    # Half of the dimensions have less than the whole length, by which rounding is divided.
    if not distance <= 4 * served.tolerance:
        lengths = found.norm(dim=-1)
        raise ValueError(
            f"dimensions={count} gives embeddings {distance:.1e} from the model's first {count} "
            f"at unit length; their lengths are {lengths.min():.3g} to {lengths.max():.3g}."
        )
    return f"dimensions={count}: {_describe(len(texts), distance, served)}"


def _check_images(served: _Served) -> str:
    images = render_golden_images()
    return _describe(len(images), served.require_equal_alone(images)[1], served)


def _check_photographs(served: _Served) -> str:
    """Images of the sizes and the detail of photographs, which servers shrink and compress."""
    images = render_photographs()
    return _describe(len(images), served.require_equal_alone(images)[1], served)


def _check_batched_images(served: _Served) -> str:
    if not served.client.batches_images:
        raise NotApplicableError("the schema has one image per request")
    images = [*render_golden_images(), *_render_odd_images()]
    images = [*images, images[0]]
    found = served.client.embed_images(images)
    distance = served.require_equal(found, images, where="in one request")
    return _describe(len(images), distance, served)


def _check_image_decoding(served: _Served) -> str:
    """Images that libraries decode differently: transparent, and rotated by EXIF."""
    images = _render_odd_images()
    return _describe(len(images), served.require_equal_alone(images)[1], served)


def _check_concurrent_inputs(served: _Served) -> str:
    """Texts and images at once."""
    images = [*render_golden_images(), *_render_odd_images()]
    count = served.config.concurrency * _REQUESTS_PER_THREAD
    inputs = [[*images, *served.texts][row % (len(images) + len(served.texts))]
              for row in range(count)]  # fmt: skip
    random.Random(0).shuffle(inputs)

    def embed(one: str | Image.Image) -> Tensor:
        if isinstance(one, str):
            return served.client.embed_texts([one])
        return served.client.embed_images([one])

    found = _send_at_once(served, embed, inputs)
    distance = 0.0
    for kind in (str, Image.Image):
        rows = [row for row, one in enumerate(inputs) if isinstance(one, kind)]
        distance = max(distance, served.require_equal(
            found[rows], [inputs[row] for row in rows], where=f"{count} requests at once"
        ))  # fmt: skip
    return _describe(count, distance, served)


def _render_odd_images() -> list[Image.Image]:
    """Render an image with transparency, and one that EXIF rotates."""
    ramp, disc = render_golden_images()
    transparent = ramp.convert("RGBA")
    transparent.putalpha(disc.convert("L").resize(ramp.size).point(lambda value: 255 - value))
    rotated = ramp.copy()
    rotated.getexif()[_EXIF_ORIENTATION] = _ROTATED
    return [transparent, rotated]


def _describe(count: int, distance: float, served: _Served) -> str:
    return f"{count} embeddings at most {distance:.1e} off (allowed {served.tolerance:.0e})"


@dataclass(frozen=True)
class _Planned:
    """A check, and the earlier ones without which it says nothing."""

    name: str
    run: Callable[[_Served], str]
    needs: tuple[str, ...] = ()
    of_images: bool = False


_PLANNED = (
    _Planned("model", _check_model),
    _Planned("connection", _check_connection),
    _Planned("texts", _check_texts, ("connection",)),
    _Planned("exact texts", _check_exact_texts, ("texts",)),
    _Planned("batched texts", _check_batched_texts, ("texts",)),
    _Planned("mixed lengths", _check_mixed_lengths, ("texts",)),
    _Planned("concurrent texts", _check_concurrent_texts, ("texts",)),
    _Planned("long text", _check_long_text, ("texts",)),
    _Planned("empty text", _check_empty_text, ("connection",)),
    _Planned("base64", _check_base64, ("connection",)),
    _Planned("dimensions", _check_dimensions, ("texts",)),
    _Planned("images", _check_images, ("connection",), of_images=True),
    _Planned("photographs", _check_photographs, ("images",), of_images=True),
    _Planned("image decoding", _check_image_decoding, ("images",), of_images=True),
    _Planned("batched images", _check_batched_images, ("image decoding",), of_images=True),
    _Planned("concurrent inputs", _check_concurrent_inputs, ("texts", "image decoding"),
             of_images=True),
)  # fmt: skip


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
    client = EndpointClient(
        config,
        model_name=config.model_name or Path(source).name,
        api_key=os.environ.get(config.api_key_env, ""),
    )
    if config.model_name is None:
        client.model_name = client.find_model_name() or client.model_name
    dtype = getattr(torch, config.served_dtype) if config.served_dtype else model.dtype
    served = _Served(
        client=client,
        tested=tested,
        config=config,
        texts=list(dict.fromkeys([*GOLDEN_TEXTS, *SHORT_TEXTS])),
        tolerance=find_tolerance(dtype, other_machine=True),
        unit_dimensions=model.config.projection_dim,
    )
    return ModelReport(config.server, _run_all(served))


def _run_all(served: _Served) -> list[Check]:
    checks: list[Check] = []
    unmet: dict[str, str] = {}
    for planned in _PLANNED:
        check = _run(planned, served, unmet)
        checks.append(check)
        if not check.passed:
            unmet[planned.name] = "did not run" if check.skipped else "failed"
    return checks


def _run(planned: _Planned, served: _Served, unmet: dict[str, str]) -> Check:
    def skip(reason: str) -> Check:
        return Check(planned.name, False, reason, skipped=True)

    if planned.of_images and not served.client.takes_images:
        return skip("the schema openai has no images; give --schema chat, cohere or jina")
    if planned.of_images and not served.tested.encodes_images:
        return skip("the folder has no vision tower")
    if reasons := [
        f"needs {name!r}, which {unmet[name]}" for name in planned.needs if name in unmet
    ]:
        return skip("; ".join(reasons))
    try:
        with float32_as_such():
            return Check(planned.name, True, planned.run(served))
    except NotApplicableError as reason:
        return skip(str(reason))
    except ConcernError as concern:
        return Check(planned.name, True, str(concern), concern=True)
    except ValueError as error:
        return Check(planned.name, False, str(error))
