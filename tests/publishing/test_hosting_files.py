"""What an export writes for a host, run as Inference Endpoints run it."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import subprocess
import sys
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from packaging.requirements import Requirement
from PIL import Image
from sentence_transformers import SentenceTransformer
from tiny import draw_noise, tiny_model
from tiny_folders import export_tiny_model

from modeling_llm2clip.configs.export_config import ExportConfig
from modeling_llm2clip.doctor.file_checks import check_remote_code
from modeling_llm2clip.doctor.model_under_test import ModelUnderTest
from modeling_llm2clip.encoding.encode import encode_images, encode_texts
from modeling_llm2clip.model_folders.model_loading import load_model
from modeling_llm2clip.model_folders.model_writing import save_model
from modeling_llm2clip.publishing.export_model import export_model

TEXTS = ["two red apples", "a dog"]
# Both sides run one code on one machine; batches differ, and with them the order of sums.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny_model(tmp_path_factory.mktemp("hosted") / "source")


@pytest.fixture(scope="module")
def folder(source: Path) -> Path:
    """A model folder for the host."""
    return export_model(source, source.with_name("my: model"), ExportConfig(handler=True))


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load_model(folder, device="cpu")


@pytest.fixture(scope="module")
def handler(folder: Path) -> Any:
    return load_handler(folder)


def load_handler(folder: Path) -> Any:
    """Import `handler.py` by its path and make the handler, as the host does."""
    spec = importlib.util.spec_from_file_location("handler", folder / "handler.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EndpointHandler(str(folder))


def to_base64(image: Image.Image, file_format: str = "PNG") -> str:
    file = io.BytesIO()
    image.save(file, file_format)
    return base64.b64encode(file.getvalue()).decode()


def list_files(folder: Path) -> set[str]:
    """The files of a folder; one whose handler was imported also has Python's byte code."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix() for path in files if path.suffix != ".pyc"}


def test_files_for_hosts_are_written_on_request_with_pinned_requirements(
    source: Path, folder: Path
) -> None:
    assert list_files(folder) - list_files(source) == {"handler.py", "requirements.txt"}
    assert "match the installed package" in check_remote_code(ModelUnderTest(folder, "cpu"))
    lines = (folder / "requirements.txt").read_text("utf-8").splitlines()
    requirements = {requirement.name: requirement for requirement in map(Requirement, lines)}
    assert {"torch", "transformers", "pillow", "torchvision"} <= set(requirements)
    assert lines == sorted(lines)
    for name, requirement in requirements.items():
        assert str(requirement.specifier) == f"=={version(name).partition('+')[0]}"


def test_a_timm_tower_brings_its_requirement(tmp_path: Path) -> None:
    source = export_tiny_model(tmp_path / "source", vision="timm")
    written = export_model(source, tmp_path / "out", ExportConfig(handler=True))
    assert "timm==" in (written / "requirements.txt").read_text("utf-8")


def embed(handler: Any, inputs: Any, **parameters: Any) -> torch.Tensor:
    return torch.tensor(handler({"inputs": inputs, "parameters": parameters}))


def require_close(embeds: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(embeds, expected, atol=TOLERANCE, rtol=0)


def test_texts_get_the_embeddings_of_the_model(handler: Any, model: Any) -> None:
    expected = encode_texts(*model, TEXTS)
    numbers = handler({"inputs": TEXTS[0]})
    assert json.loads(json.dumps(numbers)) == numbers
    require_close(torch.tensor(numbers), expected[0])
    require_close(embed(handler, TEXTS), expected)
    shorter = F.normalize(expected[:, :8], dim=-1)  # the first dimensions at unit length
    require_close(embed(handler, TEXTS, dimensions=8), shorter)


def test_texts_and_images_keep_their_order(handler: Any, model: Any) -> None:
    images = [draw_noise(seed=seed) for seed in range(20)]  # more than a batch
    png, jpeg = (to_base64(images[0], kind) for kind in ("PNG", "JPEG"))
    inputs = [
        {"image": png}, "a dog", f"data:image/jpeg;base64,{jpeg}", {"text": "a dog"},
        *({"image": to_base64(image)} for image in images),
    ]  # fmt: skip
    decoded = Image.open(io.BytesIO(base64.b64decode(jpeg)))
    of_images = encode_images(*model, [images[0], decoded, *images])
    of_text = encode_texts(*model, ["a dog"])
    expected = torch.cat([of_images[:1], of_text, of_images[1:2], of_text, of_images[2:]])
    require_close(embed(handler, inputs), expected)
    # The host opens the body of an image request.
    require_close(embed(handler, images[0]), of_images[0])


def test_a_text_about_data_is_a_text(handler: Any, model: Any) -> None:
    url = f"data:image/png;base64,{to_base64(draw_noise())}"
    texts = ["data: the new oil, 1999", "data:text", url]
    inputs = [texts[0], {"text": texts[1]}, {"text": url}]
    require_close(embed(handler, inputs), encode_texts(*model, texts))
    with pytest.raises(ValueError, match="not base64"):
        handler({"inputs": "data:image/svg+xml,<svg/>"})


def test_labels_are_those_of_the_forward_pass(handler: Any, model: Any) -> None:
    image, names = draw_noise(), ["cat", "dog", "owl"]
    parameters = {"candidate_labels": names, "hypothesis_template": "the {} sits"}
    found = handler({"inputs": to_base64(image), "parameters": parameters})
    batch = model[1](images=[image], text=[f"the {name} sits" for name in names])
    with torch.no_grad():
        wanted = dict(
            zip(names, model[0](**batch).logits_per_image.softmax(-1)[0].tolist(), strict=True)
        )
    assert [one["label"] for one in found] == sorted(wanted, key=lambda name: -wanted[name])
    assert {one["label"]: one["score"] for one in found} == pytest.approx(wanted, abs=1e-4)
    several = handler({"inputs": [{"image": to_base64(image)}] * 2, "parameters": parameters})
    assert [[one["label"] for one in row] for row in several] == [[o["label"] for o in found]] * 2


def test_an_instruction_by_name_gives_the_embeddings_of_sentence_transformers(
    tmp_path: Path,
) -> None:
    instructions = {"query": "Find an image: ", "topic": "Name the topic: "}
    parts = tiny_model(max_text_length=128)
    source = save_model(*parts, tmp_path / "source", instructions=instructions)
    written = export_model(source, tmp_path / "model", ExportConfig(handler=True))
    handler, library = load_handler(written), SentenceTransformer(str(written), device="cpu")
    for name in ("query", "topic", "document", None):
        expected = library.encode(TEXTS, prompt_name=name, convert_to_tensor=True)
        require_close(embed(handler, TEXTS, prompt_name=name), expected)
        is_plain = torch.allclose(expected, library.encode(TEXTS, convert_to_tensor=True), atol=0.1)
        assert is_plain == (name in ("document", None))


def make_bomb() -> str:
    """A PNG whose header says that it has more pixels than memory holds."""
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "PNG")
    content = bytearray(file.getvalue())
    content[16:24] = (20_000).to_bytes(4, "big") + (20_000).to_bytes(4, "big")
    crc = zlib.crc32(bytes(content[12:29]))
    content[29:33] = crc.to_bytes(4, "big")
    return base64.b64encode(bytes(content)).decode()


IMAGE = {"image": "{png}"}
BAD = {
    "nothing": ({}, "inputs: got 'None'"),
    "blank": ({"inputs": "  "}, "send a text, or an image in base64"),
    "blank in a list": ({"inputs": ["a dog", ""]}, "send a text, or an image in base64"),
    "empty": ({"inputs": []}, "inputs: got 0; send 1 to 256"),
    "too many": ({"inputs": ["a"] * 257}, "inputs: got 257"),
    "a number": ({"inputs": 7}, "inputs: got '7'"),
    "another key": ({"inputs": {"audio": "x"}}, "got 'audio'; send an image or a text"),
    "not base64": ({"inputs": {"image": "§§"}}, "not base64: '§§'"),
    "not an image": ({"inputs": {"image": base64.b64encode(b"hello").decode()}}, "not an image"),
    "an address": ({"inputs": {"image": "http://169.254.169.254/"}}, "not fetched"),
    "a path": ({"inputs": {"image": "/etc/passwd"}}, "not an image|not base64"),
    "a bomb": ({"inputs": {"image": make_bomb()}}, "400000000 pixels|20000 x 20000 pixels"),
    "cut off": ({"inputs": {"image": to_base64(draw_noise())[:400]}}, "truncated|corrupt|broken"),
    "unknown parameter": (
        {"inputs": "a dog", "parameters": {"truncate": 1}}, "got .*truncate.*; supported are"
    ),
    "parameters of another type": ({"inputs": "a dog", "parameters": [1]}, "parameters: got"),
    "dimensions": ({"inputs": "a", "parameters": {"dimensions": 99}}, "99; send an integer from 1"),
    "no dimensions": ({"inputs": "a", "parameters": {"dimensions": 0}}, "an integer from 1 to 32"),
    "an unknown instruction": (
        {"inputs": "a", "parameters": {"prompt_name": "other"}}, "got 'other'; available:"
    ),
    "an instruction of another type": (
        {"inputs": "a", "parameters": {"prompt_name": ["query"]}}, "available:"
    ),
    "an instruction for labels": (
        {"inputs": IMAGE, "parameters": {"candidate_labels": ["a"], "prompt_name": "query"}},
        "cannot be used with",
    ),
    "no labels": ({"inputs": IMAGE, "parameters": {"candidate_labels": []}}, "1 to 1000 different"),
    "equal labels": (
        {"inputs": IMAGE, "parameters": {"candidate_labels": ["a", "a"]}}, "1 to 1000 different"
    ),
    "labels of a text": (
        {"inputs": {"text": "a"}, "parameters": {"candidate_labels": ["a"]}}, "send an image"
    ),
    "a template without a place": (
        {"inputs": IMAGE, "parameters": {"candidate_labels": ["a"], "hypothesis_template": "a"}},
        "with {} for the label",
    ),
    "a template with a format": (
        {"inputs": IMAGE, "parameters": {"candidate_labels": ["a"],
                                         "hypothesis_template": "{0.__class__} {}"}},
        "with {} for the label",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_request_that_cannot_be_answered_is_a_value_error(name: str, handler: Any) -> None:
    data, says = BAD[name]
    with pytest.raises(ValueError, match=says):
        handler(data)


def test_a_text_only_model_embeds_texts_and_refuses_images(folder: Path, tmp_path: Path) -> None:
    half = export_model(folder, tmp_path / "t", ExportConfig(components="text", handler=True))
    handler = load_handler(half)
    require_close(embed(handler, TEXTS), encode_texts(*load_model(half, device="cpu"), TEXTS))
    with pytest.raises(ValueError, match="cannot encode images"):
        handler({"inputs": {"image": to_base64(draw_noise())}})
    with pytest.raises(ValueError, match="this model has one"):
        handler({"inputs": draw_noise(), "parameters": {"candidate_labels": ["a", "b"]}})


WITHOUT_THE_PACKAGE = """
import json, sys
sys.modules["modeling_llm2clip"] = None  # importing the package raises from here on
sys.path.insert(0, sys.argv[1])
from handler import EndpointHandler
handler = EndpointHandler(path=sys.argv[1])
print(json.dumps([handler(json.loads(line)) for line in sys.stdin]))
"""


@pytest.mark.slow
def test_the_handler_needs_nothing_but_the_folder(
    folder: Path, handler: Any, tmp_path: Path
) -> None:
    png = to_base64(draw_noise())
    requests = [
        {"inputs": TEXTS},
        {"inputs": {"image": png}},
        {"inputs": png, "parameters": {"candidate_labels": ["cat", "dog"]}},
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(folder)], env=environment, cwd=tmp_path,
        input="\n".join(map(json.dumps, requests)), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    texts, image, labels = json.loads(done.stdout.splitlines()[-1])
    expected = torch.tensor([*handler(requests[0]), handler(requests[1])])
    require_close(torch.tensor([*texts, image]), expected)
    wanted = {one["label"]: one["score"] for one in handler(requests[2])}
    assert {one["label"]: one["score"] for one in labels} == pytest.approx(wanted, abs=1e-4)
