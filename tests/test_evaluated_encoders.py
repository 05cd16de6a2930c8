"""Every kind of model behind one interface, with the vectors that its own code gives."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_encoders import MODEL_KINDS, TEXTS, save_tiny_encoder, save_tiny_pictures
from tokenizers import normalizers
from torch import Tensor
from transformers import AutoModel, AutoProcessor

from modeling_llm2clip.evaluation.encoders.encoder import Encoder, EncoderSettings
from modeling_llm2clip.evaluation.encoders.kinds import open_encoder, tell_kind
from modeling_llm2clip.evaluation.encoders.open_clip_published import (
    find_activation,
    find_preprocessing,
    refuse_torchscript,
)
from modeling_llm2clip.evaluation.encoders.sentence_files import read_sentence_files
from modeling_llm2clip.evaluation.metrics.correspondence import Correspondence
from modeling_llm2clip.evaluation.metrics.ranking import rank_both_ways
from modeling_llm2clip.processing_llm2clip import load_pictures

BATCH_SIZES = (1, 7, 64)
# Sums of float32 numbers in another order, over two layers, on unit-length vectors.
ROUNDING = 1e-5
LONG_TEXT = "a dog and a cat " * 60
DUAL_KINDS = tuple(kind for kind in MODEL_KINDS if kind != "sentence-transformers")

every_kind = pytest.mark.parametrize("kind", MODEL_KINDS)
every_dual_kind = pytest.mark.parametrize("kind", DUAL_KINDS)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder of a model by its kind, saved when it is first asked for."""
    root = tmp_path_factory.mktemp("models")
    return cache(lambda kind: save_tiny_encoder(kind, root / kind))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return save_tiny_pictures(tmp_path_factory.mktemp("pictures"), len(TEXTS))


def encode(encoder: Encoder, pictures: Sequence[Path]) -> tuple[Tensor, Tensor]:
    names = [picture.name for picture in pictures]
    return encoder.encode_texts(TEXTS).embeds, encoder.encode_pictures(pictures, names=names)


def unit(vectors: Any) -> Tensor:
    return F.normalize(torch.as_tensor(vectors).float(), dim=-1)


def test_kinds_are_told_from_files(models: Any) -> None:
    told = {kind: tell_kind(models(kind)) for kind in MODEL_KINDS}
    transformers = dict.fromkeys(("clip", "siglip", "siglip2"), "transformers")
    assert told == {kind: kind for kind in MODEL_KINDS} | transformers


def test_a_folder_of_no_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json.*'open_clip'.*--kind"):
        tell_kind(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"model_type 'llama'"):
        open_encoder(tmp_path)
    with pytest.raises(ValueError, match=r"no such folder, and no Hub id"):
        open_encoder(tmp_path / "nothing" / "here")


@every_kind
def test_vectors_have_the_order_of_the_inputs_and_are_float32(kind: str, models: Any) -> None:
    encoder = open_encoder(models(kind), EncoderSettings(batch_size=3))
    embeds = encoder.encode_texts(TEXTS).embeds
    backwards = encoder.encode_texts(TEXTS[::-1]).embeds
    assert embeds.dtype == torch.float32 and embeds.device.type == "cpu"
    torch.testing.assert_close(backwards.flip(0), embeds, rtol=0, atol=ROUNDING)


@every_dual_kind
def test_the_batch_size_moves_no_rank(kind: str, models: Any, pictures: list[Path]) -> None:
    own = Correspondence.from_image_of_text(range(len(TEXTS)), len(TEXTS))
    ranks = []
    for batch_size in BATCH_SIZES:
        texts, images = encode(
            open_encoder(models(kind), EncoderSettings(batch_size=batch_size)), pictures
        )
        found = rank_both_ways(images, texts, own)
        ranks.append((found.image_to_text.best_ranks, found.text_to_image.best_ranks))
    for other in ranks[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ranks[0], other, strict=True))
    assert ranks[0][0].unique().numel() > 1  # not all tied


def test_the_batch_size_moves_no_rank_of_texts_alone(models: Any) -> None:
    own = Correspondence.from_image_of_text(range(len(TEXTS)), len(TEXTS))
    ranks = []
    for batch_size in BATCH_SIZES:
        settings = EncoderSettings(batch_size=batch_size)
        encoder = open_encoder(models("sentence-transformers"), settings)
        again = [f"again {text}" for text in TEXTS]
        embeds = encoder.encode_texts([*TEXTS, *again]).embeds
        found = rank_both_ways(*embeds.chunk(2), own)
        ranks.append((found.image_to_text.best_ranks, found.text_to_image.best_ranks))
    for other in ranks[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ranks[0], other, strict=True))
    assert torch.cat(ranks[0]).unique().numel() > 1  # not all tied, nor all found


@pytest.mark.gpu
@every_dual_kind
def test_the_device_moves_no_rank(kind: str, models: Any, pictures: list[Path]) -> None:
    own = Correspondence.from_image_of_text(range(len(TEXTS)), len(TEXTS))
    ranks = []
    for device in ("cpu", "cuda"):
        settings = EncoderSettings(device=device, dtype="float32")
        texts, images = encode(open_encoder(models(kind), settings), pictures)
        found = rank_both_ways(images, texts, own)
        ranks.append((found.image_to_text.best_ranks, found.text_to_image.best_ranks))
    assert all(torch.equal(a, b) for a, b in zip(*ranks, strict=True))


@every_kind
def test_equal_inputs_have_equal_vectors_whatever_the_batch(kind: str, models: Any) -> None:
    texts = [TEXTS[0], *TEXTS, TEXTS[0]]
    embeds = open_encoder(models(kind), EncoderSettings(batch_size=2)).encode_texts(texts).embeds
    assert torch.equal(embeds[0], embeds[1]) and torch.equal(embeds[0], embeds[-1])


@pytest.mark.parametrize(
    ("kind", "max_tokens"), [("clip", 77), ("siglip", 64), ("siglip2", 64), ("open_clip", 77)]
)
def test_cut_texts_are_counted_and_the_limit_is_told(
    kind: str, max_tokens: int, models: Any
) -> None:
    encoder = open_encoder(models(kind))
    is_cut = encoder.encode_texts([LONG_TEXT, *TEXTS, LONG_TEXT]).is_cut
    assert is_cut is not None
    assert is_cut.tolist() == [True, *[False] * len(TEXTS), True]
    text = encoder.describe().text
    assert text is not None and text["max_tokens"] == max_tokens


@every_kind
def test_blank_texts_are_named(kind: str, models: Any) -> None:
    with pytest.raises(ValueError, match=r"number 1 is blank"):
        open_encoder(models(kind)).encode_texts(["a dog", " "])


@every_dual_kind
def test_a_broken_picture_is_named(kind: str, models: Any, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken\.png: not a picture"):
        open_encoder(models(kind)).encode_pictures([broken], names=["broken.png"])


def test_own_vectors_are_those_of_auto_model(models: Any, pictures: list[Path]) -> None:
    folder = models("llm2clip")
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    with torch.no_grad():
        output = model(**processor(text=list(TEXTS), images=[str(p) for p in pictures]))
    texts, images = encode(open_encoder(folder), pictures)
    torch.testing.assert_close(unit(texts), output.text_embeds, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(unit(images), output.image_embeds, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
    ("kind", "text_settings"),
    [
        ("clip", {"padding": True}),
        ("siglip", {"padding": "max_length", "max_length": 64}),
        ("siglip2", {"padding": "max_length", "max_length": 64}),
    ],
)
def test_baselines_have_the_vectors_of_their_model_cards(
    kind: str, text_settings: dict[str, Any], models: Any, pictures: list[Path]
) -> None:
    model = AutoModel.from_pretrained(models(kind))
    processor = AutoProcessor.from_pretrained(models(kind))
    texts = [text.lower() if kind != "clip" else text for text in TEXTS]
    inputs = dict(processor.tokenizer(texts, return_tensors="pt", **text_settings))
    if kind != "clip":
        inputs.pop("attention_mask")  # not of these models' inputs
    pixels = processor.image_processor(load_pictures(list(pictures)), return_tensors="pt")
    with torch.no_grad():
        wanted = (
            model.get_text_features(**inputs).pooler_output,
            model.get_image_features(**pixels).pooler_output,
        )
    for found, own in zip(encode(open_encoder(models(kind)), pictures), wanted, strict=True):
        torch.testing.assert_close(unit(found), unit(own), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("kind", ["siglip", "siglip2"])
def test_siglip_reads_lower_case(kind: str, models: Any) -> None:
    encoder = open_encoder(models(kind))
    embeds = encoder.encode_texts(["A Red Car", "a red car"]).embeds
    assert torch.equal(embeds[0], embeds[1])
    text = encoder.describe().text
    assert text is not None and text["lower_case"] is True


def test_open_clip_vectors_are_its_own(models: Any, pictures: list[Path]) -> None:
    import open_clip

    name = f"local-dir:{models('open_clip')}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    pixels = torch.stack([transform(picture) for picture in load_pictures(list(pictures))])
    model.eval()
    with torch.no_grad():
        ids = open_clip.get_tokenizer(name)(list(TEXTS))
        wanted = model.encode_text(ids), model.encode_image(pixels)
    for found, own in zip(encode(open_encoder(models("open_clip")), pictures), wanted, strict=True):
        torch.testing.assert_close(unit(found), unit(own), rtol=0, atol=ROUNDING)


def test_an_open_clip_weights_file_needs_the_name_of_its_architecture(
    models: Any, pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip

    folder = models("open_clip")
    weights = folder / "open_clip_model.safetensors"
    with pytest.raises(ValueError, match=r"architecture is None.*'EVA02-B-16'"):
        open_encoder(weights)
    with pytest.raises(ValueError, match=r"is a folder.*leave architecture='EVA02-B-16' out"):
        open_encoder(folder, architecture="EVA02-B-16")
    written = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
    (tmp_path / "tiny-eva.json").write_text(json.dumps(written["model_cfg"]), encoding="utf-8")
    open_clip.add_model_config(tmp_path / "tiny-eva.json")
    with pytest.raises(ValueError, match=r"0 published models of tiny-eva do not say it either"):
        open_encoder(weights, architecture="tiny-eva")
    published = {"tiny-eva": {"tag": written["preprocess_cfg"]}}
    monkeypatch.setattr(open_clip.pretrained, "_PRETRAINED", published)
    found = encode(open_encoder(weights, architecture="tiny-eva"), pictures)
    for own, wanted in zip(found, encode(open_encoder(folder), pictures), strict=True):
        torch.testing.assert_close(own, wanted)


def test_pictures_of_a_weights_file_are_prepared_as_all_of_its_architecture_agree() -> None:
    siglip = find_preprocessing("ViT-B-16-SigLIP", source="w.safetensors")
    assert siglip["mean"] == siglip["std"] == (0.5, 0.5, 0.5) and siglip["resize_mode"] == "squash"
    assert find_preprocessing("EVA02-B-16", source="w.pt")["resize_mode"] == "shortest"
    # Of ViT-L-14 some are published with CLIP's mean, others with that of Inception.
    with pytest.raises(
        ValueError, match=r"models of ViT-L-14 do not agree.*open_clip_config\.json"
    ):
        find_preprocessing("ViT-L-14", source="w.safetensors")


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("RN50", r"RN50 stands for gelu.*all of quick_gelu.*openai.*Name RN50-quickgelu"),
        ("ViT-L-14-336", r"all of quick_gelu.*Name ViT-L-14-336-quickgelu"),
        ("ViT-B-32", r"differ in it \(gelu: laion2b.*; quick_gelu: openai.*--activation gelu"),
    ],
)
def test_a_plain_name_whose_published_models_have_quick_gelu_tells_no_activation(
    architecture: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        find_activation(architecture, given=None, source="w.pt")
    for given in ("gelu", "quick_gelu"):
        assert find_activation(architecture, given=given, source="w.pt") == given


def test_names_that_tell_their_activation_need_no_other_word() -> None:
    assert find_activation("RN50-quickgelu", given=None, source="w.pt") == "quick_gelu"
    assert find_activation("roberta-ViT-B-32", given=None, source="w.pt") == "quick_gelu"
    assert find_activation("EVA02-B-16", given=None, source="w.pt") == "gelu"
    with pytest.raises(ValueError, match=r"has quick_gelu, and activation is 'gelu'.*: RN50\."):
        find_activation("RN50-quickgelu", given="gelu", source="w.pt")
    with pytest.raises(ValueError, match=r"activation='relu' is none of"):
        find_activation("RN50", given="relu", source="w.pt")


def test_a_weights_file_is_run_with_the_activation_that_its_description_tells(
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
    for activation in (None, "quick_gelu"):
        encoder = open_encoder(
            tmp_path / "w.safetensors", architecture="tiny-clip", activation=activation
        )
        described = encoder.describe()
        assert described.text and described.text["activation"] == (activation or "gelu")
        assert described.pictures and described.pictures["activation"] == (activation or "gelu")
        found[activation] = unit(encoder.encode_texts(TEXTS).embeds)
    with torch.no_grad():
        own = unit(model.encode_text(open_clip.get_tokenizer("tiny-clip")(list(TEXTS))))
    torch.testing.assert_close(found["quick_gelu"], own, rtol=0, atol=ROUNDING)
    # The same weights with the other activation are another model.
    assert (found[None] - own).abs().max() > 100 * ROUNDING


def test_a_torchscript_archive_is_refused_before_its_code_could_run(tmp_path: Path) -> None:
    scripted = torch.jit.script(torch.nn.Linear(2, 2))
    scripted.save(str(tmp_path / "archive.pt"))
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "weights.pt")
    refuse_torchscript(tmp_path / "weights.pt", source="weights.pt")
    with pytest.raises(ValueError, match=r"archive\.pt is a TorchScript archive.*never run"):
        open_encoder(tmp_path / "archive.pt", architecture="RN50-quickgelu")


@every_kind
def test_every_description_tells_the_activation(kind: str, models: Any) -> None:
    described = open_encoder(models(kind)).describe()
    wanted = {
        "llm2clip": "silu", "clip": "quick_gelu", "siglip": "gelu_pytorch_tanh",
        "siglip2": "gelu_pytorch_tanh", "open_clip": "gelu", "sentence-transformers": "silu",
    }  # fmt: skip
    assert described.text and described.text["activation"] == wanted[kind]
    assert described.pictures is None or described.pictures["activation"]


def test_clips_lower_case_is_told_from_its_tokenizer(models: Any, tmp_path: Path) -> None:
    described = open_encoder(models("clip")).describe().text
    assert described and described["lower_case"] is False  # the tiny one keeps capitals
    processor = AutoProcessor.from_pretrained(models("clip"))
    processor.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    AutoModel.from_pretrained(models("clip")).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    described = open_encoder(tmp_path).describe().text
    assert described and described["lower_case"] is True


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
        "from modeling_llm2clip.evaluation.encoders.kinds import open_encoder\n"
        "encoder = open_encoder('owner/model')\n"
        "print(encoder.describe().kind, tuple(encoder.encode_texts(['a dog']).embeds.shape))\n"
    )
    with HubServer() as hub:
        repository = hub.create_repository("owner/model")
        repository.add_commit("main", "add", {name: HubFile(f) for name, f in files.items()})
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=200,
            cwd=Path(__file__).parents[1], env=hub.environment(tmp_path / "cache"),
        )  # fmt: skip
        asked = [request for request in hub.requests if request.endswith("/pytorch_model.bin")]
    assert done.stdout.strip() == "open_clip (1, 16)", done.stderr[-2000:]
    assert asked == []


def test_open_clip_without_weights_is_not_random(models: Any, tmp_path: Path) -> None:
    config = (models("open_clip") / "open_clip_config.json").read_text(encoding="utf-8")
    (tmp_path / "open_clip_config.json").write_text(config, encoding="utf-8")
    with pytest.raises(ValueError, match=r"none of .*open_clip_model\.safetensors.*random"):
        open_encoder(tmp_path)


def test_a_sentence_transformer_without_pictures_says_so(models: Any, pictures: list[Path]) -> None:
    encoder = open_encoder(models("sentence-transformers"))
    assert encoder.describe().pictures is None
    with pytest.raises(ValueError, match=r"takes no pictures\. Give it text tasks"):
        encoder.encode_pictures(pictures[:1], names=["0.png"])


def test_our_folder_is_a_sentence_transformer_where_that_is_asked_for(
    models: Any, pictures: list[Path]
) -> None:
    folder = models("llm2clip")
    as_ours, as_theirs = open_encoder(folder), open_encoder(folder, kind="sentence-transformers")
    ours, theirs = encode(as_ours, pictures), encode(as_theirs, pictures)
    described = [encoder.describe().pictures or {} for encoder in (as_ours, as_theirs)]
    assert described[0]["resize"] == described[1]["resize"] == {"height": 32, "width": 32}
    for found, wanted in zip(theirs, ours, strict=True):
        torch.testing.assert_close(unit(found), unit(wanted), rtol=0, atol=ROUNDING)


def test_an_argument_for_another_kind_is_refused(models: Any) -> None:
    with pytest.raises(ValueError, match=r"\['architecture'\] is for open_clip, .* transformers"):
        open_encoder(models("clip"), architecture="ViT-B-32")
    with pytest.raises(ValueError, match=r"No kind is called 'CLIP'"):
        open_encoder(models("clip"), kind="CLIP")


@every_kind
def test_a_description_needs_no_weights_in_memory(
    kind: str, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = open_encoder(models(kind))
    monkeypatch.setattr(type(encoder), "_model", property(lambda _: pytest.fail("loaded")))
    described = encoder.describe().to_json()
    assert json.loads(json.dumps(described)) == json.loads(json.dumps(described, allow_nan=False))
    assert len(described["fingerprint"]["weights"]) == 64
    if kind != "sentence-transformers":
        assert {"resize", "crop", "interpolation", "mean", "std"} <= set(described["pictures"])


@pytest.mark.parametrize("kind", ["sentence-transformers", "llm2clip"])
def test_files_say_of_a_sentence_transformer_what_it_says_itself(kind: str, models: Any) -> None:
    from sentence_transformers import SentenceTransformer

    loaded = SentenceTransformer(str(models(kind)), device="cpu")
    found = read_sentence_files(models(kind))
    assert found.modules == tuple(type(module).__name__ for module in loaded)
    assert found.modalities == tuple(loaded.modalities)
    assert found.max_tokens == loaded.max_seq_length
    assert found.default_prompt == loaded.prompts.get(loaded.default_prompt_name)


@pytest.mark.parametrize(
    ("settings", "max_tokens"),
    [
        ({"max_seq_length": 12, "do_lower_case": True}, 12),  # as old releases wrote it
        ({"max_seq_length": None, "do_lower_case": False}, 24),
        ({}, 24),
    ],
)
def test_older_settings_of_a_sentence_transformer_are_read_as_it_reads_them(
    settings: dict[str, Any], max_tokens: int, models: Any, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    folder = tmp_path / "old"
    shutil.copytree(models("sentence-transformers"), folder)
    (folder / "sentence_bert_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "config_sentence_transformers.json").write_text(
        '{"prompts": {"query": "find: "}, "default_prompt_name": "query"}', encoding="utf-8"
    )
    found = read_sentence_files(folder)
    loaded = SentenceTransformer(str(folder), device="cpu")
    assert found.max_tokens == loaded.max_seq_length == max_tokens
    assert found.modalities == tuple(loaded.modalities) == ("text",)
    assert found.default_prompt == "find: "
    assert found.lower_case is bool(settings.get("do_lower_case"))


def test_a_sentence_transformer_of_static_vectors_has_no_limit_and_cuts_nothing(
    models: Any, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    tokenizer = AutoProcessor.from_pretrained(models("sentence-transformers")).backend_tokenizer
    module = StaticEmbedding(tokenizer, embedding_dim=8)
    SentenceTransformer(modules=[module], device="cpu").save(str(tmp_path))
    encoder = open_encoder(tmp_path)
    described = encoder.describe().text
    assert described and described["modules"] == ["StaticEmbedding"]
    assert described["max_tokens"] is None
    assert encoder.encode_texts([LONG_TEXT]).is_cut is None


def test_a_sentence_transformer_without_texts_is_refused(models: Any, tmp_path: Path) -> None:
    folder = tmp_path / "blind"
    shutil.copytree(models("sentence-transformers"), folder)
    (folder / "sentence_bert_config.json").write_text('{"modality_config": {"audio": {}}}', "utf-8")
    with pytest.raises(ValueError, match=r"\('audio',\) and no texts"):
        open_encoder(folder).describe()


def test_a_damaged_list_of_modules_is_told(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text("[{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"modules\.json is missing or damaged"):
        open_encoder(tmp_path)


@every_dual_kind
def test_how_a_picture_is_opened_is_described_and_done(
    kind: str, models: Any, tmp_path: Path
) -> None:
    encoder = open_encoder(models(kind))
    described = encoder.describe().pictures or {}
    assert described["orientation"] == "EXIF applied" and described["transparency"] == "on white"
    upright = Image.new("RGBA", (40, 24), (0, 0, 0, 0))
    upright.paste((200, 30, 30, 255), (0, 0, 20, 24))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side; to be turned right by a quarter
    upright.rotate(90, expand=True).save(tmp_path / "lying.png", exif=exif)
    wanted = Image.new("RGB", upright.size, "white")
    wanted.paste(upright, mask=upright)
    wanted.save(tmp_path / "upright.png")
    paths = [tmp_path / "lying.png", tmp_path / "upright.png"]
    lying, other = encoder.encode_pictures(paths, names=["lying.png", "upright.png"])
    assert torch.equal(lying, other)


def test_the_fingerprint_changes_with_one_weight(models: Any, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(models("clip"))
    AutoProcessor.from_pretrained(models("clip")).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    same = open_encoder(tmp_path).describe().fingerprint["weights"]
    assert same == open_encoder(models("clip")).describe().fingerprint["weights"]
    with torch.no_grad():
        model.text_projection.weight[0, 0] += 1
    model.save_pretrained(tmp_path)
    assert open_encoder(tmp_path).describe().fingerprint["weights"] != same


@pytest.mark.parametrize("settings", [{"dtype": "int8"}, {"batch_size": 0}])
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"int8|batch_size=0"):
        EncoderSettings(**settings)
