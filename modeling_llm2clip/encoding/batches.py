"""Encodes each distinct input once, in batches that threads prepare ahead of time.

N is the number of texts or images, B the batch size, D the width of an embedding.
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
from .devices import runs_ahead
from .pixel_normalization import PixelNormalization
from .precision import float32_as_such
from .tokenized_texts import TokenizedText

Batch = TypeVar("Batch")
Prepared = TypeVar("Prepared")
OnBatch: TypeAlias = Callable[[Sequence[int], Tensor], object]
"""Called after each batch with the rows of its inputs and their embeddings, (B, D).

Of equal inputs, only the first row is reported. Embeddings are from before the projection, except
that an ONNX graph returns unit embeddings. Embeddings on a GPU may not be computed yet.
"""

_MOST_WORKERS = 8
MOST_BESIDE_GPU = 32  # each holds a batch of pixels
_PARTS = 8  # per batch of images, so the first batch is ready in an eighth of the time
_PIXELS_AT_ONCE = 2**22
_COPIED_AT_ONCE = 2**28  # bytes of embeddings kept on a GPU before they are copied
# How much larger than the processor's size a JPEG stays when it is decoded at a reduced size, so
# resizing still smooths it. Thumbnails of libvips and Pillow use 2; see
# benchmarks/speed/image_decoding.py.
_JPEG_MARGIN = 3


class PreparedImages(NamedTuple):
    """The images of a batch, ready for the model.

    Attributes:
        inputs: The processor's tensors for the readable images, by name; empty if there are none.
        places: Position of each readable image in the batch.
        errors: Error message for each unreadable image, by its position in the batch.
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

    Equal inputs get bit-identical embeddings, so they tie. Encoded in different batches, equal
    inputs would differ in the last bit. `batches` takes a list with the row of each distinct
    input's first occurrence, and returns batches of positions in that list. The progress bar counts
    inputs, or sums the inputs' `sizes`. `finish` maps the embeddings of many batches on the device,
    so they can be copied together.
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
    """Yield the rows of each batch of a plan and their embeddings, (B, D) float32 on the CPU.

    `prepare` turns the inputs of a batch into arguments for `encode`. `prepare` runs in
    `num_workers` threads; None picks a default for the device. Raises ValueError if an embedding
    has NaN or infinity. Without `to_cpu`, embeddings stay on the device, and the caller must check
    them.
    """
    parts = ([inputs[row] for row in rows] for rows in plan)
    in_threads = prepare_batches(parts, prepare, device=device, num_workers=num_workers)
    with closing(in_threads) as prepared, float32_as_such():
        for rows, batch in zip(plan, prepared, strict=True):
            embeds = encode(batch).float()
            embeds = embeds.cpu() if to_cpu else embeds
            if embeds.ndim != 2 or len(embeds) != len(rows):
                raise ValueError(
                    f"The model returns embeddings of shape {tuple(embeds.shape)} for a batch of "
                    f"{len(rows)}; a row per input is expected. Use another vision tower or "
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
    """Yield checked batches on the CPU; copy up to 256 MiB of batches from a GPU together."""
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
    """Return the default number of threads or processes that decode images.

    The default is one per core, at most `most`; the processes on a machine split the cores.
    """
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(most, (os.cpu_count() or 1) // num_processes))


def use_one_core() -> None:
    """Compute on one core in this thread.

    Otherwise torch would start a team of one thread per core for every thread. If these threads
    outnumber the cores, OpenMP puts them to sleep between operations, and a forward pass of a
    vision tower takes a third longer.
    """
    torch.get_num_threads()  # sets the limit once per thread; the next line lowers it
    threadpool_limits(limits=1, user_api="openmp")


def prepare_batches(
    batches: Iterable[Batch],
    prepare: Callable[[Batch], Prepared],
    *,
    device: torch.device,
    num_workers: int | None,
    join: Callable[[list[tuple[int, Prepared]]], Prepared] | None = None,
) -> Generator[Prepared]:
    """Prepare batches in threads, only a few batches ahead of time to limit memory.

    Each of `num_workers` threads prepares one batch at a time. None means one thread per core, at
    most 8, or 32 with a GPU. A single batch is prepared in the calling thread. A GPU computes while
    the threads work. On a CPU, forward passes and decoding take turns: they would compete for the
    same cores, and a forward pass waits for its slowest core. To end the threads early, close the
    generator.

    With `join` and a GPU, threads prepare parts of a batch, so the GPU need not wait for a whole
    batch at the start of a shard. `join` takes the parts, each with the batch position of the
    part's first input.
    """
    remaining = iter(batches)
    first = list(islice(remaining, 2))
    if len(first) < 2:
        yield from map(prepare, first)
        return
    remaining = chain(first, remaining)
    if num_workers is None:
        most = _MOST_WORKERS if device.type == "cpu" else MOST_BESIDE_GPU
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
    """Prepare a batch in parts.

    The pool starts the parts before the thread that joins them, so the joining thread cannot
    deadlock waiting for a part that has not started.
    """
    rows = split_evenly(len(batch), size=-(-len(batch) // _PARTS))
    parts = [(part.start, pool.submit(prepare, batch[part.start : part.stop])) for part in rows]
    return pool.submit(lambda: join([(start, future.result()) for start, future in parts]))


def split_evenly(count: int, *, size: int) -> list[range]:
    """Split rows into batches, in order."""
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

    With `normalization`, pixels are uint8, and the device normalizes them.

    `open_image` returns None to skip an image. For an invalid image, `on_error` returns the message
    to record, and the other images are prepared without the invalid one; or `on_error` raises. By
    default, UnreadableImagesError names every invalid image.
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
    """Return the minimum side of a JPEG decoded at a reduced size; None to decode in full."""
    if decoding == "full":
        return None
    resizes = getattr(image_processor, "do_resize", False)
    sides = filter(None, dict((resizes and image_processor.size) or {}).values())
    if not (largest := max(sides, default=0)):
        raise ValueError(
            f"jpeg_decoding={decoding}: the model's image processor resizes to no fixed size. "
            "Use jpeg_decoding=full."
        )
    return int(_JPEG_MARGIN * largest)


def describe_decoding(min_jpeg_side: int | None) -> dict[str, str]:
    """Describe how JPEGs are decoded; empty if they are decoded in full."""
    return (
        {}
        if min_jpeg_side is None
        else {"jpeg decoding": f"scaled, at least {min_jpeg_side} pixels a side"}
    )


def join_images(parts: Sequence[tuple[int, PreparedImages]]) -> PreparedImages:
    """Join the parts of a batch, each given with the position of its first image in the batch."""
    return PreparedImages(
        _join([part.inputs for _, part in parts if part.places]),
        [start + place for start, part in parts for place in part.places],
        {start + place: error for start, part in parts for place, error in part.errors.items()},
    )


def _prepare(processor: LLM2CLIPProcessor, images: Iterable[Any]) -> dict[str, Tensor]:
    """Prepare images in groups of limited total size; iterating over `images` opens them."""
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
    """Concatenate tensors by name; the result is in pinned memory if the first part is."""
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
        f"The model returns NaN or infinity for {len(broken)} of {len(rows)} inputs: "
        f"{list_first(named)}. Run it in float32 (--precision float32; evaluate: "
        "--dtype float32). If that does not help, its weights are damaged: check the model folder "
        "with llm2clip doctor."
    )


def list_keys(inputs: Sequence[Any]) -> list[Hashable]:
    """Return a key per input; two inputs have the same key if and only if they are equal.

    An image in memory is equal only to itself. In a sequence other than a list or tuple, all inputs
    count as different: the sequence may create inputs on each access, so an input's `id` is
    meaningless.
    """
    if not isinstance(inputs, list | tuple):
        return list(range(len(inputs)))
    by_value = (str, os.PathLike, TarImage, ParquetImage)
    texts = [item.text if isinstance(item, TokenizedText) else item for item in inputs]
    keys: list[Any] = [item if isinstance(item, by_value) else ("id", id(item)) for item in texts]
    return keys


def start_copy(tensor: Tensor) -> Callable[[], Tensor]:
    """Start copying a tensor to the CPU; call the result, from any thread, to wait for the copy.

    A GPU runs asynchronously until the program reads a result, so the embeddings of many batches
    are copied back together.
    """
    if not runs_ahead(tensor.device):
        return tensor.cpu
    copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    copy.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event(blocking=True)
    # By default, record would use the stream of the current GPU, which may be another one.
    copied.record(torch.cuda.current_stream(tensor.device))

    def wait() -> Tensor:
        copied.synchronize()
        return copy

    return wait
