"""Batches of texts and images, prepared ahead; each distinct input is encoded once.

N texts or images, B those of a batch, D width of an embedding.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import chain, islice
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import torch
from PIL import Image
from threadpoolctl import threadpool_limits
from torch import Tensor
from tqdm import tqdm

from .._suggestions import list_first
from ..data.images.image_sources import (
    ParquetImage,
    TarImage,
    UnreadableImagesError,
    open_image,
)
from ..processing_llm2clip import LLM2CLIPProcessor
from .float32 import float32_as_such
from .host_copies import start_copy
from .pixel_normalization import PixelNormalization
from .tokenized_texts import TokenizedText

Batch = TypeVar("Batch")
Prepared = TypeVar("Prepared")
OnBatch: TypeAlias = Callable[[Sequence[int], Tensor], object]
"""Called after each batch with the rows of its inputs and what the model gave for them, (B, D).

A row is the first of equal inputs. The embeddings are those before the projection, but unit
embeddings where a graph projects. Those of a GPU are there, and may not be computed yet.
"""

_MOST_WORKERS = 8
_MOST_BESIDE_GPU = 32  # each holds a batch of pixels
_PARTS = 8  # of a batch of images: the first one is ready in an eighth of the time
_PIXELS_AT_ONCE = 2**22
_COPIED_AT_ONCE = 2**28  # bytes of embeddings that a GPU keeps
# Size of a JPEG that is decoded smaller, in multiples of the processor's, so that resizing still
# smooths. libvips' and Pillow's thumbnails take 2; see benchmarks/speed/image_decoding.py.
_JPEG_MARGIN = 3


class PreparedImages(NamedTuple):
    """The images of a batch, ready for the model.

    Attributes:
        inputs: The processor's tensors of those that can be read, by name; none if there are none.
        places: Places of these images in the batch.
        errors: Error of each other image, by its place.
    """

    inputs: dict[str, Tensor]
    places: list[int]
    errors: dict[int, str]


@torch.no_grad()
def encode_distinct(
    inputs: Sequence[Any],
    *,
    batches: Callable[[Sequence[Any]], Iterable[Sequence[int]]],
    prepare: Callable[[list[Any]], Any],
    encode: Callable[[Any], Tensor],
    device: torch.device,
    num_workers: int | None = 1,
    on_batch: OnBatch | None = None,
    sizes: Sequence[int] | None = None,
    unit: str = "",
    show_progress: bool = False,
    finish: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Encode every distinct input once; (N, D) float32 on the CPU, in the order of the inputs.

    Equal inputs get the same embedding, bit for bit: from two batches they would differ in the
    last bit, and no longer tie. `batches` takes the rows of the distinct inputs, each at its first
    occurrence, and returns batches of places in that list. A progress bar counts inputs, or the
    sum of their `sizes`. With `finish`, embeddings of many batches are mapped by it on the device,
    and copied together.
    """
    keys = list_keys(inputs)
    first_of = {key: row for row, key in reversed(list(enumerate(keys)))}
    firsts = sorted(first_of.values())
    plan = [[firsts[place] for place in places] for places in batches(firsts)]
    place_of = {row: place for place, row in enumerate(firsts)}
    scales = sizes is not None
    sizes = sizes or [1] * len(inputs)
    embeddings: Tensor | None = None
    encoded = iterate_batches(
        inputs, plan, prepare=prepare, encode=encode, device=device, num_workers=num_workers,
        on_batch=on_batch, to_cpu=finish is None,
    )  # fmt: skip
    num_units = sum(sizes[row] for row in firsts)
    bar = tqdm(total=num_units, unit=unit, unit_scale=scales, disable=not show_progress)
    with bar as progress, closing(encoded):
        for rows, embeds in encoded if finish is None else _copy_together(encoded, finish, inputs):
            if embeddings is None:
                embeddings = torch.empty(len(firsts), embeds.shape[1], dtype=torch.float32)
            embeddings[[place_of[row] for row in rows]] = embeds
            progress.update(sum(sizes[row] for row in rows))
    assert embeddings is not None
    if len(firsts) == len(inputs):
        return embeddings
    return embeddings[[place_of[first_of[key]] for key in keys]]


@torch.no_grad()
def iterate_batches(
    inputs: Sequence[Any],
    plan: Sequence[Sequence[int]],
    *,
    prepare: Callable[[list[Any]], Any],
    encode: Callable[[Any], Tensor],
    device: torch.device,
    num_workers: int | None = 1,
    on_batch: OnBatch | None = None,
    to_cpu: bool = True,
) -> Generator[tuple[Sequence[int], Tensor]]:
    """Yield the rows of each batch of a plan, and their embeddings, (B, D) float32 on the CPU.

    `prepare` turns the inputs of a batch into what `encode` takes; it runs in threads, for None of
    `default_num_workers`. Inputs with NaN or infinity in their embeddings raise ValueError. Without
    `to_cpu`, embeddings stay where they are computed, and the caller checks them.
    """
    parts = ([inputs[row] for row in rows] for rows in plan)
    in_threads = prepare_batches(parts, prepare, device=device, num_workers=num_workers)
    with closing(in_threads) as prepared, float32_as_such():
        for rows, batch in zip(plan, prepared, strict=True):
            embeds = encode(batch).float()
            embeds = embeds.cpu() if to_cpu else embeds
            if embeds.ndim != 2 or len(embeds) != len(rows):
                raise ValueError(
                    f"The model gives embeddings of shape {tuple(embeds.shape)} for a batch of "
                    f"{len(rows)}; a row per input is expected. Take another vision tower or "
                    "encoder."
                )
            if to_cpu:
                require_finite(embeds, rows, inputs)
            if on_batch is not None:
                on_batch(rows, embeds)
            yield rows, embeds


def _copy_together(
    encoded: Iterator[tuple[Sequence[int], Tensor]],
    finish: Callable[[Tensor], Tensor],
    inputs: Sequence[Any],
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """Yield batches on the CPU, checked, of which as many as a GPU keeps are copied together."""
    waiting: list[tuple[Sequence[int], Tensor]] = []
    num_bytes = 0
    for batch in chain(encoded, [None]):
        if batch is not None:
            waiting.append(batch)
            num_bytes += batch[1].nbytes
        if waiting and (batch is None or num_bytes > _COPIED_AT_ONCE):
            embeds = start_copy(finish(torch.cat([part for _, part in waiting])))()
            parts = embeds.split([len(rows) for rows, _ in waiting])
            for (rows, _), part in zip(waiting, parts, strict=True):
                require_finite(part, rows, inputs)
                yield rows, part
            waiting, num_bytes = [], 0


def default_num_workers(*, most: int = _MOST_WORKERS) -> int:
    """Return the number of threads or processes that decode images, where none is given.

    It is one per core, at most `most`; the processes of a launch share the cores of their machine.
    """
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(most, (os.cpu_count() or 1) // num_processes))


def use_one_core() -> None:
    """Compute on one core in this thread.

    Otherwise each thread would have torch start a team of one thread per core, and with more of
    these than cores OpenMP lets them all sleep between two operations: a forward pass of a vision
    tower then takes a third longer.
    """
    torch.get_num_threads()  # sets what the next line lowers, once in a thread
    threadpool_limits(limits=1, user_api="openmp")


def prepare_batches(
    batches: Iterable[Batch],
    prepare: Callable[[Batch], Prepared],
    *,
    device: torch.device,
    num_workers: int | None,
    join: Callable[[list[tuple[int, Prepared]]], Prepared] | None = None,
) -> Generator[Prepared]:
    """Prepare batches in threads, a few of them ahead and no more: all would fill the memory.

    `num_workers` threads, for None one per core, at most 8 and beside a GPU at most 32, prepare one
    batch each, and this thread a batch that is alone. A GPU computes while they work. A CPU does
    not: forward passes and decoding would want the same cores, and a forward pass waits for the
    slowest of its own. There they take turns. Close the generator to end the threads before its
    end.

    With `join`, threads beside a GPU prepare parts of a batch, so that it does not wait for a whole
    one when a shard begins; `join` takes the parts with their first place in the batch.
    """
    remaining = iter(batches)
    first = list(islice(remaining, 2))
    if len(first) < 2:
        yield from map(prepare, first)
        return
    remaining = chain(first, remaining)
    if num_workers is None:
        most = _MOST_WORKERS if device.type == "cpu" else _MOST_BESIDE_GPU
        num_workers = default_num_workers(most=most)
    with ThreadPoolExecutor(num_workers, initializer=use_one_core) as pool:
        if device.type == "cpu":
            while together := list(islice(remaining, num_workers)):
                yield from list(pool.map(prepare, together))
        running: deque[Future[Prepared]] = deque()
        num_ahead = num_workers + 1 if join is None else num_workers // _PARTS + 2
        for batch in remaining:
            running.append(
                pool.submit(prepare, batch)
                if join is None
                else _submit_parts(pool, cast(Any, batch), prepare, join)
            )
            if len(running) > num_ahead:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def _submit_parts(
    pool: ThreadPoolExecutor,
    batch: Sequence[Any],
    prepare: Callable[[Any], Prepared],
    join: Callable[[list[tuple[int, Prepared]]], Prepared],
) -> Future[Prepared]:
    """Prepare a batch in parts; the thread that joins them waits for none that has not begun."""
    rows = split_evenly(len(batch), size=-(-len(batch) // _PARTS))
    parts = [(part.start, pool.submit(prepare, batch[part.start : part.stop])) for part in rows]
    return pool.submit(lambda: join([(start, future.result()) for start, future in parts]))


def split_evenly(count: int, *, size: int) -> list[range]:
    """Split rows into batches in their order."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def prepare_images(
    processor: LLM2CLIPProcessor,
    images: Sequence[Any],
    *,
    open_image: Callable[[Any], Any] = open_image,
    on_error: Callable[[Any, ValueError], str] | None = None,
    normalization: PixelNormalization | None = None,
) -> PreparedImages:
    """Open images and prepare them for a vision tower.

    With `normalization`, pixels are uint8, for the device to normalize.

    `open_image` returns None to leave an image out. Where one is invalid, `on_error` makes
    its message, or raises; the others are prepared without it. By default UnreadableImagesError
    names all that are invalid.
    """
    places: list[int] = []
    errors: dict[int, str] = {}

    def open_all() -> Iterator[Any]:
        for place, image in enumerate(images):
            try:
                opened = open_image(image)
            except ValueError as error:
                if on_error is None:
                    raise
                errors[place] = on_error(image, error)
            else:
                if opened is not None:
                    places.append(place)
                    yield opened

    try:
        if normalization is None:
            inputs = _prepare(processor, open_all())
        else:
            inputs = normalization.prepare(_prepare(normalization.processor, open_all()))
        return PreparedImages(inputs, places, errors)
    except ValueError as error:  # such as a size that the processor does not take
        if on_error is None:
            raise UnreadableImagesError(str(error)) from error
        if len(images) == 1:
            return PreparedImages({}, [], {0: on_error(images[0], error)})
    alone = [
        prepare_images(
            processor,
            [image],
            open_image=open_image,
            on_error=on_error,
            normalization=normalization,
        )
        for image in images
    ]
    return join_images(list(enumerate(alone)))


def find_min_jpeg_side(image_processor: Any, decoding: str) -> int | None:
    """Find how many pixels both sides of a JPEG keep while it is decoded; None for all."""
    if decoding == "full":
        return None
    resizes = getattr(image_processor, "do_resize", False)
    sides = filter(None, dict((resizes and image_processor.size) or {}).values())
    if not (largest := max(sides, default=0)):
        raise ValueError(
            f"jpeg_decoding={decoding}: the model's image processor resizes to no fixed size. "
            "Leave it out."
        )
    return int(_JPEG_MARGIN * largest)


def describe_decoding(min_jpeg_side: int | None) -> dict[str, str]:
    """Describe how JPEGs are decoded; empty where they are decoded in full."""
    return (
        {}
        if min_jpeg_side is None
        else {"jpeg decoding": f"scaled, at least {min_jpeg_side} pixels a side"}
    )


def join_images(parts: Sequence[tuple[int, PreparedImages]]) -> PreparedImages:
    """Join the parts of a batch, each with its first place in it."""
    return PreparedImages(
        _join([part.inputs for _, part in parts if part.places]),
        [start + place for start, part in parts for place in part.places],
        {start + place: error for start, part in parts for place, error in part.errors.items()},
    )


def _prepare(processor: LLM2CLIPProcessor, images: Iterable[Any]) -> dict[str, Tensor]:
    """Prepare images, which are opened when they are asked for; few large ones at a time."""
    parts: list[Mapping[str, Tensor]] = []
    waiting: list[Any] = []
    num_pixels = 0
    for image in images:
        waiting.append(image)
        num_pixels += image.width * image.height if isinstance(image, Image.Image) else 0
        if num_pixels > _PIXELS_AT_ONCE:
            parts.append(processor(images=waiting))
            waiting, num_pixels = [], 0
    if waiting:
        parts.append(processor(images=waiting))
    return _join(parts)


def _join(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate tensors by name; pinned ones stay pinned."""
    joined = {n: torch.cat([part[n] for part in parts]) for n in (parts[0] if parts else ())}
    return {n: t.pin_memory() if parts[0][n].is_pinned() else t for n, t in joined.items()}


def require_finite(
    embeds: Tensor, rows: Sequence[int], inputs: Sequence[Any] | None = None
) -> None:
    """Refuse embeddings with NaN or infinity."""
    broken = (~embeds.isfinite()).any(dim=1).nonzero().flatten().tolist()
    if not broken:
        return
    named = [
        f"number {row + 1}" + ("" if inputs is None else f" ({str(inputs[row])[:80]!r})")
        for row in (rows[place] for place in broken)
    ]
    raise ValueError(
        f"The model gives NaN or infinity for {len(broken)} of {len(rows)} inputs: "
        f"{list_first(named)}. Run it in float32 (--precision float32; evaluate: "
        "--dtype float32); if they remain, its weights are damaged: check its folder with llm2clip "
        "doctor."
    )


def list_keys(inputs: Sequence[Any]) -> list[Hashable]:
    """Return a key per input, which equal inputs share and different ones do not.

    An image in memory is equal to itself alone. Inputs of a sequence that is not a list are all
    different: it may make them anew at each access, where an `id` says nothing.
    """
    if not isinstance(inputs, list | tuple):
        return list(range(len(inputs)))
    by_value = (str, os.PathLike, TarImage, ParquetImage)
    texts = [item.text if isinstance(item, TokenizedText) else item for item in inputs]
    keys: list[Any] = [item if isinstance(item, by_value) else ("id", id(item)) for item in texts]
    return keys
