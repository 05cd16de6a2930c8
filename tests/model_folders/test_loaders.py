"""One exported folder reaches every loader: Auto classes, pipelines, sentence-transformers, Hub.

The first part loads in clean processes: with the package and without `trust_remote_code`, and the
other way about. Starting a process costs seconds, so four do everything and the tests read what
they found. The second part holds what sentence-transformers makes of the folder.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentence_transformers
import torch
from hub_server import HubServer
from PIL import Image
from sentence_transformers import SentenceTransformer
from shared_models import CAPTIONS, INSTRUCTION, ROUNDING
from tiny import draw_noise, tiny_images, tiny_model
from transformers import AutoModel, AutoProcessor, pipeline

import modeling_llm2clip
from modeling_llm2clip.doctor.file_checks import check_remote_code
from modeling_llm2clip.doctor.model_under_test import ModelUnderTest
from modeling_llm2clip.image_cropping_llm2clip import LLM2CLIPImageProcessor
from modeling_llm2clip.image_loading_llm2clip import load_images
from modeling_llm2clip.model_folders.model_card import CardData
from modeling_llm2clip.model_folders.model_loading import load_model
from modeling_llm2clip.model_folders.model_writing import save_model

PROMPTS = {"query": INSTRUCTION, "document": ""}
REPOSITORY, RESAVED = "owner/model", "owner/resaved"

# What every process runs: `see(source, …)` records the embeddings of every loader under a name.
SEE = """
import sys
from pathlib import Path
import numpy as np
here, way = Path(sys.argv[1]), sys.argv[2]
if way == "package":
    import modeling_llm2clip
else:
    sys.modules["modeling_llm2clip"] = None  # importing the package raises from here on
import sentence_transformers
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import (
    AutoConfig, AutoImageProcessor, AutoModel, AutoModelForTextEncoding,
    AutoModelForZeroShotImageClassification, AutoProcessor, AutoTokenizer, pipeline,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

TEXTS, LABELS = ["a dog", "two red apples on a wooden table by the window"], ["a dog", "a cat"]
PATHS = [str(path) for path in sorted(here.glob("*.png"))]
IMAGES = [Image.open(path) for path in PATHS]
found = {}

def find_class(name, source, given):
    if way == "package":
        return getattr(modeling_llm2clip, name)
    return get_class_from_dynamic_module(
        f"modeling_llm2clip.{name}", source, revision=given.get("revision")
    )

def see(name, source, **given):
    given |= {} if way == "package" else {"trust_remote_code": True}
    keep = lambda key, value: found.__setitem__(f"{name}/{key}", np.asarray(value))
    with torch.inference_mode():
        see_classes(keep, source, given)
        see_pipelines(keep, source, given)
    see_sentence_transformers(keep, source, given)

def see_classes(keep, source, given):
    assert AutoConfig.from_pretrained(source, **given).model_type == "llm2clip"
    processor = AutoProcessor.from_pretrained(source, **given)
    inputs = processor(text=TEXTS, images=IMAGES)
    texts = AutoTokenizer.from_pretrained(source, **given)(TEXTS, padding=True, return_tensors="pt")
    images = AutoImageProcessor.from_pretrained(source, **given)(IMAGES, return_tensors="pt")
    assert torch.equal(texts["input_ids"], inputs["input_ids"])
    assert torch.equal(images["pixel_values"], inputs["pixel_values"])
    model = AutoModel.from_pretrained(source, **given)
    assert type(model).__module__.startswith("transformers_modules.") == (way == "remote")
    output = model(**inputs)
    keep("AutoModel text", output.text_embeds)
    keep("AutoModel image", output.image_embeds)
    zero_shot = AutoModelForZeroShotImageClassification.from_pretrained(source, **given)
    keep("zero-shot logits", zero_shot(**inputs).logits_per_image)
    encoder = AutoModelForTextEncoding.from_pretrained(source, **given)
    assert type(encoder).__name__ == "LLM2CLIPTextModel" and not hasattr(encoder, "vision_model")
    keep("AutoModelForTextEncoding text", encoder(**texts).pooler_output)
    text_model = find_class("LLM2CLIPTextModel", source, given).from_pretrained(source, **given)
    keep("LLM2CLIPTextModel text", text_model(**texts).pooler_output)
    vision_model = find_class("LLM2CLIPVisionModel", source, given).from_pretrained(source, **given)
    assert not hasattr(vision_model, "text_model")
    keep("LLM2CLIPVisionModel image", vision_model(**images).pooler_output)

def see_pipelines(keep, source, given):
    classify = pipeline("zero-shot-image-classification", model=source, **given)
    answers = classify(IMAGES, candidate_labels=LABELS, hypothesis_template="{}")
    keep("pipeline scores", [[{a["label"]: a["score"] for a in answer}[label] for label in LABELS]
                             for answer in answers])
    extract = pipeline("image-feature-extraction", model=source, **given)
    keep("pipeline image", [extract(path)[0] for path in PATHS])
    pooled = pipeline("image-feature-extraction", model=source, pool=True, **given)
    keep("pipeline pooled image", [pooled(path)[0] for path in PATHS])

def see_sentence_transformers(keep, source, given):
    model = SentenceTransformer(source, **given)
    keep("SentenceTransformer text", model.encode(TEXTS))
    keep("SentenceTransformer image", model.encode(IMAGES))
    keep("SentenceTransformer path image", model.encode(PATHS))
    if int(sentence_transformers.__version__.split(".")[0]) >= 6:  # 5.4 refuses this form
        keep("SentenceTransformer dict image", model.encode([{"image": p} for p in IMAGES]))
    keep("SentenceTransformer prompted text", model.encode(TEXTS, prompt_name="query"))
"""
PUBLISH = f"""
from modeling_llm2clip.publishing.push_to_hub import push_to_hub
folder, other = sys.argv[3:5]
see("package, folder", folder)
see("package, other folder", other)
old = push_to_hub(other, "{REPOSITORY}").rsplit("/", 1)[-1]
push_to_hub(folder, "{REPOSITORY}")
see("package, hub", "{REPOSITORY}")
see("package, hub pinned", "{REPOSITORY}", revision=old)
SentenceTransformer(folder).push_to_hub("{RESAVED}", private=True)
found["old"] = np.asarray(old)
assert not any(name.startswith("transformers_modules.") for name in sys.modules)
np.savez(here / "package.npz", **found)
"""
DOWNLOAD = f"""
see("remote, hub", "{REPOSITORY}")
see("remote, hub pinned", "{REPOSITORY}", revision=sys.argv[3])
see("remote, hub resaved", "{RESAVED}")
np.savez(here / "remote.npz", **found)
"""
OFFLINE = f"""
see("remote, offline", "{REPOSITORY}")
see("remote, offline pinned", "{REPOSITORY}", revision=sys.argv[3])
np.savez(here / "offline.npz", **found)
"""
ALONE = """
see("remote, folder", sys.argv[3])
np.savez(here / "alone.npz", **found)
"""
WAYS = (
    "package, hub", "remote, folder", "remote, hub", "remote, hub resaved", "remote, offline",
)  # fmt: skip
IMAGES = [tiny_images(1)[0], draw_noise(32, 35)]
PINNED_WAYS = ("package, hub pinned", "remote, hub pinned", "remote, offline pinned")


def run_clean(code: str, environment: dict[str, str], folder: Path, *arguments: object) -> None:
    """Run code in a process that finds the package only where `environment` says so."""
    command = [sys.executable, "-c", SEE + code, str(folder), *map(str, arguments)]
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported folder; not to be changed. It crops as transformers' own classes do not."""
    model, processor = tiny_model(max_text_length=64)  # room for a caption behind the instruction
    processor.image_processor = LLM2CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    place = tmp_path_factory.mktemp("faces") / "model"
    card = CardData(license="mit")
    return save_model(model, processor, place, instructions=PROMPTS, card=card)


@pytest.fixture(scope="module")
def seen(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, dict[str, Any]]]:
    """What each way of loading gave: way → loader → embeddings."""
    here = tmp_path_factory.mktemp("clean")
    for number, image in enumerate(IMAGES):
        image.save(here / f"{number}.png")
    stated: Any = {"instructions": PROMPTS, "card": CardData(license="mit")}
    other = save_model(*tiny_model(seed=1, max_text_length=64), here / "other", **stated)
    with HubServer() as hub:
        environment = hub.environment(here / "publisher")
        environment["PYTHONPATH"] = str(Path(modeling_llm2clip.__file__).parents[1])
        run_clean(PUBLISH, environment, here, "package", folder, other)
        found = dict(np.load(here / "package.npz"))
        old = str(found.pop("old"))
        environment = hub.environment(here / "reader")
        environment.pop("PYTHONPATH", None)
        run_clean(DOWNLOAD, environment, here, "remote", old)
        asked_before = len(hub.requests)
        run_clean(OFFLINE, environment | {"HF_HUB_OFFLINE": "1"}, here, "remote", old)
        # With a cache of its own: code that was copied for another source would stand in for what
        # the folder's own code does not bring.
        environment = hub.environment(here / "stranger", offline=True)
        environment.pop("PYTHONPATH", None)
        run_clean(ALONE, environment, here, "remote", folder)
        assert len(hub.requests) == asked_before
    for way in ("remote", "offline", "alone"):
        found |= dict(np.load(here / f"{way}.npz"))
    by_way: dict[str, dict[str, Any]] = {}
    for name, embeddings in found.items():
        way, loader = name.split("/")
        by_way.setdefault(way, {})[loader] = embeddings
    yield by_way


# Every loader


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_loading_matches_the_package(way: str, seen: dict[str, Any]) -> None:
    wanted = seen["package, folder"]
    assert seen[way].keys() == wanted.keys()
    differing = [key for key in wanted if not np.array_equal(seen[way][key], wanted[key])]
    assert differing == []


@pytest.mark.slow
@pytest.mark.parametrize("way", PINNED_WAYS)
def test_a_pinned_revision_has_that_revisions_embeddings(way: str, seen: dict[str, Any]) -> None:
    wanted, newest = seen["package, other folder"], seen["package, folder"]
    assert [key for key in wanted if not np.array_equal(seen[way][key], wanted[key])] == []
    assert all(not np.allclose(newest[key], wanted[key], atol=1e-3) for key in wanted)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "image"])
def test_every_loader_computes_the_same_embeddings(kind: str, seen: dict[str, Any]) -> None:
    embeddings = seen["package, folder"]
    wanted = embeddings[f"AutoModel {kind}"]
    takes_dictionaries = int(sentence_transformers.__version__.split(".")[0]) >= 6
    loaders = [k for k in embeddings if k.endswith(f" {kind}") and "prompted" not in k]
    assert len(loaders) == {"text": 4, "image": 6 + takes_dictionaries}[kind]
    for loader in loaders:
        # Other batches add up in another order.
        assert np.allclose(embeddings[loader].reshape(wanted.shape), wanted, atol=ROUNDING), loader


@pytest.mark.slow
def test_the_pipeline_returns_the_softmax_of_the_logits(folder: Path, seen: dict[str, Any]) -> None:
    model, processor = load_model(folder)
    with torch.no_grad():
        inputs = processor(text=["a dog", "a cat"], images=IMAGES)
        wanted = model(**inputs).logits_per_image.softmax(dim=1).numpy()
    # Logits are up to 100 times a cosine, and so is their rounding.
    assert np.allclose(seen["package, folder"]["pipeline scores"], wanted, atol=100 * ROUNDING)


# sentence-transformers


@pytest.fixture(scope="module")
def sentence_model(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder))


@pytest.fixture(scope="module")
def auto_embeddings(folder: Path) -> dict[str, torch.Tensor]:
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    with torch.no_grad():
        output = model(**processor(text=CAPTIONS, images=tiny_images(3)))
    return {"text": output.text_embeds, "image": output.image_embeds}


def test_a_folder_saved_by_sentence_transformers_loads_everywhere(
    sentence_model: SentenceTransformer, auto_embeddings: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    sentence_model.save_pretrained(str(tmp_path))
    again = SentenceTransformer(str(tmp_path))
    assert again.prompts["query"] == INSTRUCTION
    assert torch.equal(again.encode(CAPTIONS, convert_to_tensor=True), auto_embeddings["text"])
    model, processor = AutoModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    with torch.no_grad():
        output = model(**processor(text=CAPTIONS, images=tiny_images(3)))
    assert torch.equal(output.text_embeds, auto_embeddings["text"])
    assert torch.equal(output.image_embeds, auto_embeddings["image"])
    assert "match the installed package" in check_remote_code(ModelUnderTest(tmp_path, "cpu"))


def test_a_shorter_max_seq_length_is_obeyed_but_a_longer_one_is_not(folder: Path) -> None:
    model, processor = SentenceTransformer(str(folder)), AutoProcessor.from_pretrained(folder)
    text = "a dog on a mat " * 300
    longest = processor.max_text_length
    for length, wanted in ((12, 12), (longest + 100, longest)):
        model.max_seq_length = length
        ids = model.preprocess([text])["input_ids"]
        assert ids.shape == (1, wanted)
        assert ids.tolist() == processor(text=[text], max_length=wanted)["input_ids"].tolist()
        assert model.encode([text]).shape == (1, 32)  # the prompt is whole, which the model checks


# Which images every way of opening turns into the same embedding, and which a pipeline does not. A
# palette with a transparent color is left out: transformers changed its mind about it.
ALIKE, ODD = ("RGB", "gray", "palette", "CMYK", "rotated", "animated"), ("RGBA", "LA", "16 bit")


def save_kinds(folder: Path) -> dict[str, Path]:
    """Write one image of each kind, unlike in its corners."""
    folder.mkdir()
    rows, columns = np.mgrid[0:48, 0:40]
    colors = np.stack([rows * 5, columns * 6, rows + columns], axis=-1).astype(np.uint8)
    image = Image.fromarray(colors)
    clear = image.copy()
    clear.putalpha(Image.fromarray((columns * 6).astype(np.uint8)))
    palette = image.quantize(16)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    images: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "RGB": (image, "png", {}),
        "gray": (image.convert("L"), "png", {}),
        "palette": (palette, "png", {}),
        "CMYK": (image.convert("CMYK"), "tiff", {}),
        "rotated": (image, "png", {"exif": exif}),
        "animated": (palette, "gif", {"save_all": True, "append_images": [palette.rotate(90)]}),
        "RGBA": (clear, "png", {}),
        "LA": (clear.convert("LA"), "png", {}),
        "16 bit": (Image.fromarray((rows * 1300).astype(np.uint16)), "png", {}),
    }
    paths = {kind: folder / f"{kind}.{suffix}" for kind, (_, suffix, _) in images.items()}
    for kind, (content, _, settings) in images.items():
        content.save(paths[kind], **settings)
    return paths


def test_a_pipeline_matches_the_processor_except_for_odd_images(
    folder: Path, sentence_model: SentenceTransformer, tmp_path: Path
) -> None:
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    pipe = pipeline("image-feature-extraction", model=str(folder), pool=True)
    paths = save_kinds(tmp_path / "images")
    assert set(paths) == {*ALIKE, *ODD}
    for kind, path in paths.items():
        with torch.no_grad():
            wanted = model(**processor(images=str(path))).pooler_output
        by_path, opened = (
            torch.tensor(pipe(image)).reshape(1, -1)
            for image in (str(path), load_images(str(path)))
        )
        # The same numbers in the same kernels; another image is much further away.
        assert (float((by_path - wanted).norm()) > 0.01) == (kind in ODD), kind
        torch.testing.assert_close(opened, wanted, atol=ROUNDING, rtol=0)
        encoded = torch.from_numpy(sentence_model.encode([str(path)]))
        torch.testing.assert_close(encoded, wanted, atol=ROUNDING, rtol=0)


def test_sentence_transformers_treats_a_missing_path_as_a_caption(
    sentence_model: SentenceTransformer, folder: Path
) -> None:
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    with torch.no_grad():
        wanted = model(**processor(text=["typo/cat.jpg"])).text_embeds
    found = sentence_model.encode(["typo/cat.jpg"], convert_to_tensor=True)
    torch.testing.assert_close(found, wanted, atol=ROUNDING, rtol=0)
