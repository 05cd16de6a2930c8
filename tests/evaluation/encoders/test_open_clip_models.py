"""Models of open_clip: their own embeddings, and what a weights file does not say."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from shared_models import ROUNDING
from tiny_encoders import LONG_TEXT, TEXTS, encode, unit

from modeling_llm2clip.configs.evaluation_config import EncoderConfig
from modeling_llm2clip.evaluation.encoders.auto import load_encoder
from modeling_llm2clip.image_loading_llm2clip import load_images


def test_open_clip_embeddings_are_its_own(models: Any, images: list[Path]) -> None:
    import open_clip

    name = f"local-dir:{models('open_clip')}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    pixels = torch.stack([transform(image) for image in load_images(list(images))])
    model.eval()
    with torch.no_grad():
        ids = open_clip.get_tokenizer(name)([*TEXTS, LONG_TEXT])
        wanted = model.encode_text(ids), model.encode_image(pixels)
    encoder = load_encoder(models("open_clip"), EncoderConfig(batch_size=4))
    found = encoder.encode_texts([*TEXTS, LONG_TEXT]).embeds, encode(encoder, images)[1]
    for ours, own in zip(found, wanted, strict=True):
        torch.testing.assert_close(unit(ours), unit(own), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_a_model_is_run_with_the_activation_that_its_description_has(
    activation: str, tmp_path: Path
) -> None:
    import open_clip
    from open_clip.model import CLIP
    from safetensors.torch import save_file

    sizes = {"width": 32, "layers": 2}
    config = {
        "embed_dim": 16, "quick_gelu": activation == "quick_gelu",
        "vision_cfg": {**sizes, "image_size": 32, "patch_size": 8, "head_width": 8},
        "text_cfg": {**sizes, "context_length": 77, "vocab_size": 49408, "heads": 4},
    }  # fmt: skip
    torch.manual_seed(0)
    model = CLIP(**config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    written = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(written), encoding="utf-8")
    encoder = load_encoder(tmp_path)
    described = encoder.description
    assert described.text and described.text["activation"] == activation
    assert described.images and described.images["activation"] == activation
    embeds = unit(encoder.encode_texts(TEXTS).embeds)
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(list(TEXTS))
    with torch.no_grad():
        torch.testing.assert_close(embeds, unit(model.encode_text(tokens)), rtol=0, atol=ROUNDING)
        # The same weights with the other activation are another model.
        other = CLIP(**{**config, "quick_gelu": activation == "gelu"}).eval()
        other.load_state_dict(model.state_dict())
        assert (embeds - unit(other.encode_text(tokens))).abs().max() > 100 * ROUNDING


@pytest.mark.slow
def test_an_open_clip_repository_of_bin_weights_alone_is_fetched_with_them(
    models: Any, tmp_path: Path
) -> None:
    from hub_server import HubFile, HubServer
    from safetensors.torch import load_file

    folder = models("open_clip")
    torch.save(load_file(folder / "open_clip_model.safetensors"), tmp_path / "weights.bin")
    files = {
        "open_clip_config.json": (folder / "open_clip_config.json").read_bytes(),
        "open_clip_pytorch_model.bin": (tmp_path / "weights.bin").read_bytes(),
        "pytorch_model.bin": b"of another library",
    }
    code = (
        "from modeling_llm2clip.evaluation.encoders.auto import load_encoder\n"
        "encoder = load_encoder('owner/model')\n"
        "embeds = encoder.encode_texts(['a dog']).embeds\n"
        "print(encoder.description.model_type, tuple(embeds.shape))\n"
    )
    with HubServer() as hub:
        repository = hub.create_repository("owner/model")
        repository.add_commit("main", "add", {name: HubFile(f) for name, f in files.items()})
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=200,
            cwd=Path(__file__).parents[3], env=hub.environment(tmp_path / "cache"),
        )  # fmt: skip
        asked = [request for request in hub.requests if request.endswith("/pytorch_model.bin")]
    assert done.stdout.strip() == "open_clip (1, 16)", done.stderr[-2000:]
    assert asked == []


def test_neither_weights_alone_nor_a_config_alone_is_a_model(models: Any, tmp_path: Path) -> None:
    folder = models("open_clip")
    with pytest.raises(ValueError, match=r"is a file, .*open_clip_config\.json.*`save_for_hf`"):
        load_encoder(folder / "open_clip_model.safetensors")
    shutil.copy(folder / "open_clip_config.json", tmp_path)
    with pytest.raises(ValueError, match=r"no weights .*open_clip_model\.safetensors.*random"):
        load_encoder(tmp_path)
