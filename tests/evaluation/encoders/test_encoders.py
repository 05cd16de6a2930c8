"""Every model type behind one interface, with the embeddings that its own code computes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from shared_models import ROUNDING
from tiny_encoders import LONG_TEXT, MODEL_TYPES, TEXTS, encode, unit
from tokenizers import normalizers
from transformers import AutoModel, AutoProcessor

from modeling_llm2clip.configs.evaluation_config import EncoderConfig
from modeling_llm2clip.data.images.image_sources import UnreadableImagesError
from modeling_llm2clip.evaluation.encoders.auto import detect_model_type, load_encoder
from modeling_llm2clip.evaluation.metrics.correspondence import Correspondence
from modeling_llm2clip.evaluation.metrics.ranking import rank_retrieval
from modeling_llm2clip.image_loading_llm2clip import load_images

DUAL_TYPES = tuple(
    model_type for model_type in MODEL_TYPES if model_type != "sentence-transformers"
)

every_type = pytest.mark.parametrize("model_type", MODEL_TYPES)
every_dual_type = pytest.mark.parametrize("model_type", DUAL_TYPES)


def test_types_are_detected_from_files(models: Any) -> None:
    found = {model_type: detect_model_type(models(model_type)) for model_type in MODEL_TYPES}
    transformers = dict.fromkeys(("clip", "siglip", "siglip2"), "transformers")
    assert found == {model_type: model_type for model_type in MODEL_TYPES} | transformers


def test_a_folder_of_no_known_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json.*--model-type .*open_clip"):
        detect_model_type(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"model_type 'llama'"):
        load_encoder(tmp_path)
    with pytest.raises(ValueError, match=r"no such folder, and not a Hub id"):
        load_encoder(tmp_path / "nothing" / "here")


def rank(encoder: Any, images: list[Path]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank texts and images, or texts and other texts for an encoder of texts alone."""
    own = Correspondence.from_image_of_text(range(len(TEXTS)), len(TEXTS))
    if encoder.description.images is None:
        embeds = encoder.encode_texts([*TEXTS, *(f"again {text}" for text in TEXTS)]).embeds
        texts, others = embeds.chunk(2)
    else:
        texts, others = encode(encoder, images)
    found = rank_retrieval(others, texts, own)
    return found.i2t.best_ranks, found.t2i.best_ranks


@every_type
def test_neither_batch_size_nor_order_changes_an_embedding(
    model_type: str, models: Any, images: list[Path]
) -> None:
    first, other = (
        load_encoder(models(model_type), EncoderConfig(batch_size=number)) for number in (1, 3)
    )
    embeds = first.encode_texts(TEXTS).embeds
    assert embeds.dtype == torch.float32 and embeds.device.type == "cpu"
    backwards = other.encode_texts([*TEXTS[::-1], TEXTS[-1]]).embeds
    assert torch.equal(backwards[0], backwards[-1])
    torch.testing.assert_close(backwards[:-1].flip(0), embeds, rtol=0, atol=ROUNDING)
    ranks, other_ranks = rank(first, images), rank(other, images)
    assert all(torch.equal(a, b) for a, b in zip(ranks, other_ranks, strict=True))
    assert torch.cat(ranks).unique().numel() > 1  # not all tied, nor all found


@pytest.mark.gpu
@every_dual_type
def test_the_device_changes_no_rank(model_type: str, models: Any, images: list[Path]) -> None:
    ranks = []
    for device in ("cpu", "cuda"):
        options = EncoderConfig(device=device, dtype="float32")
        ranks.append(rank(load_encoder(models(model_type), options), images))
    assert all(torch.equal(a, b) for a, b in zip(*ranks, strict=True))


def note_batches(encoder: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches of images that an encoder runs from here on."""
    sizes: list[int] = []
    run = encoder._model.encode_pixels

    def note(pixel_values: Any, **others: Any) -> Any:
        sizes.append(len(pixel_values))
        return run(pixel_values, **others)

    monkeypatch.setattr(encoder._model, "encode_pixels", note)
    return sizes


@every_dual_type
def test_images_in_memory_have_the_embeddings_of_their_files_in_the_batches_described(
    model_type: str, models: Any, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two equal ones that are the same object are encoded once."""
    encoder = load_encoder(models(model_type), EncoderConfig(batch_size=3))
    sizes = note_batches(encoder, monkeypatch)
    files = [*images[:4], images[0]]
    names = [f"{number}" for number in range(5)]
    opened = [Image.open(path) for path in images[:4]]
    opened.append(opened[0])
    expected = encoder.encode_images(files, names=names)
    embeds = encoder.encode_images(tuple(opened), names=names)
    # Its own rows do not differ in a bit; a batch elsewhere in memory may be rounded otherwise.
    torch.testing.assert_close(embeds, expected, rtol=0, atol=1e-6)
    assert torch.equal(embeds[0], embeds[4])
    assert torch.equal(encoder.encode_images(opened[:2], names=names[:2]), embeds[:2])
    assert encoder.encoded["images"] == 2 * len(names)  # a name each
    assert max(sizes) == encoder.description.run["images_per_batch"] == 3


@pytest.mark.parametrize(
    ("model_type", "max_tokens"), [("clip", 77), ("siglip", 64), ("siglip2", 64), ("open_clip", 77)]
)
def test_truncated_texts_are_counted_and_the_limit_is_described(
    model_type: str, max_tokens: int, models: Any
) -> None:
    encoder = load_encoder(models(model_type))
    is_truncated = encoder.encode_texts([LONG_TEXT, *TEXTS, LONG_TEXT]).is_truncated
    assert is_truncated is not None
    assert is_truncated.tolist() == [True, *[False] * len(TEXTS), True]
    text = encoder.description.text
    assert text is not None and text["max_tokens"] == max_tokens


@every_type
def test_blank_texts_and_broken_images_are_named(
    model_type: str, models: Any, tmp_path: Path
) -> None:
    encoder = load_encoder(models(model_type))
    with pytest.raises(ValueError, match=r"number 2 is blank"):
        encoder.encode_texts(["a dog", " "])
    if model_type in DUAL_TYPES:
        broken = tmp_path / "broken.png"
        broken.write_bytes(b"no image")
        with pytest.raises(UnreadableImagesError, match=r"broken\.png: not an image"):
            encoder.encode_images([broken], names=["broken.png"])


def test_own_embeddings_are_those_of_auto_model(models: Any, images: list[Path]) -> None:
    folder = models("llm2clip")
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    with torch.no_grad():
        output = model(**processor(text=list(TEXTS), images=[str(p) for p in images]))
    texts, image_embeds = encode(load_encoder(folder), images)
    torch.testing.assert_close(unit(texts), output.text_embeds, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(unit(image_embeds), output.image_embeds, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
    ("model_type", "text_options"),
    [
        ("clip", {"padding": True, "max_length": 77}),
        ("siglip", {"padding": "max_length", "max_length": 64}),
        ("siglip2", {"padding": "max_length", "max_length": 64}),
        pytest.param("tipsv2", {"padding": "max_length", "max_length": 64}, marks=pytest.mark.slow),
        pytest.param("metaclip_2", {"padding": True, "max_length": 64}, marks=pytest.mark.slow),
        ("aimv2", {"padding": True, "max_length": 64}),
        pytest.param("chinese_clip", {"padding": True, "max_length": 64}, marks=pytest.mark.slow),
        ("altclip", {"padding": True, "max_length": 63}),  # its positions begin after the pad's
        ("vision-text-dual-encoder", {"padding": True, "max_length": 64}),
    ],
)
def test_baselines_have_the_embeddings_of_their_model_cards(
    model_type: str, text_options: dict[str, Any], models: Any, images: list[Path]
) -> None:
    model = AutoModel.from_pretrained(models(model_type))
    processor = AutoProcessor.from_pretrained(models(model_type))
    given = [*TEXTS, LONG_TEXT]
    is_siglip = model_type.startswith("siglip")
    texts = [text.lower() if is_siglip else text for text in given]
    inputs = dict(processor.tokenizer(texts, return_tensors="pt", truncation=True, **text_options))
    if is_siglip:
        inputs.pop("attention_mask")  # not of these models' inputs
    pixels = processor.image_processor(load_images(list(images)), return_tensors="pt")
    with torch.no_grad():
        wanted = (
            model.get_text_features(**inputs).pooler_output,
            model.get_image_features(**pixels).pooler_output,
        )
    encoder = load_encoder(models(model_type), EncoderConfig(batch_size=4))
    found = encoder.encode_texts(given).embeds, encode(encoder, images)[1]
    alone = encoder.encode_texts(given[:1]).embeds  # without padding, which some code takes apart
    torch.testing.assert_close(unit(alone), unit(wanted[0][:1]), rtol=0, atol=ROUNDING)
    for ours, own in zip(found, wanted, strict=True):
        torch.testing.assert_close(unit(ours), unit(own), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("model_type", ["siglip", "siglip2"])
def test_siglip_reads_lower_case(model_type: str, models: Any) -> None:
    encoder = load_encoder(models(model_type))
    embeds = encoder.encode_texts(["A Red Car", "a red car"]).embeds
    assert torch.equal(embeds[0], embeds[1])
    assert (encoder.description.text or {})["lower_case"] is True


def test_whether_clip_is_uncased_is_read_off_its_tokenizer(models: Any, tmp_path: Path) -> None:
    described = load_encoder(models("clip")).description.text
    assert described and described["lower_case"] is False  # the tiny one keeps uppercase
    processor = AutoProcessor.from_pretrained(models("clip"))
    processor.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    AutoModel.from_pretrained(models("clip")).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    described = load_encoder(tmp_path).description.text
    assert described and described["lower_case"] is True


@every_type
def test_a_description_needs_no_weights_in_memory(
    model_type: str, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load_encoder(models(model_type))
    monkeypatch.setattr(type(encoder), "_model", property(lambda _: pytest.fail("loaded")))
    described = asdict(encoder.description)
    assert json.loads(json.dumps(described)) == json.loads(json.dumps(described, allow_nan=False))
    assert len(described["fingerprint"]["weights"]) == 64
    activations = {
        "llm2clip": "silu", "clip": "quick_gelu", "siglip": "gelu_pytorch_tanh",
        "siglip2": "gelu_pytorch_tanh", "open_clip": "gelu", "sentence-transformers": "silu",
    }  # fmt: skip
    assert described["text"]["activation"] == activations[model_type]
    if model_type in DUAL_TYPES:
        assert described["images"]["activation"]
        assert {"resize", "crop", "interpolation", "mean", "std"} <= set(described["images"])


@every_dual_type
def test_how_an_image_is_opened_is_described_and_done(
    model_type: str, models: Any, tmp_path: Path
) -> None:
    encoder = load_encoder(models(model_type))
    described = encoder.description.images or {}
    assert described["orientation"] == "EXIF applied" and described["transparency"] == "on white"
    upright = Image.new("RGBA", (40, 24), (0, 0, 0, 0))
    upright.paste((200, 30, 30, 255), (0, 0, 20, 24))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its left side; to be turned right by a quarter
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    wanted = Image.new("RGB", upright.size, "white")
    wanted.paste(upright, mask=upright)
    wanted.save(tmp_path / "upright.png")
    paths = [tmp_path / "turned.png", tmp_path / "upright.png"]
    turned, other = encoder.encode_images(paths, names=["turned.png", "upright.png"])
    assert torch.equal(turned, other)


def test_the_fingerprint_changes_with_one_weight(models: Any, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(models("clip"))
    AutoProcessor.from_pretrained(models("clip")).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    same = load_encoder(tmp_path).description.fingerprint["weights"]
    assert same == load_encoder(models("clip")).description.fingerprint["weights"]
    with torch.no_grad():
        model.text_projection.weight[0, 0] += 1
    model.save_pretrained(tmp_path)
    assert load_encoder(tmp_path).description.fingerprint["weights"] != same
