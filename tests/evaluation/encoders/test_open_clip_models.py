"""Models of open_clip: their own embeddings, and what a weights file does not say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from shared_models import ROUNDING
from tiny_encoders import LONG_TEXT, TEXTS, encode, unit

from modeling_llm2clip.configs.evaluation_config import EncoderConfig, EvaluatedModel
from modeling_llm2clip.evaluation.encoders.auto import load_encoder
from modeling_llm2clip.evaluation.encoders.open_clip_models import (
    _find_activation,
    _find_preprocessing,
    _refuse_torchscript,
)
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


def test_clips_own_tokenizer_reads_each_text_once(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from open_clip import SimpleTokenizer

    read: list[str] = []
    tokenize = SimpleTokenizer.encode

    def note(self: Any, text: str) -> Any:
        read.append(text)
        return tokenize(self, text)

    monkeypatch.setattr(SimpleTokenizer, "encode", note)
    load_encoder(models("open_clip")).encode_texts([*TEXTS, TEXTS[0]])
    assert sorted(read) == sorted(TEXTS)


def test_an_open_clip_weights_file_needs_the_name_of_its_architecture(
    models: Any, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip

    folder = models("open_clip")
    weights = folder / "open_clip_model.safetensors"
    with pytest.raises(ValueError, match=r"architecture is None.*'EVA02-B-16'"):
        load_encoder(weights)
    with pytest.raises(ValueError, match=r"is a folder.*leave architecture='EVA02-B-16' out"):
        load_encoder(EvaluatedModel(source=str(folder), architecture="EVA02-B-16"))
    written = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
    (tmp_path / "tiny-eva.json").write_text(json.dumps(written["model_cfg"]), encoding="utf-8")
    open_clip.add_model_config(tmp_path / "tiny-eva.json")
    tiny = EvaluatedModel(source=str(weights), architecture="tiny-eva")
    with pytest.raises(ValueError, match=r"0 published models of tiny-eva do not say it either"):
        load_encoder(tiny)
    published = {"tiny-eva": {"tag": written["preprocess_cfg"]}}
    monkeypatch.setattr(open_clip.pretrained, "_PRETRAINED", published)
    found = encode(load_encoder(tiny), images)
    for own, wanted in zip(found, encode(load_encoder(folder), images), strict=True):
        torch.testing.assert_close(own, wanted)


def test_images_of_a_weights_file_are_prepared_as_all_of_its_architecture_agree() -> None:
    siglip = _find_preprocessing("ViT-B-16-SigLIP", source="w.safetensors")
    assert siglip["mean"] == siglip["std"] == (0.5, 0.5, 0.5) and siglip["resize_mode"] == "squash"
    assert _find_preprocessing("EVA02-B-16", source="w.pt")["resize_mode"] == "shortest"
    # Of ViT-L-14 some are published with CLIP's mean, others with that of Inception.
    with pytest.raises(
        ValueError, match=r"models of ViT-L-14 do not agree.*open_clip_config\.json"
    ):
        _find_preprocessing("ViT-L-14", source="w.safetensors")


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("RN50", r"RN50 means gelu.*all have quick_gelu.*openai.*Name RN50-quickgelu"),
        ("ViT-L-14-336", r"all have quick_gelu.*Name ViT-L-14-336-quickgelu"),
        ("ViT-B-32", r"have either \(gelu: laion2b.*; quick_gelu: openai.*--activation gelu"),
    ],
)
def test_a_plain_name_whose_published_models_have_quick_gelu_needs_the_activation(
    architecture: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _find_activation(architecture, given=None, source="w.pt")
    for given in ("gelu", "quick_gelu"):
        assert _find_activation(architecture, given=given, source="w.pt") == given


def test_names_that_say_their_activation_need_nothing_else() -> None:
    assert _find_activation("RN50-quickgelu", given=None, source="w.pt") == "quick_gelu"
    assert _find_activation("roberta-ViT-B-32", given=None, source="w.pt") == "quick_gelu"
    assert _find_activation("EVA02-B-16", given=None, source="w.pt") == "gelu"
    with pytest.raises(ValueError, match=r"has quick_gelu, and activation is 'gelu'.*: RN50\."):
        _find_activation("RN50-quickgelu", given="gelu", source="w.pt")
    with pytest.raises(ValueError, match=r"activation='relu': Input should be 'gelu'"):
        _find_activation("RN50", given="relu", source="w.pt")


def test_a_weights_file_is_run_with_the_activation_that_its_description_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip
    from open_clip.model import CLIP
    from safetensors.torch import save_file

    config = {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 8,
        },
        "text_cfg": {
            "context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2,
        },
    }  # fmt: skip
    (tmp_path / "tiny-clip.json").write_text(json.dumps(config), encoding="utf-8")
    open_clip.add_model_config(tmp_path / "tiny-clip.json")
    published = {"tiny-clip": {"one": {"mean": (0.5,) * 3, "std": (0.5,) * 3}}}
    monkeypatch.setattr(open_clip.pretrained, "_PRETRAINED", published)
    torch.manual_seed(0)
    model = CLIP(**config, quick_gelu=True)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    model.eval()
    found = {}
    activations: tuple[Any, ...] = (None, "quick_gelu")
    weights = str(tmp_path / "w.safetensors")
    for activation in activations:
        encoder = load_encoder(
            EvaluatedModel(source=weights, architecture="tiny-clip", activation=activation)
        )
        described = encoder.description
        assert described.text and described.text["activation"] == (activation or "gelu")
        assert described.images and described.images["activation"] == (activation or "gelu")
        found[activation] = unit(encoder.encode_texts(TEXTS).embeds)
    with torch.no_grad():
        own = unit(model.encode_text(open_clip.get_tokenizer("tiny-clip")(list(TEXTS))))
    torch.testing.assert_close(found["quick_gelu"], own, rtol=0, atol=ROUNDING)
    # The same weights with the other activation are another model.
    assert (found[None] - own).abs().max() > 100 * ROUNDING


def test_a_torchscript_archive_is_refused_before_its_code_could_run(tmp_path: Path) -> None:
    scripted = torch.jit.script(torch.nn.Linear(2, 2))
    archive = str(tmp_path / "archive.pt")
    scripted.save(archive)
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "weights.pt")
    _refuse_torchscript(tmp_path / "weights.pt", source="weights.pt")
    with pytest.raises(ValueError, match=r"archive\.pt is a TorchScript archive.*never run"):
        load_encoder(EvaluatedModel(source=archive, architecture="RN50-quickgelu"))


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


def test_open_clip_without_weights_is_not_random(models: Any, tmp_path: Path) -> None:
    config = (models("open_clip") / "open_clip_config.json").read_text(encoding="utf-8")
    (tmp_path / "open_clip_config.json").write_text(config, encoding="utf-8")
    with pytest.raises(ValueError, match=r"none of .*open_clip_model\.safetensors.*random"):
        load_encoder(tmp_path)
