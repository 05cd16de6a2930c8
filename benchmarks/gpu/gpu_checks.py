"""Sections of `gpu.py` that compare: with a CPU, between precisions, and what stops a step."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.goals import RANKS_SECONDS
from benchmarks.gpu.gpu_encoding import load_encoder
from benchmarks.gpu.gpu_training import run_align
from modeling_llm2clip.encoding.encode import encode_texts
from modeling_llm2clip.encoding.precision import float32_as_such
from modeling_llm2clip.evaluation.metrics.correspondence import Correspondence
from modeling_llm2clip.evaluation.metrics.ranking import RetrievalRanks, rank_retrieval
from modeling_llm2clip.modeling_llm2clip import LLM2CLIPTextModel, LLM2CLIPVisionModel
from modeling_llm2clip.processing_llm2clip import LLM2CLIPProcessor

_CPU = torch.device("cpu")
# Of unit embeddings: the order of sums differs between kernels, and no product is TF32.
_MOST_DISTANCE = 1e-4
# The guard of bfloat16, and what packing may differ in it.
_LEAST_COSINE, _LEAST_PACKED_COSINE = 0.999, 0.9995


def compare(bench: Bench) -> None:
    """Compare embeddings: of the device and a CPU, of bfloat16 and float32, alone and together."""
    folder = bench.model("1B", layers=bench.choose(2, 8))
    processor = LLM2CLIPProcessor.from_pretrained(folder)
    captions = bench.captions("mixed", 16, 64)
    texts = LLM2CLIPTextModel.from_pretrained(folder, dtype=torch.float32).eval()
    images = LLM2CLIPVisionModel.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    side = processor.image_processor.crop_size["height"]
    pixels = torch.randn(4, 3, side, side, generator=generator)
    on_cpu = encode_texts(texts, processor, captions)
    images_on_cpu = _encode_pixels(images, pixels)
    texts.to(bench.device)
    images.to(bench.device)
    there = encode_texts(texts, processor, captions)
    for name, one, other in (
        ("texts", there, on_cpu),
        ("images", _encode_pixels(images, pixels), images_on_cpu),
    ):
        distance = float((one - other).norm(dim=1).max())
        bench.note_parity(
            f"parity, {name} in float32 beside a CPU", distance, _MOST_DISTANCE, at_least=False
        )
    alone = torch.cat([encode_texts(texts, processor, [text]) for text in captions[:16]])
    distance = float((alone - there[:16]).norm(dim=1).max())
    bench.note_parity(
        "parity, one text beside many in float32", distance, _MOST_DISTANCE, at_least=False
    )
    for model in (texts.text_model, images.vision_model):
        model.to(torch.bfloat16)
    halved = encode_texts(texts, processor, captions)
    for name, one, other, least in (
        ("texts in bfloat16 beside float32", halved, on_cpu, _LEAST_COSINE),
        ("images in bfloat16 beside float32", _encode_pixels(images, pixels), images_on_cpu,
         _LEAST_COSINE),
        ("one text beside many in bfloat16", halved[:16],
         torch.cat([encode_texts(texts, processor, [text]) for text in captions[:16]]),
         _LEAST_PACKED_COSINE),
    ):  # fmt: skip
        cosine = float(F.cosine_similarity(one, other).min())
        bench.note_parity(f"parity, {name}", cosine, least, at_least=True)


@torch.no_grad()
def _encode_pixels(model: LLM2CLIPVisionModel, pixels: Tensor) -> Tensor:
    dtype = model.vision_model.dtype
    with float32_as_such():  # else cuDNN convolves in TF32
        embeds = model.get_vision_embeds(pixels.to(model.device, dtype))
        return model.to_image_embeds(embeds).cpu()


def measure_ranks(bench: Bench) -> None:
    """Measure exact ranks on the device; those of a part must be a CPU's."""
    images, texts = _draw_pairs(bench.choose(100, 30_000), bench.choose(64, 1280))
    part = _take(images, texts, bench.choose(60, 1000))
    for all_positives, goal in RANKS_SECONDS.items():
        name = "ranks of all positives" if all_positives else "ranks of the best positives"
        pairs = _pair(*part)
        ranks = [
            rank_retrieval(*(side.to(device) for side in part), pairs, all_positives=all_positives)
            for device in (_CPU, bench.device)
        ]
        bench.note_parity(f"{name}, different ones", _count_different(*ranks), 0, at_least=False)
        there = images.to(bench.device), texts.to(bench.device), _pair(images, texts)
        seconds = bench.time(
            lambda t=there, a=all_positives: rank_retrieval(*t, all_positives=a), rounds=5
        )
        label = f"{name}, {len(images):,} x {len(texts):,}"
        bench.note_speed(label, seconds, "s", goal=goal, lower=True)


def _draw_pairs(count: int, width: int, *, texts: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(count, width, generator=generator), dim=1)
    noise = torch.randn(count * texts, width, generator=generator)
    return images, F.normalize(images.repeat_interleave(texts, dim=0) + noise / 16, dim=1)


def _take(images: Tensor, texts: Tensor, count: int) -> tuple[Tensor, Tensor]:
    return images[:count], texts[: count * (len(texts) // len(images))]


def _pair(images: Tensor, texts: Tensor) -> Correspondence:
    owners = torch.arange(len(images)).repeat_interleave(len(texts) // len(images))
    return Correspondence.from_image_of_text(owners, len(images))


def _count_different(one: RetrievalRanks, other: RetrievalRanks) -> int:
    different = 0
    for left, right in ((one.i2t, other.i2t), (one.t2i, other.t2i)):
        different += int((left.best_ranks.cpu() != right.best_ranks.cpu()).sum())
        if left.positive_ranks is not None and right.positive_ranks is not None:
            different += int((left.positive_ranks.cpu() != right.positive_ranks.cpu()).sum())
    return different


def count_syncs(bench: Bench) -> None:
    """Count what makes the host wait in steps of `align` and in batches of captions.

    On a GPU torch warns of it, but not of a copy from memory that is not pinned.
    """
    for name, batch in (("512", 512), ("4096", 4096)):
        counter = _SyncsOfSteps(bench, skipped=bench.choose(2, 20))
        run_align(bench, "1B", bench.choose(batch // 64, batch), bench.choose(6, 60), counter)
        bench.note(f"syncs, align of {name}, a step", round(counter.per_step, 3), "times")
    encoder = load_encoder(bench, "text")
    prepared = encoder.prepare(bench.captions("short", 32, 4000))
    for _ in encoder.encode(prepared):
        pass
    with _counted(bench) as count:
        for _ in encoder.encode(prepared):
            pass
    share = count[0] / len(prepared.batches)
    bench.note("syncs, captions, a batch", round(share, 3), "times")


@contextmanager
def _counted(bench: Bench) -> Iterator[list[int]]:
    """Count warnings of torch, or on a CPU what a GPU would wait for, when the context ends."""
    count: list[int] = []
    if not bench.on_gpu:
        with _Reads() as reads:
            yield count
        count.append(reads.count)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield count
        finally:
            torch.cuda.set_sync_debug_mode("default")
    count.append(sum("synchroniz" in str(warning.message) for warning in caught))


class _Reads(TorchDispatchMode):
    """Counts the operators whose result or shape Python sees, of the host's own tensors too."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += func._schema.name in ("aten::_local_scalar_dense", "aten::nonzero")
        return func(*args, **(kwargs or {}))


class _SyncsOfSteps(TrainerCallback):  # type: ignore[misc]
    """Counts from one step to the last one."""

    def __init__(self, bench: Bench, *, skipped: int) -> None:
        self._bench, self._skipped = bench, skipped
        self._context: Any = None
        self._count: list[int] = []
        self.per_step = float("nan")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Begin, or end."""
        if state.global_step == self._skipped:
            self._context = _counted(self._bench)
            self._count = self._context.__enter__()
        elif state.global_step == state.max_steps - 1:  # the last one is saved
            self._context.__exit__(None, None, None)
            self.per_step = self._count[0] / (state.max_steps - 1 - self._skipped)
