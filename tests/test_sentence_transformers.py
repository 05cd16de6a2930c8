"""Saved and pushed models give the same embeddings in sentence-transformers and AutoModel."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_server import HubServer
from sentence_transformers import SentenceTransformer
from shared_models import CAPTIONS, INSTRUCTION, ROUNDING, shared_model
from tiny import tiny_images, tiny_model
from transformers import AutoModel, AutoProcessor

import modeling_llm2clip
from modeling_llm2clip import LLM2CLIPConfig, LLM2CLIPTextModel, LLM2CLIPVisionModel
from modeling_llm2clip.base_llm2clip import read_instructions
from modeling_llm2clip.model_folders.model_writing import save_model

CLASSES: dict[str, Any] = {
    "both": AutoModel, "text": LLM2CLIPTextModel, "vision": LLM2CLIPVisionModel,
}  # fmt: skip
SETTINGS = "config_sentence_transformers.json"


def save(folder: Path, **settings: Any) -> Path:
    """Save a tiny model and its processor as any user of transformers does."""
    model, processor = tiny_model(max_text_length=64)
    for name, value in settings.items():
        setattr(model.config, name, value)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model with an instruction, which no test may change."""
    return save(tmp_path_factory.mktemp("saved"), instructions={"query": INSTRUCTION})


@pytest.mark.parametrize("part", CLASSES)
def test_a_saved_model_gives_the_same_embeddings_in_sentence_transformers(
    part: str, folder: Path, tmp_path: Path
) -> None:
    CLASSES[part].from_pretrained(folder).save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path)
    model, processor = AutoModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    encoder = SentenceTransformer(str(tmp_path))
    wanted = {}
    with torch.no_grad():
        if part != "vision":
            wanted["text"] = model(**processor(text=CAPTIONS)).text_embeds
        if part != "text":
            wanted["image"] = model(**processor(images=tiny_images(3))).image_embeds
    assert {"text", "image"} & set(encoder.modalities) == set(wanted)
    for modality, embeds in wanted.items():
        inputs = CAPTIONS if modality == "text" else tiny_images(3)
        found = encoder.encode(inputs, convert_to_tensor=True)
        # Other batches sum in another order.
        torch.testing.assert_close(found, embeds, atol=ROUNDING, rtol=0)
        # One division in float32.
        torch.testing.assert_close(found.norm(dim=1), torch.ones(3), atol=1e-6, rtol=0)


def test_instructions_of_a_sentence_transformers_user_are_never_lost(
    folder: Path, tmp_path: Path
) -> None:
    """Both the folder that it saves and one that AutoModel saves from it have them."""
    prompts = {"query": "Find a photo: ", "document": "", "label": "A label: "}
    first, second = tmp_path / "first", tmp_path / "second"
    encoder = SentenceTransformer(str(folder), prompts=prompts, similarity_fn_name="dot")
    encoder.save_pretrained(str(first))
    settings = json.loads((first / SETTINGS).read_text(encoding="utf-8"))
    assert settings["prompts"] == prompts and settings["similarity_fn_name"] == "dot"
    instructions = {"query": "Find a photo: ", "label": "A label: "}
    assert LLM2CLIPConfig.from_pretrained(first).instructions == instructions
    AutoModel.from_pretrained(first).save_pretrained(second)
    assert read_instructions(second) == instructions


def test_instructions_removed_by_a_sentence_transformers_user_stay_removed(
    folder: Path, tmp_path: Path
) -> None:
    encoder = SentenceTransformer(str(folder))
    encoder.prompts = {}
    encoder.save_pretrained(str(tmp_path))
    assert read_instructions(tmp_path) == {}
    assert LLM2CLIPConfig.from_pretrained(tmp_path).instructions == {}


def test_saving_to_an_existing_folder_writes_its_instructions_and_changes_none_in_memory(
    tmp_path: Path,
) -> None:
    save(tmp_path / "own", instructions={"query": "Find a cat: "})
    save(tmp_path / "own", instructions={"query": "Find a dog: "})
    assert read_instructions(tmp_path / "own") == {"query": "Find a dog: "}
    config = LLM2CLIPConfig.from_pretrained(tmp_path / "own")
    assert config.instructions == {"query": "Find a dog: "}
    model, processor = tiny_model(max_text_length=64)
    exported = save_model(model, processor, tmp_path / "a", instructions={"query": INSTRUCTION})
    assert read_instructions(exported) == {"query": INSTRUCTION}
    assert model.config.instructions == {}
    model.save_pretrained(exported)
    assert model.config.instructions == {}


def test_an_invalid_settings_file_is_named_before_weights_are_written(tmp_path: Path) -> None:
    (tmp_path / SETTINGS).write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{SETTINGS} is not JSON .* Restore it, or delete it"):
        shared_model()[0].save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [SETTINGS]


PUSH = """
import sys
from pathlib import Path
import modeling_llm2clip
from transformers import AutoModel, AutoProcessor

model, processor = (c.from_pretrained(sys.argv[1]) for c in (AutoModel, AutoProcessor))
model.push_to_hub("owner/pushed", private=True, commit_message="Model as it is")
processor.push_to_hub("owner/pushed")
folder, given = str(Path(sys.argv[2]) / "model"), {"push_to_hub": True, "repo_id": "owner/saved"}
model.save_pretrained(folder, private=True, **given)
processor.save_pretrained(folder, **given)  # a str, because transformers rejects a Path here
"""
READ = """
import sys
import numpy as np
sys.modules["modeling_llm2clip"] = None  # from here on, importing the package raises
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor

texts, found = sys.argv[2:], {}
for name in ("pushed", "saved"):
    given = {"pretrained_model_name_or_path": f"owner/{name}", "trust_remote_code": True}
    model, processor = (c.from_pretrained(**given) for c in (AutoModel, AutoProcessor))
    with torch.no_grad():
        found[f"{name} AutoModel"] = model(**processor(text=texts)).text_embeds.numpy()
    encoder = SentenceTransformer(f"owner/{name}", trust_remote_code=True)
    found[f"{name} SentenceTransformer"] = encoder.encode(texts)
    found[f"{name} instructed"] = encoder.encode(texts, prompt_name="query")
np.savez(sys.argv[1], **found)
"""


@pytest.mark.slow
def test_a_pushed_model_gives_the_same_embeddings_without_the_package(
    folder: Path, tmp_path: Path
) -> None:
    with HubServer() as hub:
        environment = hub.environment(tmp_path / "publisher")
        environment["PYTHONPATH"] = str(Path(modeling_llm2clip.__file__).parents[1])
        run(PUSH, environment, tmp_path, folder, tmp_path)
        assert all(hub.repositories[f"owner/{name}"].private for name in ("pushed", "saved"))
        environment = hub.environment(tmp_path / "reader")
        environment.pop("PYTHONPATH", None)
        run(READ, environment, tmp_path, tmp_path / "found.npz", *CAPTIONS)
    found = dict(np.load(tmp_path / "found.npz"))
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    with torch.no_grad():
        wanted = model(**processor(text=CAPTIONS)).text_embeds.numpy()
    instructed = SentenceTransformer(str(folder)).encode(CAPTIONS, prompt_name="query")
    for name, embeds in found.items():
        expected = instructed if name.endswith("instructed") else wanted
        # Other batches sum in another order.
        assert np.allclose(embeds, expected, atol=ROUNDING, rtol=0), name


def run(code: str, environment: dict[str, str], folder: Path, *arguments: object) -> None:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-6000:]
