"""The image of the README: sentences, and the photographs that a model finds for them.

    python -m benchmarks.tables.readme_image aligned/model examples/data/photographs MORE \
        --trained-on "1,000 photographs of Flickr8k, four captions each"

The model was trained by the README's recipe. Each folder has photographs that it was not
trained on, and a `captions.jsonl` whose lines name `image`, `license` and `source`. All of them are
searched; the sentences were chosen among those that work. Writes `docs/search.png` and
`benchmarks/results/readme_image.json`, which has the licenses of the photographs that are shown.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from benchmarks.shared.provenance import describe_run
from modeling_llm2clip import encode_images, encode_texts, load_model
from modeling_llm2clip.image_loading_llm2clip import load_images
from modeling_llm2clip.search.search_results import SearchResult, rank_images
from modeling_llm2clip.training.run_folder import read_results

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "benchmarks" / "results" / "readme_image.json"
SHEET = ROOT / "docs" / "search.png"
SENTENCES = (
    "a person in a uniform",
    "a sleepy animal in a tree",
    "lights at night",
    "a very large lizard with sharp teeth",
    "a white bear in the snow",
    "a tower against the sky",
)
SHOWN = 2  # photographs per sentence
# Pixels. GitHub shows the file at two thirds of its size. Opaque, for light and dark pages alike.
COLUMNS, WIDTH, HEIGHT, GAP, MARGIN, TEXT, CAPTION = 3, 228, 171, 8, 36, 44, 26
COLORS = 256
BACKGROUND, BORDER, INK, MUTED = "#ffffff", "#d0d7de", "#1f2328", "#57606a"


def read_photographs(folders: Sequence[Path]) -> dict[Path, dict[str, str]]:
    """Return license and source of each photograph.

    Args:
        folders: Folders with a `captions.jsonl`.
    """
    sources = {}
    for folder in folders:
        for line in (folder / "captions.jsonl").read_text("utf-8").splitlines():
            record = json.loads(line)
            sources[folder / record["image"]] = {key: record[key] for key in ("license", "source")}
    return sources


def search(model_folder: Path, paths: list[Path]) -> list[SearchResult]:
    """Search all photographs for each sentence.

    Args:
        model_folder: The model.
        paths: The photographs.
    """
    model, processor = load_model(model_folder, device="cpu")
    image_embeds = encode_images(model, processor, [str(path) for path in paths])
    cosines = encode_texts(model, processor, SENTENCES) @ image_embeds.T
    return rank_images(SENTENCES, cosines, paths, top_k=SHOWN)


def draw(results: Sequence[SearchResult]) -> Image.Image:
    """Draw a block per sentence: the sentence, and below it the first photographs found.

    Args:
        results: The photographs found for each query.
    """
    block = (SHOWN * WIDTH + (SHOWN - 1) * GAP, TEXT + HEIGHT + CAPTION)
    rows = -(-len(results) // COLUMNS)
    size = [n * side + (n + 1) * MARGIN for n, side in zip((COLUMNS, rows), block, strict=True)]
    image = Image.new("RGB", (size[0], size[1]), BACKGROUND)
    canvas = ImageDraw.Draw(image)
    canvas.rounded_rectangle((0, 0, size[0] - 1, size[1] - 1), 16, outline=BORDER, width=2)
    for number, result in enumerate(results):
        row, column = divmod(number, COLUMNS)
        left, top = (
            MARGIN + n * (side + MARGIN) for n, side in zip((column, row), block, strict=True)
        )
        draw_block(image, result, left, top)
    return image.quantize(COLORS, dither=Image.Dither.FLOYDSTEINBERG)


def draw_block(image: Image.Image, result: SearchResult, left: int, top: int) -> None:
    """Draw one sentence and its photographs.

    Args:
        image: Canvas to draw on.
        result: The photographs found for one query.
        left: Left edge.
        top: Top edge.
    """
    canvas = ImageDraw.Draw(image)
    canvas.text((left, top), result.query, INK, ImageFont.load_default(27))
    corners = Image.new("L", (WIDTH, HEIGHT))
    ImageDraw.Draw(corners).rounded_rectangle((0, 0, WIDTH - 1, HEIGHT - 1), 10, fill=255)
    for rank, (path, cosine) in enumerate(result.hits):
        # Heads are in the upper half of a portrait.
        photograph = ImageOps.fit(load_images(str(path)), (WIDTH, HEIGHT), centering=(0.5, 0.3))
        at = (left + rank * (WIDTH + GAP), top + TEXT)
        image.paste(photograph, at, corners)
        place = (at[0], at[1] + HEIGHT + 5)
        canvas.text(place, f"{rank + 1}.   {cosine:.2f}", MUTED, ImageFont.load_default(18))


def main() -> None:
    """Search, draw, and record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("model", type=Path, help="model folder of a run of llm2clip align")
    parser.add_argument("folders", type=Path, nargs="+", help="photographs to search")
    parser.add_argument("--trained-on", required=True, help="the data of the run, for the record")
    arguments = parser.parse_args()
    photographs = read_photographs(arguments.folders)
    results = search(arguments.model, list(photographs))
    draw(results).save(SHEET, optimize=True)
    record: dict[str, Any] = {
        **describe_run("torch", "transformers", "sentence-transformers"),
        "trained_on": arguments.trained_on,
        "held_out": read_results(arguments.model.parent)["held_out"]["best"],
        "num_photographs": len(photographs),
        "results": [
            {
                "query": result.query,
                "hits": [
                    {"image": path.stem, "cosine": round(cosine, 3), **photographs[path]}
                    for path, cosine in result.hits
                ],
            }
            for result in results
        ],
    }
    RECORD.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"Wrote {SHEET}, {SHEET.stat().st_size / 1000:.0f} kB.")


if __name__ == "__main__":
    main()
