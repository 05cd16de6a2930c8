"""ONNX graphs give the model's own embeddings, or there is no folder."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from breaking import edit_json
from odd_images import write_png_header, write_tiff
from onnx_folders import ALL_WEIGHTS, shared_graphs, shared_source, write_small_data
from PIL import Image
from shared_models import CAPTIONS, INSTRUCTION, ROUNDING
from tiny import JOINED, LLM_FAMILIES, VISION_FAMILIES, draw_noise, tiny_model
from tiny_folders import export_tiny_model

from modeling_llm2clip import ExportConfig, LLM2CLIPConfig, export_model, load_onnx_encoder
from modeling_llm2clip.__main__ import main
from modeling_llm2clip.data.records.record_loading import find_example_data, load_records
from modeling_llm2clip.encoding.encode import encode_images, encode_texts
from modeling_llm2clip.heads_llm2clip import count_unpooled
from modeling_llm2clip.model_folders.golden_embeddings import read_golden, render_golden_images
from modeling_llm2clip.model_folders.model_loading import load_model
from modeling_llm2clip.model_folders.model_writing import save_model
from modeling_llm2clip.model_folders.onnx_folder import graph_file, open_session, read_onnx_record
from modeling_llm2clip.publishing import onnx_graphs
from modeling_llm2clip.publishing.onnx_checks import (
    CheckInputs,
    check_script,
    load_check_inputs,
    measure_recall,
    require_near_texts,
    require_recall,
)

WITHOUT_TORCH = """
import json, os, runpy, sys
for name in ("torch", "transformers", "modeling_llm2clip"):
    sys.modules[name] = None  # importing it raises from here on
sys.path[0] = os.path.dirname(sys.argv[1])  # as `python encode.py` sets it
script = runpy.run_path(sys.argv[1])
texts, images, refused = json.loads(sys.argv[2])
found = [script["encode_texts"](texts).tolist(), script["encode_images"](images).tolist(), []]
for image in refused:
    try:
        script["encode_images"]([image])
    except Exception as error:
        found[2].append(repr(error))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def source() -> Path:
    """A model folder, not to be changed."""
    return shared_source()


@pytest.fixture(scope="module")
def exported() -> Path:
    """Its graphs, with all weights."""
    return shared_graphs()


@pytest.fixture
def small_data(tmp_path: Path) -> str:
    return write_small_data(tmp_path / "data")


def crop_photographs(count: int) -> list[Image.Image]:
    """The embedded photographs, and parts of them of odd sizes and other modes."""
    files = sorted((find_example_data() / "photographs" / "images").glob("*.jpg"))
    images = [Image.open(file).convert("RGB") for file in files]
    generator = np.random.default_rng(0)
    modes = ("RGB", "L", "RGBA", "P", "CMYK")
    while len(images) < count:
        whole = images[len(images) % len(files)]
        width, height = (int(generator.integers(size // 3, size)) | 1 for size in whole.size)
        left, top = (int(generator.integers(0, 1 + size // 4)) for size in whole.size)
        part = whole.crop((left, top, min(left + width, whole.width), top + height))
        images.append(part.convert(modes[len(images) % len(modes)]))
    return images


@pytest.mark.slow
def test_graphs_give_the_models_embeddings_in_batches_and_alone(
    source: Path, exported: Path
) -> None:
    model, processor = load_model(source, device="cpu")
    encoder = load_onnx_encoder(exported)
    folders = [find_example_data() / name for name in ("photographs", "emoji")]
    records = [record for folder in folders for record in load_records(folder)]
    captions = sorted({caption for record in records for caption in record.captions})
    texts = random.Random(0).sample(captions, 200)  # of all languages and lengths
    texts += [*CAPTIONS, "an owl. " * 40]  # the last one is truncated
    images = crop_photographs(50)
    assert len({image.size for image in images}) > 30 and len({image.mode for image in images}) == 5
    for embeds, expected in (
        (encoder.encode_texts(texts), encode_texts(model, processor, texts)),
        (encoder.encode_images(images), encode_images(model, processor, images)),
    ):
        assert float((embeds - expected).norm(dim=1).max()) <= ROUNDING
    alone = torch.cat([encoder.encode_texts([text]) for text in texts[-4:]])
    assert torch.allclose(alone, encode_texts(model, processor, texts[-4:]), atol=ROUNDING)


def test_padding_on_the_left_changes_nothing(source: Path, exported: Path) -> None:
    _, processor = load_model(source, device="cpu")
    batch = processor(text=CAPTIONS, text_kwargs={"padding_side": "left"})
    assert batch["attention_mask"][0, 0] == 0
    encoder = load_onnx_encoder(exported, modalities=("text",))
    found = encoder.encode_tokens(batch["input_ids"], batch["attention_mask"])
    assert torch.allclose(found, encoder.encode_texts(CAPTIONS), atol=ROUNDING)


def test_an_instruction_is_attended_to_and_not_pooled(source: Path, exported: Path) -> None:
    model, processor = load_model(source, device="cpu")
    batch = processor(text=[INSTRUCTION + caption for caption in CAPTIONS])
    config = model.config
    prompt_length = len(processor(text=INSTRUCTION)["input_ids"][0])
    with torch.no_grad():
        wanted = model.get_text_features(**batch, prompt_length=prompt_length).pooler_output
    num_unpooled = count_unpooled(
        prompt_length,
        num_prefix=len(config.prompt_prefix_ids),
        pools_prompt=False,
        num_suffix=len(config.prompt_suffix_ids),
        suffix_ends_special=config.prompt_suffix_ends_special,
    )
    inputs = {name: batch[name].numpy() for name in ("input_ids", "attention_mask")}
    session = open_session(graph_file(exported, "text"))
    [found] = session.run(None, {**inputs, "num_unpooled": np.array(num_unpooled)})
    assert np.allclose(found, torch.nn.functional.normalize(wanted, dim=-1), atol=ROUNDING)
    [without] = session.run(None, inputs)
    assert not np.allclose(found, without, atol=0.01)


def save_unusual_images(folder: Path) -> list[str]:
    """Save images of 16 bits, the first and the last of them equal, and of other kinds."""
    column = np.linspace(0, 65535, 60).astype(np.uint16)
    gray = np.stack([column] * 80)
    colors = Image.merge("RGB", [Image.fromarray((gray // 257).astype(np.uint8))] * 3)
    rotated = colors.getexif()
    rotated[0x0112] = 6
    names = ("16.png", "marked.png", "c.jpg", "gray.png", "r.jpg", "white is zero.tif")
    paths = [str(folder / name) for name in names]
    Image.fromarray(gray).save(paths[0])
    Image.fromarray(gray).save(paths[1], transparency=int(column[9]))
    colors.convert("CMYK").save(paths[2])
    colors.convert("L").save(paths[3], transparency=90)
    colors.save(paths[4], exif=rotated)
    inverted = write_tiff(60, 80, (65535 - gray).tobytes(), {258: 16, 262: 0})
    Path(paths[5]).write_bytes(inverted)
    return paths


REFUSED_IMAGES = {
    "13000 × 13000 pixels are more": write_png_header(13_000, 13_000),
    "32-bit integer pixels have an": write_tiff(1, 1, b"\xa0\x86\1\0", {258: 32}),
    "not an image": b"%!PS-Adobe-3.0 EPSF-3.0",
}


def test_the_script_needs_no_torch_and_reads_texts_and_images_as_the_model_does(
    exported: Path, tmp_path: Path
) -> None:
    golden = read_golden(exported)
    assert golden is not None
    paths = [str(tmp_path / f"{number}.png") for number in range(2)]
    for image, path in zip(render_golden_images(), paths, strict=True):
        image.save(path)
    paths += save_unusual_images(tmp_path)
    refused = [str(tmp_path / f"refused {number}") for number in range(len(REFUSED_IMAGES))]
    for path, content in zip(refused, REFUSED_IMAGES.values(), strict=True):
        Path(path).write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(exported / "encode.py"),
         json.dumps([golden[0], paths, refused])],
        cwd=exported.parent, capture_output=True, text=True, timeout=120,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    texts, images, errors = json.loads(done.stdout)
    assert np.allclose(texts, golden[1]["text_embeds"], atol=ROUNDING)
    expected = load_onnx_encoder(exported).encode_images(paths).numpy()
    assert np.allclose(expected[:2], golden[1]["image_embeds"], atol=ROUNDING)
    # Pillow and torchvision round some pixels to neighboring values.
    assert ((np.array(images) * expected).sum(1) > 0.999).all()
    assert np.allclose(images[2], images[-1], atol=ROUNDING)
    assert all(shown in error for shown, error in zip(REFUSED_IMAGES, errors, strict=True))


@pytest.mark.parametrize(
    ("size", "error"),
    [({"shortest_edge": 40}, "same shape"), ({"height": 40, "width": 40}, "Got invalid dim")],
)
def test_a_script_that_images_do_not_fit_is_explained_and_ends_nothing(
    size: dict[str, int], error: str, exported: Path, tmp_path: Path
) -> None:
    """Images that cannot be stacked, and images that the graph refuses."""
    folder = shutil.copytree(exported, tmp_path / "graphs")
    file = folder / "preprocessor_config.json"
    settings = {**json.loads(file.read_text("utf-8")), "size": size, "do_center_crop": False}
    file.write_text(json.dumps(settings), "utf-8")
    reason = check_script(folder, load_onnx_encoder(exported), None)
    assert reason is not None and error in reason


@pytest.mark.parametrize("components", ["text", "vision"])
def test_a_card_and_a_script_of_one_tower_name_only_what_the_folder_has(
    components: Literal["text", "vision"], source: Path, small_data: str, tmp_path: Path
) -> None:
    config = ExportConfig(onnx=True, onnx_data=small_data, components=components)
    folder = export_model(source, tmp_path / "graphs", config)
    image = tmp_path / "dog.jpg"
    draw_noise().save(image)
    shutil.copyfile(image, tmp_path / "cat.jpg")
    card = (folder / "README.md").read_text(encoding="utf-8")
    [example] = re.findall(r"`python encode\.py (.+?)`", card)
    assert f"`python encode.py {example}`" in (folder / "encode.py").read_text(encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(folder / "encode.py"), *shlex.split(example)],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    cosine = float(done.stdout.strip(" []\n"))
    # Equal images have equal embeddings; different texts do not.
    assert (cosine == pytest.approx(1, abs=ROUNDING)) == (components == "vision")
    absent = {"text": ("Vision", "image", ".jpg"), "vision": ("Text", "texts", '"a dog"')}
    body = card.split("---\n")[2]
    assert not [word for word in absent[components] if word in body.replace("text_", "")], body


def test_the_record_states_what_the_files_are(exported: Path) -> None:
    import onnx

    record = read_onnx_record(exported)
    assert set(record["graphs"]) == {f"onnx/{path.name}" for path in (exported / "onnx").iterdir()}
    for name, graph in record["graphs"].items():
        model = onnx.load(exported / name)
        opsets = {entry.domain: entry.version for entry in model.opset_import}
        assert (opsets[""], model.ir_version) == (record["opset"], record["ir_version"])
        assert set(graph["inputs"]) == {
            value.name for value in open_session(exported / name).get_inputs()
        }
    text, vision = (record["graphs"][f"onnx/{name}_model.onnx"] for name in ("text", "vision"))
    assert text["inputs"]["input_ids"] == ["batch_size", "sequence_length"]
    assert text["optional_inputs"] == {"num_unpooled": []}
    assert vision["inputs"]["pixel_values"] == ["batch_size", 3, 32, 32]  # CLIP has one size
    assert text["check"]["texts"] > vision["check"]["images"] == 4  # with long ones
    assert {"max_distance_from_golden", "max_distance_alone"} <= set(text["check"])
    card = (exported / "README.md").read_text(encoding="utf-8")
    assert str(record["opset"]) in card and "`python encode.py" in card
    assert "base_model:\n- owner/model\n" in card and "base_model_relation: quantized\n" in card


@pytest.mark.slow
def test_without_data_the_check_has_captions_and_images_of_the_package() -> None:
    inputs = load_check_inputs(None)
    assert len(inputs.captions) == len(inputs.images) == 200 < len(inputs.texts)


def test_no_graph_names_a_folder_of_the_machine_that_wrote_it(exported: Path) -> None:
    for graph in (exported / "onnx").iterdir():
        assert b'File "/' not in graph.read_bytes()


def test_rounding_reaches_the_language_models_linear_layers_and_nothing_else(
    source: Path, exported: Path
) -> None:
    import onnx

    def read(weights: Any) -> Any:
        return onnx.load(graph_file(exported, "text", weights)).graph

    exact = {tensor.name: tensor for tensor in read("float32").initializer}
    num_layers = LLM2CLIPConfig.from_pretrained(source).text_config.num_hidden_layers
    # In 8 bits those of the MLP, in 4 bits those of attention, too.
    for weights, bits, num_linear in (("int8", 8, 3 * num_layers), ("int4", 4, 7 * num_layers)):
        graph = read(weights)
        rounded = [node for node in graph.node if node.op_type == "MatMulNBits"]
        assert len(rounded) == num_linear
        assert {a.i for node in rounded for a in node.attribute if a.name == "bits"} == {bits}
        kept = [tensor for tensor in graph.initializer if tensor.name in exact]
        assert len(kept) == len(exact) - num_linear
        assert all(tensor == exact[tensor.name] for tensor in kept)
    sizes = [graph_file(exported, "text", weights).stat().st_size for weights in ALL_WEIGHTS]
    assert sizes == sorted(sizes, reverse=True)


def test_rounded_weights_are_near_the_model(exported: Path) -> None:
    wanted = load_onnx_encoder(exported).encode_texts(CAPTIONS)
    for weights, least in (("int8", 0.999), ("int4", 0.8)):
        found = load_onnx_encoder(exported, weights=weights).encode_texts(CAPTIONS)
        cosines = (found * wanted).sum(1)
        assert (cosines > least).all() and (cosines < 0.9999999).any()


def test_transformers_reads_the_folders_configuration_and_processor(
    source: Path, exported: Path
) -> None:
    from transformers import AutoProcessor

    config = LLM2CLIPConfig.from_pretrained(exported)
    found = config.to_dict()["transformers.js_config"]
    assert found["dtype"] == {"text_model": "fp32", "vision_model": "fp32"}
    assert set(found["use_external_data_format"].values()) == {0}
    first, second = (AutoProcessor.from_pretrained(folder) for folder in (source, exported))
    inputs = {"text": CAPTIONS, "images": [draw_noise()]}
    for name, value in first(**inputs).items():
        assert torch.equal(value, second(**inputs)[name])


def test_a_tokens_name_in_the_prompt_is_its_name_in_the_vocabulary(
    source: Path, exported: Path
) -> None:
    """transformers.js looks for the ids of the prompt by these names alone."""
    before, after = (
        json.loads((folder / "tokenizer.json").read_text("utf-8")) for folder in (source, exported)
    )
    ids = {**before["model"]["vocab"], **{t["content"]: t["id"] for t in before["added_tokens"]}}
    prompt = after["post_processor"]["special_tokens"]
    config = LLM2CLIPConfig.from_pretrained(source)
    named = [item["SpecialToken"]["id"] for item in after["post_processor"]["single"]
             if "SpecialToken" in item]  # fmt: skip
    assert [ids[name] for name in named] == config.prompt_prefix_ids + config.prompt_suffix_ids
    assert all(entry["ids"] == [ids[name]] for name, entry in prompt.items())


@pytest.mark.slow
def test_weights_too_large_for_one_file_are_beside_the_graph(
    source: Path, small_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_graphs, "_LARGEST_FILE", 10_000)
    text_only = export_model(source, tmp_path / "text", ExportConfig(components="text"))
    config = ExportConfig(
        onnx=True, onnx_data=small_data, components="text", onnx_weights=("int8",)
    )
    folder = export_model(text_only, tmp_path / "graphs", config)
    names = {path.name for path in (folder / "onnx").iterdir()}
    assert names == {"model_quantized.onnx", "model_quantized.onnx_data"}
    stated = json.loads((folder / "config.json").read_text())["transformers.js_config"]
    assert stated["use_external_data_format"] == {"model_quantized.onnx": 1}
    assert stated["dtype"] == {"model": "q8"}
    encoder = load_onnx_encoder(folder)
    assert encoder.modalities == ("text",) and encoder.encode_texts(["a dog"]).shape == (1, 32)
    with pytest.raises(ValueError, match=r"encodes only texts.*--components full"):
        encoder.encode_images([draw_noise()])
    with pytest.raises(ValueError, match="text graphs with int8 weights, but none with int4"):
        load_onnx_encoder(folder, weights="int4")


def refuse(source: Path, tmp_path: Path, match: str, **options: Any) -> None:
    """Expect an error, and nothing beside what was there before."""
    before = set(tmp_path.iterdir())
    with pytest.raises(ValueError, match=match):
        export_model(source, tmp_path / "refused", ExportConfig(onnx=True, **options))
    assert set(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_eight_bits_are_refused_where_they_change_the_model(
    small_data: str, tmp_path: Path
) -> None:
    """One outlier a block leaves eight bits for it and none for the others."""
    model, processor = tiny_model()
    with torch.no_grad():
        for layer in model.text_model.layers:
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                linear.weight[:, 0] *= 1e4
            layer.post_attention_layernorm.weight[0] = 0.0  # the outlier itself has no effect
    source = save_model(model, processor, tmp_path / "model")
    refuse(
        source, tmp_path, r"8-bit weights .* cosine below 0\.999 .* \(minimum 0\.\d+",
        onnx_data=small_data, onnx_weights=("int8",),
    )  # fmt: skip


def test_a_quantized_model_is_refused(source: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(source, tmp_path / "model"))
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    edit_json("config.json", lambda content: content.update(quantization_config=settings))(model)
    error = r"is quantized \(bitsandbytes\).*Export the original model"
    refuse(model, tmp_path, error)


def test_a_part_that_the_model_lacks_is_refused(source: Path, tmp_path: Path) -> None:
    text_only = export_model(source, tmp_path / "text", ExportConfig(components="text"))
    refuse(text_only, tmp_path, "text-only model without a vision tower.*components=text")
    refuse(text_only, tmp_path, "recall lost to int4 weights", components="text",
           onnx_weights=("int4",))  # fmt: skip
    refuse(source, tmp_path, "cannot be combined with components=vision", components="vision",
           onnx_weights=("int8",))  # fmt: skip


def test_an_image_of_another_size_than_the_towers_is_refused(exported: Path) -> None:
    encoder = load_onnx_encoder(exported, modalities=("image",))
    with pytest.raises(ValueError, match=r"cannot run the graph on pixel_values \[1, 3, 64, 32\]"):
        encoder.encode_pixels(torch.zeros(1, 3, 64, 32))


def test_siglip2s_own_layout_is_refused_by_name(small_data: str, tmp_path: Path) -> None:
    source = export_tiny_model(tmp_path / "model", vision="siglip2")
    refuse(source, tmp_path, "vision tower 'siglip2_vision_model' takes patches",
           components="vision", onnx_data=small_data)  # fmt: skip


@pytest.mark.slow
def test_the_command_prints_how_each_graph_was_checked(
    source: Path, small_data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", str(source), str(tmp_path / "graphs"), "--onnx", "--components", "vision"]
    assert main([*words, "--onnx-data", small_data]) == 0
    shown = capsys.readouterr().out
    assert "onnx/vision_model.onnx: float32" in shown and "4 images, at most" in shown
    assert "Opset 20, IR 10" in shown


# CLIP is in the shared graphs, and SigLIP2 is refused.
EXPORTED_VISION = [
    *(set(VISION_FAMILIES) - {"clip", "siglip2"}), "timm with batch norm", JOINED,
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("vision", sorted(EXPORTED_VISION))
def test_every_vision_family_is_exported(vision: str, small_data: str, tmp_path: Path) -> None:
    source = export_tiny_model(tmp_path / "model", vision=vision)
    config = ExportConfig(onnx=True, components="vision", onnx_data=small_data)
    record = read_onnx_record(export_model(source, tmp_path / "graphs", config))
    graph = record["graphs"]["onnx/vision_model.onnx"]
    assert graph["inputs"]["pixel_values"][0] == "batch_size"
    # DINOv2's positions are fixed while it is traced, which the check at other sizes finds.
    assert ("fixed_size_because" in graph) == (vision == "dinov2")
    assert record["script"] is None


# Llama attends to both sides in the shared graphs; some families have windows, or half of their
# dimensions rotate.
BOTH_SIDES = sorted(set(LLM_FAMILIES) - {"llama"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("llm", "causal"),
    [*((llm, False) for llm in BOTH_SIDES), ("llama", True), ("gemma3_text", True), ("phi", True)],
)
def test_every_llm_family_is_exported(
    llm: str, causal: bool, small_data: str, tmp_path: Path
) -> None:
    """Families with windows are exported within their window of 8 tokens and beyond it."""
    source = export_tiny_model(
        tmp_path / "model", llm=llm, bidirectional=not causal,
        text_pooling="last_token" if causal else "mean",
    )  # fmt: skip
    config = ExportConfig(onnx=True, components="text", onnx_data=small_data)
    folder = export_model(source, tmp_path / "graphs", config)
    model, processor = load_model(source, device="cpu")
    texts = ["x", "an owl " * 20]
    wanted = encode_texts(model, processor, texts)
    assert torch.allclose(load_onnx_encoder(folder).encode_texts(texts), wanted, atol=ROUNDING)


# What is accepted

INPUTS = CheckInputs(captions=["a"] * 4, texts=["a"] * 4, images=[None] * 4, data="some images")


def test_one_text_below_the_limit_is_enough_to_refuse_eight_bits() -> None:
    figures = {"texts": 212, "texts_below_0.999": 0, "min_cosine": 0.9991}
    require_near_texts(figures)
    with pytest.raises(ValueError, match=r"1 of 212 texts .* \(minimum 0\.9989"):
        require_near_texts({**figures, "texts_below_0.999": 1, "min_cosine": 0.9989})


def test_a_loss_of_recall_is_printed_and_accepted_by_its_size() -> None:
    figures = {"recall_at_1": 0.5, "recall_at_1_of_the_model": 0.75, "min_cosine": 0.8}
    with pytest.raises(ValueError, match=r"25\.0 points .* 50\.0 instead of 75\.0 %") as error:
        require_recall(figures, INPUTS, max_loss=0.0)
    assert "max_recall_loss=0.25" in str(error.value) and "some images" in str(error.value)
    require_recall(figures, INPUTS, max_loss=0.25)
    require_recall({**figures, "recall_at_1": 0.8}, INPUTS, max_loss=0.0)  # more is welcome


def test_recall_counts_texts_that_find_their_own_image() -> None:
    images = torch.eye(4)
    assert measure_recall(images, images) == 1.0
    assert measure_recall(images[[1, 0, 2, 3]], images) == 0.5
    assert measure_recall(torch.ones(4, 4), images) == 0.0  # ties count against the texts
