"""Encodes texts and images with ONNX Runtime, tokenizers, Pillow and NumPy; torch is not needed.

It is `encode.py` of every exported folder: `python encode.py "a dog" dog.jpg` prints the cosine.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime import InferenceSession, SessionOptions
from PIL import Image, ImageOps
from tokenizers import Tokenizer

FOLDER = Path(__file__).parent


def encode_texts(texts: list[str], graph: str = "text_model.onnx", folder: Path = FOLDER) -> Any:
    """Return unit embeddings, (texts, P) float32."""
    if not texts or not all(text.strip() for text in texts):
        raise ValueError("Give at least one text, and no blank one.")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))  # the prompt is part of it
    tokenizer.enable_truncation(json.loads((folder / "config.json").read_text())["max_text_length"])
    tokenizer.enable_padding()
    rows = tokenizer.encode_batch([text.strip() for text in texts])
    inputs = {name: [getattr(row, key) for row in rows] for name, key in
              (("input_ids", "ids"), ("attention_mask", "attention_mask"))}  # fmt: skip
    return run_graph(folder / "onnx" / graph, {k: np.array(v, np.int64) for k, v in inputs.items()})


def encode_images(images: list[Any], folder: Path = FOLDER) -> Any:
    """Return unit embeddings of paths or files, (images, P) float32."""
    how = json.loads((folder / "preprocessor_config.json").read_text())
    pixels = np.stack([prepare_image(image, how) for image in images])
    return run_graph(folder / "onnx" / "vision_model.onnx", {"pixel_values": pixels})


def run_graph(graph: Path, inputs: dict[str, Any]) -> Any:
    """Return the only output of a graph."""
    options = SessionOptions()
    options.log_severity_level = 3  # errors; an input with a default would be warned of
    return InferenceSession(str(graph), options).run(None, inputs)[0]


def prepare_image(source: Any, how: dict[str, Any]) -> Any:
    """Return the pixels of an upright image on white, resized as `how` says, (3, H, W) float32."""
    image = ImageOps.exif_transpose(Image.open(source)).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    size, short = how["size"], min(image.size)
    edge = size.get("shortest_edge")
    wanted = (
        [int(edge * side / short) for side in image.size]
        if edge
        else (size["width"], size["height"])
    )
    image = image.resize(wanted, how["resample"])
    if how.get("do_center_crop"):
        width, height = how["crop_size"]["width"], how["crop_size"]["height"]
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    scaled = np.asarray(image, np.float32) * np.float32(how["rescale_factor"])
    normal = (scaled - np.float32(how["image_mean"])) / np.float32(how["image_std"])
    return normal.transpose(2, 0, 1)


if __name__ == "__main__":
    print(encode_texts(sys.argv[1:2]) @ encode_images(sys.argv[2:]).T)  # noqa: T201
