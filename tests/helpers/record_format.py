"""Records a model folder of the present format, which every later version must load.

`PYTHONPATH=tests/helpers python -m record_format` writes it into `tests/recorded`, once per format
and before the next one is added.
"""

from __future__ import annotations

import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tiny import JOINED, draw_noise, tiny_model

from modeling_llm2clip.configuration_llm2clip import FORMAT_VERSION
from modeling_llm2clip.encoding.encode import encode_images, encode_texts
from modeling_llm2clip.model_folders.model_loading import load_model
from modeling_llm2clip.model_folders.model_writing import save_model

RECORDED = Path(__file__).parents[1] / "recorded"
CAPTIONS = ["a dog", "two small cats on a mat"]


def record_format(output: Path) -> None:
    """Write an archive of a tiny model folder and its embeddings."""
    model: Any
    model, processor = tiny_model(JOINED)  # format 1 had one tower: tiny_model()
    with torch.no_grad():
        for weight in model.parameters():  # of few values, which an archive holds in little space
            weight.copy_((32 * weight).round() / 32)
    with TemporaryDirectory() as place:
        folder = save_model(model, processor, Path(place) / "model")
        model, processor = load_model(folder, device="cpu")  # with its image processor, as saved
        embeds = {
            "texts": encode_texts(model, processor, CAPTIONS),
            "images": encode_images(model, processor, [draw_noise()]),
        }
        torch.save(embeds, Path(place) / "embeds.pt")
        with tarfile.open(output, "w:xz") as archive:
            archive.add(folder, "model")
            archive.add(Path(place) / "embeds.pt", "embeds.pt")


if __name__ == "__main__":
    record_format(RECORDED / f"format_{FORMAT_VERSION}.tar.xz")
