"""Computes OneIG-Bench's reasoning score: how well generated images show the expected answers.

    python examples/scripts/score_grids.py model my-grids gt_answer.json scores --grid 2,2

A file in `my-grids` is a grid of images generated for one prompt. Its name starts with the three
characters that identify the prompt in the JSON file of answers. As in OneIG-Bench
(scripts/reasoning and scripts/utils at 41b4983), a grid is split, completely black parts are
skipped, and the others are saved as JPEG and compared with the answer. The score of a grid is the
mean of its parts, and the result is the mean of all grids. If scoring is interrupted, run the same
command again to resume it.

The output folder has `parts`, `pairs.jsonl`, `pairs.csv` with a score for each part, and
`grids.csv`.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from PIL import Image

from modeling_llm2clip import load_images, score_file
from modeling_llm2clip.data.sources.json_files import read_json
from modeling_llm2clip.search.image_files import list_images

_ID_LENGTH = 3


def main() -> int:
    """Split the grids, score the parts, and average."""
    arguments = parse()
    images = list_images(arguments.grids)
    if skipped := images.describe_skipped():
        print(skipped, file=sys.stderr)
    scores_csv = arguments.output / "pairs.csv"
    if scores_csv.exists():
        raise SystemExit(f"{scores_csv} already has scores. Choose a new folder.")
    answers = read_json(arguments.answers)
    if not isinstance(answers, dict) or not all(isinstance(a, str) for a in answers.values()):
        raise ValueError(f"{arguments.answers} is not a JSON object from prompts to texts.")
    answer_of = find_answers([path.name for path in images.readable], answers)
    parts_of = {
        path.name: save_parts(path, arguments.grid, arguments.output / "parts")
        for path in images.readable
    }
    pairs = [
        {"image": f"parts/{part}", "text": answer_of[name]}
        for name, parts in parts_of.items()
        for part in parts
    ]
    lines = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    (arguments.output / "pairs.jsonl").write_text(lines, encoding="utf-8")
    if not pairs:
        raise SystemExit(f"All parts of {len(parts_of)} grids are black. Nothing can be scored.")
    scored = score_file(arguments.model, arguments.output / "pairs.jsonl", scores_csv)
    with scores_csv.open(encoding="utf-8", newline="") as file:
        score_of = {Path(row["image"]).name: float(row["score"]) for row in csv.DictReader(file)}
    scores = {n: fmean(score_of[part] for part in parts) for n, parts in parts_of.items() if parts}
    with (arguments.output / "grids.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("grid", "score"), *scores.items()])
    columns, rows = arguments.grid
    num_black = len(parts_of) * columns * rows - len(pairs)
    print(
        f"{len(scores)} of {len(parts_of)} grids have a score, from {len(pairs)} parts. "
        f"Skipped: {num_black} black parts. Truncated: answers of {scored.num_truncated} parts.",
        file=sys.stderr,
    )
    print(f"mean {fmean(scores.values()):.4f}")
    return 0


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", help="folder or Hub id of an LLM2CLIP model")
    parser.add_argument("grids", type=Path, help="folder of grids from one image generator")
    parser.add_argument("answers", type=Path, help="JSON file with the answers by prompt")
    parser.add_argument("output", type=Path, help="folder for parts and scores")
    parser.add_argument(
        "--grid", type=read_grid, default=(2, 2), help="columns,rows of a grid; default: 2,2"
    )
    return parser.parse_args()


def read_grid(text: str) -> tuple[int, int]:
    """Read `COLUMNS,ROWS`."""
    sides = [int(side) for side in text.split(",") if side.isdecimal()]
    if len(sides) != 2 or 0 in sides:
        raise argparse.ArgumentTypeError(f"{text!r} is not columns,rows, such as 2,2")
    return sides[0], sides[1]


def find_answers(names: list[str], answers: dict[str, str]) -> dict[str, str]:
    """Return the answer for each file; refuse files without one, or several for one prompt."""
    without = [name for name in names if name[:_ID_LENGTH] not in answers]
    if without:
        raise SystemExit(
            f"{len(without)} of {len(names)} file names do not start with a key of the answers, "
            f"such as {without[0]}. Name each after its prompt, like "
            f"{min(answers, default='001')}.png."
        )
    ids = [name[:_ID_LENGTH] for name in names]
    if repeated := sorted({grid_id for grid_id in ids if ids.count(grid_id) > 1}):
        raise SystemExit(
            f"Several grids have the same prompt: {', '.join(repeated)}. Keep one grid per prompt, "
            "and use a folder for each image generator."
        )
    return {name: answers[name[:_ID_LENGTH]] for name in names}


def save_parts(file: Path, grid: tuple[int, int], folder: Path) -> list[str]:
    """Save the parts of a grid that are not black, and return their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    image = load_images(file)
    if image.width < grid[0] or image.height < grid[1]:
        raise SystemExit(f"{file} has {image.width} × {image.height} pixels, too few for {grid}.")
    for number, part in enumerate(split(image, *grid)):
        if part.getbbox() is not None:
            names.append(f"{file.stem}-{number}.jpg")
            part.save(folder / names[-1])
    return names


def split(image: Image.Image, columns: int, rows: int) -> Iterator[Image.Image]:
    """Split row by row, ignoring leftover pixels at the right and bottom."""
    width, height = image.width // columns, image.height // rows
    for top in range(0, rows * height, height):
        for left in range(0, columns * width, width):
            yield image.crop((left, top, left + width, top + height))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
