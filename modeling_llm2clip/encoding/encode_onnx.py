"""Encodes texts and images with ONNX Runtime, tokenizers, Pillow and NumPy; torch is not needed.

Every exported folder has this file as `encode.py`: `python encode.py "a dog" dog.jpg` prints the
cosine. The neighboring file that `encode.py` imports loads images the way the model saw them in
training.
"""

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime import InferenceSession, SessionOptions
from PIL import Image
from tokenizers import Tokenizer

from ..image_loading_llm2clip import load_images

FOLDER = Path(__file__).parent


def encode_texts(texts: list[str], graph: str = "text_model", folder: Path = FOLDER) -> Any:
    """Return unit embeddings, (texts, P) float32; the prompt is part of the tokenizer."""
    return encode_rows(tokenize(open_tokenizer(folder), texts), graph, folder)


def open_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer, which truncates texts to the model's maximum length."""
    config = json.loads((folder / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(config["max_text_length"])
    tokenizer.enable_padding()
    return tokenizer


def tokenize(tokenizer: Tokenizer, texts: list[str]) -> list[Any]:
    """Return the tokens of each text; truncated tokens are in `overflowing`."""
    if not texts or not all(text.strip() for text in texts):
        raise ValueError("texts must contain at least one text and no blank ones.")
    return tokenizer.encode_batch([text.strip() for text in texts])


def encode_rows(rows: list[Any], graph: str, folder: Path) -> Any:
    """Return unit embeddings of tokenized texts, (rows, P) float32."""
    ids, mask = np.array([[row.ids, row.attention_mask] for row in rows], np.int64).swapaxes(0, 1)
    return run_graph(folder, graph, {"input_ids": ids, "attention_mask": mask})


def encode_images(images: list[Any], folder: Path = FOLDER) -> Any:
    """Return unit embeddings of paths, URLs or Pillow images, (images, P) float32."""
    how = json.loads((folder / "preprocessor_config.json").read_text())
    pixels = np.stack([prepare_image(load_images(image), how) for image in images])
    return run_graph(folder, "vision_model", {"pixel_values": pixels})


def prepare_image(image: Image.Image, how: dict[str, Any]) -> Any:
    """Resize, crop and normalize an image, (3, H, W) float32."""
    width, height = (
        how["size"].get("shortest_edge") or how["size"][k] for k in ("width", "height")
    )
    if "shortest_edge" in how["size"]:
        width, height = (int(width * side / min(image.size)) for side in image.size)
    image = image.resize((width, height), how["resample"])
    if how.get("do_center_crop"):
        crop_width, crop_height = how["crop_size"]["width"], how["crop_size"]["height"]
        left, top = (width - crop_width) / 2, (height - crop_height) / 2
        rounds = round if how.get("crop_rounding") == "torchvision" else int
        left, top = rounds(left), rounds(top)
        image = image.crop((left, top, left + crop_width, top + crop_height))
    scaled = np.asarray(image, np.float32) * np.float32(how["rescale_factor"])
    normal = (scaled - np.float32(how["image_mean"])) / np.float32(how["image_std"])
    return normal.transpose(2, 0, 1)


def run_graph(folder: Path, graph: str, inputs: dict[str, Any]) -> Any:
    """Run a graph and return its only output."""
    return open_graph(folder / "onnx" / f"{graph}.onnx").run(None, inputs)[0]


@cache
def open_graph(file: Path) -> InferenceSession:
    """Open a graph; the session is cached."""
    options = SessionOptions()
    options.log_severity_level = 3  # errors only; it would warn about the optional input
    return InferenceSession(str(file), options)


if __name__ == "__main__":
    cosines = encode_texts(sys.argv[1:2]) @ encode_images(sys.argv[2:]).T
    sys.stdout.write(f"{cosines}\n")
