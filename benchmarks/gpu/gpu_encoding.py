"""Sections of `gpu.py` that encode: ceilings, captions, images, one text, `extract`, the peer."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.full_width import PROMPT_PREFIX, PROMPT_SUFFIX, PROMPT_TOKENS, make_tokenizer
from benchmarks.gpu.goals import (
    EXTRACT_OF_ENCODING,
    IMAGE_FILES_OF_ENCODING,
    IMAGES,
    TEXT_MS,
    TOKENS,
)
from modeling_llm2clip.configs.encoding_config import ExtractConfig
from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.embedding.extract import extract
from modeling_llm2clip.embedding.shard_encoding import ShardEncoder, load_shard_encoder
from modeling_llm2clip.encoding.encode import encode_texts
from modeling_llm2clip.encoding.layer_compilation import compile_layers


def measure_ceilings(bench: Bench) -> None:
    """Measure what the device can do at most: products and copies."""
    size = bench.choose(128, 8192)
    for dtype, name, goal in ((torch.bfloat16, "bf16", 700), (torch.float32, "fp32", 45)):
        left, right = (torch.randn(size, size, device=bench.device, dtype=dtype) for _ in range(2))
        seconds = bench.time(lambda x=left, y=right: x @ y)
        bench.note_speed(
            f"ceilings, {name} product", 2 * size**3 / seconds / 1e12, "TFLOP/s", goal=goal
        )
    block = torch.randint(0, 255, (bench.choose(2**16, 2**30),), device=bench.device).byte()
    target = torch.empty_like(block)
    seconds = bench.time(lambda: target.copy_(block))
    bench.note_speed("ceilings, copy", 2 * block.nbytes / seconds / 1e12, "TB/s", goal=2.8)


def load_encoder(bench: Bench, modality: Any, llm: str = "1B", **options: Any) -> ShardEncoder:
    """Load a tower as `extract` does.

    Args:
        bench: The run.
        modality: text or image.
        llm: Size of the LLM.
        options: Of `ExtractConfig`; those that it lacks are left out.
    """
    known = {option.name for option in fields(ExtractConfig)}
    config = ExtractConfig(
        device=str(bench.device), show_progress=False,
        **{name: value for name, value in options.items() if name in known},
    )  # fmt: skip
    return load_shard_encoder(bench.model(llm), modality, config, bench.device)


def measure_captions(bench: Bench) -> None:
    """Measure real tokens per second of captions that are tokenized already."""
    for llm in bench.llms:
        captions = bench.captions("short", 32, 16_000 if llm == "1B" else 6000)
        encoder = load_encoder(bench, "text", llm)
        prepared = encoder.prepare(captions)
        num_tokens = int(prepared.inputs.lengths.sum())
        if bench.on_gpu:  # not of loading, nor of what was measured before
            torch.cuda.reset_peak_memory_stats()
        for name, goal in zip(("eager", "compiled"), TOKENS[llm], strict=True):
            if name == "compiled":
                _compile(encoder)
            seconds = bench.time(lambda e=encoder, p=prepared: _run(e.encode(p)))
            bench.note_speed(f"captions {llm}, {name}", num_tokens / seconds, "tokens/s", goal=goal)
        if bench.on_gpu:
            peak = torch.cuda.max_memory_allocated() / 1e9
            bench.note(f"captions {llm}, peak memory", round(peak, 1), "GB")
        del encoder


def _run(batches: Iterator[Any]) -> None:
    for _ in batches:
        pass


def _compile(encoder: ShardEncoder) -> None:
    """Compile the layers as `--compile` does; on a CPU without its compiler."""
    torch.compiler.reset()  # layers of another LLM
    torch_encoder: Any = encoder.encoder
    backend = "inductor" if torch_encoder.device.type == "cuda" else "eager"
    compile_layers(torch_encoder._find_model(torch_encoder.modalities[0]), backend=backend)


def measure_images(bench: Bench) -> None:
    """Measure images per second, whose pixels are on the device already."""
    encoder = load_encoder(bench, "image").encoder
    side = encoder.processor.image_processor.crop_size["height"]
    size = bench.choose(2, 64)
    pixels = torch.randn(size, 3, side, side, device=bench.device)
    batches = bench.choose(1, 4)

    def encode() -> None:
        for _ in range(batches):
            encoder.encode_pixels(pixel_values=pixels)

    rate = batches * size / bench.time(encode)
    bench.note_speed("images L/14-336", rate, "images/s", goal=IMAGES)


def measure_latency(bench: Bench) -> None:
    """Measure the milliseconds of one text, from its tokens to its embedding."""
    encoder = load_encoder(bench, "text").encoder
    seconds = bench.time(lambda: encoder.encode_texts(["w3 w4 w5 w6 w7 w8"]), rounds=30)
    bench.note_speed("latency of one text, 1B", 1000 * seconds, "ms", goal=TEXT_MS, lower=True)


def measure_extract(bench: Bench) -> None:
    """Measure `extract` from end to end, without its start, beside the encoding alone."""
    for llm in bench.llms:
        captions = bench.captions("short", 32, 61_000 if llm == "1B" else 13_000)
        records = [
            CaptionedImage(None, str(row), str(row), captions=(text,))
            for row, text in enumerate(captions)
        ]
        tokens = [len(text.split()) + PROMPT_TOKENS for text in captions]
        rate = _measure_growth(bench, llm, records, tokens, "text")
        alone = bench.rows.get(f"captions {llm}, eager")
        goal = EXTRACT_OF_ENCODING * (alone["value"] if alone else TOKENS[llm][0])
        bench.note_speed(f"extract captions {llm}", rate, "tokens/s", goal=round(goal))
    files = write_photographs(bench.folder / "photographs", bench.choose(8, 2000))
    records = [CaptionedImage(str(f), f.name, f.name, captions=("w3",)) for f in files]
    rate = _measure_growth(bench, "1B", records, [1] * len(files), "image")
    bench.note_speed(
        "extract images of 640 x 480",
        rate,
        "images/s",
        goal=round(IMAGE_FILES_OF_ENCODING * IMAGES),
    )


def _measure_growth(
    bench: Bench, llm: str, records: Sequence[CaptionedImage], sizes: Sequence[int], modality: Any
) -> float:
    """Return the sizes per second by which a long run exceeds a short one."""
    seconds, config = [], ExtractConfig(device=str(bench.device), show_progress=False)
    few = max(1, len(records) // 16)
    for number, count in enumerate((few, few, len(records))):  # the first one warms up
        output = bench.folder / f"extracted-{llm}-{modality}-{number}"
        started = time.perf_counter()
        extract(bench.model(llm), records[:count], output, config, modality=modality)
        seconds.append(bench.wait() - started)
    gained = seconds[2] - seconds[1]
    if gained <= 0:  # too short a run to tell them apart
        return sum(sizes) / seconds[2]
    return sum(sizes[few:]) / gained


def write_photographs(folder: Path, count: int) -> list[Path]:
    """Write smooth JPEGs of 640 x 480, which decode about as fast as photographs.

    Args:
        folder: New folder.
        count: Number of images.
    """
    folder.mkdir()
    generator = np.random.default_rng(0)
    files = [folder / f"{number}.jpg" for number in range(count)]
    for file in files:
        coarse = generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC).save(file, quality=90)
    return files


def measure_peer(bench: Bench) -> None:
    """Measure sentence-transformers on the same LLM and captions, beside `encode_texts`."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    captions = bench.captions("short", 32, 16_000)
    encoder: Any = load_encoder(bench, "text").encoder
    model = encoder._find_model("text")
    seconds = bench.time(lambda: encode_texts(model, encoder.processor, captions), rounds=3)
    attention = "flash_attention_2" if bench.on_gpu and find_spec("flash_attn") else "sdpa"
    folder = bench.folder / "llm"
    model.text_model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    options = {"dtype": model.dtype, "attn_implementation": attention}
    transformer = Transformer(str(folder), model_kwargs=options)
    pooling = Pooling(transformer.get_embedding_dimension())
    peer = SentenceTransformer(modules=[transformer, pooling], device=str(bench.device))
    prompted = [f"{PROMPT_PREFIX}{caption}{PROMPT_SUFFIX}" for caption in captions]
    size = bench.choose(8, 256)
    theirs = bench.time(
        lambda: peer.encode(prompted, batch_size=size, convert_to_tensor=True), rounds=3
    )
    bench.note("peer, attention of sentence-transformers", attention, "")
    bench.note_speed("peer, times sentence-transformers", theirs / seconds, "times", goal=1.0)
