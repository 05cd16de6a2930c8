"""A published model folder loads for ever, by the installed package and by its own code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from record_format import CAPTIONS, RECORDED
from tiny import draw_noise
from transformers import AutoModel

from modeling_llm2clip.configuration_llm2clip import FORMAT_VERSION
from modeling_llm2clip.encoding.encode import encode_images, encode_texts
from modeling_llm2clip.model_folders.golden_embeddings import compare_golden
from modeling_llm2clip.model_folders.model_loading import load_model

# Prints whose code ran, and writes the embeddings; the folder is its own package without the other.
LOAD = """
import sys
folder, is_imported, image, output, *captions = sys.argv[1:]
if is_imported == "True":
    import modeling_llm2clip
else:
    sys.modules["modeling_llm2clip"] = None  # importing the package raises from here on
import torch
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    found = model(**processor(text=captions, images=[image], padding=True, return_tensors="pt"))
torch.save({"texts": found.text_embeds, "images": found.image_embeds}, output)
print(type(model).__module__)
"""


@pytest.fixture(params=range(1, FORMAT_VERSION + 1))
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    with tarfile.open(RECORDED / f"format_{request.param}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def require_recorded(place: Path, found: dict[str, torch.Tensor]) -> None:
    for name, wanted in torch.load(place / "embeds.pt").items():
        torch.testing.assert_close(found[name], wanted, atol=1e-5, rtol=0)


def test_the_package_loads_a_folder_of_every_format_with_its_embeddings(place: Path) -> None:
    model, processor = load_model(place / "model", device="cpu")
    compare_golden(place / "model", model, processor)
    found = (
        encode_texts(model, processor, CAPTIONS),
        encode_images(model, processor, [draw_noise()]),
    )
    require_recorded(place, dict(zip(("texts", "images"), found, strict=True)))
    model.save_pretrained(place / "saved")
    written, recorded = (json.loads((place / name / "config.json").read_text(encoding="utf-8"))
                         for name in ("saved", "model"))  # fmt: skip
    assert written.keys() == recorded.keys()
    assert written["format_version"] == recorded["format_version"]
    assert type(AutoModel.from_pretrained(place / "model")) is type(model)


@pytest.mark.parametrize("is_imported", [True, False])
def test_remote_code_loads_a_folder_of_every_format_with_its_embeddings(
    place: Path, is_imported: bool
) -> None:
    draw_noise().save(place / "noise.png")
    arguments = [place / "model", is_imported, place / "noise.png", place / "found.pt", *CAPTIONS]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *map(str, arguments)],
        capture_output=True, text=True, check=False,
        env={**os.environ, "HF_MODULES_CACHE": str(place / "modules")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ours = "modeling_llm2clip." if is_imported else "transformers_modules."
    assert done.stdout.startswith(ours)
    require_recorded(place, torch.load(place / "found.pt"))
