"""JPEGs decoded in full beside those of `--jpeg-decoding scaled`: speed, pixels, embeddings.

    python -m benchmarks.speed.image_decoding --images examples/data/photographs/images

libjpeg can decode at a half, a quarter or an eighth of the size, which is faster for large
photographs and gives other pixels. `rows` measures by size of the photograph, `margins` by how much
larger than the processor's a side stays at least. Times are of the CPU. Each photograph is enlarged
to every size, gets noise as a camera's sensor makes it, and is saved as JPEG.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks.shared.provenance import describe_run, write_result
from modeling_llm2clip.building.pretrained_towers import EFFICIENTNET, fetch_tower
from modeling_llm2clip.building.vision_towers import load_vision_tower
from modeling_llm2clip.encoding.batches import find_min_jpeg_side
from modeling_llm2clip.image_loading_llm2clip import load_images

_MEGAPIXELS = (0.3, 1, 3, 6, 12)
_QUALITY = 92
_NOISE = 3.0  # standard deviation, in levels of 255
_MARGINS = (1, 2)  # beside the package's
_MARGINS_AT = 6  # megapixels, of which these margins have an eighth and a quarter decoded


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--images", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--count", type=int, default=24, help="photographs to take")
    parser.add_argument("--rounds", type=int, default=3)
    results = Path(__file__).parents[1] / "results"
    parser.add_argument("--output", type=Path, default=results / "image_decoding.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    paths = sorted(arguments.images.glob("*.jpg"))[: arguments.count]
    tower, processor, _ = load_vision_tower(fetch_tower(EFFICIENTNET))
    rounds, side = arguments.rounds, max(filter(None, dict(processor.size).values()))
    least = find_min_jpeg_side(processor, "scaled")
    assert least is not None
    rows = [_measure(size, paths, tower, processor, rounds, least) for size in _MEGAPIXELS]
    margins = [
        {"margin": margin, **_measure(_MARGINS_AT, paths, tower, processor, rounds, margin * side)}
        for margin in _MARGINS
    ]
    result = {
        "command": " ".join(["python", "-m", "benchmarks.speed.image_decoding", *sys.argv[1:]]),
        **describe_run("torch", "transformers", "pillow", threads=1),
        "num_images": len(paths),
        "tower_images_per_second": _time_tower(tower, processor, paths),
        "rows": rows,
        "margins": margins,
    }
    write_result(arguments.output, result)


def _measure(
    megapixels: float, paths: list[Path], tower: Any, processor: Any, rounds: int, least: int
) -> dict[str, Any]:
    encoded = [_enlarge(path, megapixels, seed) for seed, path in enumerate(paths)]
    ways = {"full": None, "scaled": least}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    pixels = {}
    for _ in range(rounds):
        for name, sides in ways.items():  # in turns, because a machine's speed drifts
            started = time.process_time()
            pixels[name] = torch.cat([_prepare(_open(d), processor, sides) for d in encoded])
            seconds[name].append(time.process_time() - started)
    ms = {name: 1000 * statistics.median(t) / len(paths) for name, t in seconds.items()}
    levels = (pixels["full"] - pixels["scaled"]).abs() * 255 * max(processor.image_std)
    embeds = {name: _embed(tower, value) for name, value in pixels.items()}
    cosines = (embeds["full"] * embeds["scaled"]).sum(dim=1)
    row = {
        "megapixels": megapixels,
        "bytes_per_pixel": round(sum(map(len, encoded)) / len(encoded) / megapixels / 1e6, 3),
        "min_side": least,
        "full_ms_per_image": round(ms["full"], 1),
        "scaled_ms_per_image": round(ms["scaled"], 1),
        "speedup": round(ms["full"] / ms["scaled"], 2),
        "mean_difference_of_255": round(float(levels.mean()), 3),
        "largest_difference_of_255": round(float(levels.max()), 1),
        "mean_cosine": round(float(cosines.mean()), 5),
        "min_cosine": round(float(cosines.min()), 5),
    }
    print(row, flush=True)
    return row


def _enlarge(path: Path, megapixels: float, seed: int) -> bytes:
    with Image.open(path) as image:
        scale = (megapixels * 1e6 / (image.width * image.height)) ** 0.5
        size = round(image.width * scale), round(image.height * scale)
        large = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    noise = np.random.default_rng(seed).normal(0, _NOISE, (*size[::-1], 3)).astype(np.float32)
    noisy = (np.asarray(large) + noise).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "jpeg", quality=_QUALITY)
    return file.getvalue()


def _open(data: bytes) -> Any:
    return Image.open(io.BytesIO(data))


def _prepare(image: Any, processor: Any, least: int | None = None) -> torch.Tensor:
    loaded = load_images([image], min_jpeg_side=least)
    pixels: torch.Tensor = processor(loaded, return_tensors="pt")["pixel_values"]
    return pixels


@torch.inference_mode()
def _embed(tower: Any, pixels: torch.Tensor) -> torch.Tensor:
    return F.normalize(tower(pixel_values=pixels).pooler_output.flatten(1).float(), dim=1)


def _time_tower(tower: Any, processor: Any, paths: list[Path]) -> float:
    """Images per second of the tower's pass alone, to compare decoding with."""
    pixels = torch.cat([_prepare(Image.open(path), processor) for path in paths])
    _embed(tower, pixels)
    started = time.process_time()
    for batch in pixels.split(8):
        _embed(tower, batch)
    return round(len(paths) / (time.process_time() - started), 1)


if __name__ == "__main__":
    main()
