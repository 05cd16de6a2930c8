"""A text tower that is a released embedder gives sentence-transformers' own embeddings."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
import torch.nn.functional as F
from aligning import write_color_data
from breaking import edit_json
from safetensors.torch import load_file, save_file
from shared_models import mostly_slow
from tiny import tiny_vision
from tiny_embedders import EMBEDDERS, tiny_embedder
from torch import Tensor, nn
from transformers import AutoModel
from tuning import RECORDS, SHORT

from modeling_llm2clip.building.build_model import build_model, join_towers
from modeling_llm2clip.building.pretrained_towers import MINILM, find_tower
from modeling_llm2clip.configs.align_config import AlignConfig
from modeling_llm2clip.configs.build_config import BuildConfig
from modeling_llm2clip.configs.serve_config import ServeConfig
from modeling_llm2clip.configs.train_config import TrainConfig
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.doctor.check_model import check_model
from modeling_llm2clip.encoding.encode import encode_texts
from modeling_llm2clip.model_folders.fingerprint import describe_prompt
from modeling_llm2clip.model_folders.model_folder import find_model_type
from modeling_llm2clip.model_folders.model_writing import save_model
from modeling_llm2clip.modeling_llm2clip import LLM2CLIPModel
from modeling_llm2clip.processing_llm2clip import LLM2CLIPProcessor
from modeling_llm2clip.serving.service import EmbeddingService
from modeling_llm2clip.training.alignment.align import align
from modeling_llm2clip.training.finetuning.finetune_llm import finetune_llm

sentence_transformers = pytest.importorskip("sentence_transformers")
modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")

# Of several lengths, one of which is truncated, and beginnings that tokenizers merge with a prompt.
TEXTS = [
    "a dog", "Two red apples on a wooden table, 1862", "(1) It's", '"x"', "東京の夜景",
    " ".join(["a dog on a mat"] * 40),
]  # fmt: skip
PROMPT = "task: find the image | query: "
# Sums of float32 numbers in another order, of embeddings of unit length.
ROUNDING = 1e-6
TINY = {"projection_dim": 16, "text_adapter_layers": 0}
Sources: TypeAlias = Callable[[str], Path]
OWN = BuildConfig(prompt="own", **TINY)


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Folder of a family's embedder, which no test may change."""
    return cache(lambda family: tiny_embedder(tmp_path_factory.mktemp("embedder"), family))


def save_longer(source: Path, folder: Path, length: int) -> Path:
    """Save an embedder anew that reads longer texts."""
    encoder = sentence_transformers.SentenceTransformer(str(source), device="cpu")
    encoder.max_seq_length = length
    encoder.save(str(folder))
    return folder


def encode_built(source: Path, config: BuildConfig) -> tuple[LLM2CLIPModel, Tensor]:
    """Build on an embedder, and encode the texts before the adapter."""
    model, processor = join_towers(tiny_vision(), source, config)
    return model, encode_texts(model, processor, TEXTS, project=False)


def encode_with_library(source: Path, **settings: Any) -> Tensor:
    encoder = sentence_transformers.SentenceTransformer(str(source), device="cpu")
    embeds: Tensor = encoder.encode(TEXTS, convert_to_tensor=True, **settings)
    return embeds.cpu().clone()


def measure_distance(found: Tensor, wanted: Tensor) -> float:
    """Return the largest distance between embeddings, of which those wanted have unit length."""
    return float((F.normalize(found, dim=-1) - wanted).norm(dim=-1).max())


@pytest.mark.parametrize("family", mostly_slow(EMBEDDERS, {"MiniLM", "Qwen3-Embedding", "SGPT"}))
def test_embeddings_before_the_adapter_are_the_embedders_own(
    family: str, embedder: Sources, tmp_path: Path
) -> None:
    model_type = EMBEDDERS[family][0].removesuffix("_text")
    pytest.importorskip(f"transformers.models.{model_type}")
    source = embedder(family)
    wanted = encode_with_library(source, prompt=PROMPT)
    config = BuildConfig(prompt="own", prompt_prefix=PROMPT, **TINY)
    folder = save_model(*join_towers(tiny_vision(), source, config), tmp_path / "model")
    model = LLM2CLIPModel.from_pretrained(folder)
    processor = LLM2CLIPProcessor.from_pretrained(folder)
    alone = [processor(text=[text]) for text in TEXTS]
    with torch.no_grad():
        embeds = {
            "in a batch": encode_texts(model, processor, TEXTS, project=False),
            "alone": torch.cat([model.get_caption_embeds(**text) for text in alone]),
        }
    for side in ("right", "left"):  # with gradients a batch is padded, without them packed
        inputs = processor(text=TEXTS, padding_side=side)
        embeds[f"padded on the {side}"] = model.get_caption_embeds(**inputs).detach()
    distances = {name: measure_distance(found, wanted) for name, found in embeds.items()}
    assert max(distances.values()) < ROUNDING, distances
    prompt, _ = describe_prompt(processor.tokenizer.backend_tokenizer, model.config)
    assert prompt.endswith(" query: ")
    # Another prompt would give other embeddings.
    assert measure_distance(embeds["alone"], encode_with_library(source)) > 100 * ROUNDING


@pytest.mark.parametrize(
    ("family", "last"),
    [
        ("RoBERTa", []),
        ("EmbeddingGemma", None),
        pytest.param("Qwen3-Embedding", None, marks=pytest.mark.slow),
    ],
)
def test_texts_get_embeddings_that_are_kept_bit_for_bit(
    family: str, last: list[Any] | None, tmp_path: Path
) -> None:
    """With and without Dense modules, and of an embedder that does not normalize."""
    source = tiny_embedder(tmp_path, family, last=last)
    config = BuildConfig(prompt="own", keep_embeddings=True)
    folder = save_model(*join_towers(tiny_vision(), source, config), tmp_path / "model")
    model = LLM2CLIPModel.from_pretrained(folder)
    processor = LLM2CLIPProcessor.from_pretrained(folder)
    found = encode_texts(model, processor, TEXTS)
    unprojected = encode_texts(model, processor, TEXTS, project=False)
    assert torch.equal(found, F.normalize(unprojected, dim=-1))
    assert measure_distance(found, F.normalize(encode_with_library(source), dim=-1)) < ROUNDING
    assert model.config.random_heads == ["visual_projection"]


def test_modules_of_another_type_are_refused_with_their_file(
    embedder: Sources, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(embedder("MiniLM"), tmp_path / "embedder"))
    (folder / "modules.json").write_text('["a"]', encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{folder} cannot be loaded: modules\.json"):
        join_towers(tiny_vision(), folder, OWN)


@pytest.mark.slow
def test_what_a_training_would_change_of_an_embedder_is_refused(
    embedder: Sources, tmp_path: Path
) -> None:
    source, run = embedder("EmbeddingGemma"), tmp_path / "run"
    with_dense = save_model(*join_towers(tiny_vision(), source, OWN), tmp_path / "dense")
    with pytest.raises(ValueError, match="Align it without fine-tuning"):
        finetune_llm(with_dense, RECORDS, run, SHORT)
    config = BuildConfig(prompt="own", keep_embeddings=True)
    folder = save_model(*join_towers(tiny_vision(), source, config), tmp_path / "kept")
    records = load_records(write_color_data(tmp_path / "data", count=30))
    online = AlignConfig(text_training="frozen-online", device="cpu", max_steps=1)
    with pytest.raises(ValueError, match=r"keeps an embedder's own.*Set lock_text=True"):
        align(folder, records, run, online)
    aligned = align(folder, records, tmp_path / "locked", replace(online, lock_text=True))
    with pytest.raises(ValueError, match=r"keeps an embedder's own.*Set lock_text=True"):
        align(aligned, records, run, online)
    with pytest.raises(ValueError, match="but a LoRA would change its embeddings"):
        finetune_llm(folder, RECORDS, run, SHORT)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (
            {"prompt": "own", "keep_embeddings": True, **TINY},
            "determines projection_dim, text_adapter",
        ),
        ({"prompt": "none", "keep_embeddings": True}, "keep_embeddings: only for a sentence-tr"),
        ({"prompt": "none", "truncate_dim": 8}, "truncate_dim: only for a sentence-tr"),
        # Those of other LLMs, and what an embedder has anyway.
        ({"bidirectional": False, "text_pooling": "last_token"}, "Remove bidirectional, text_"),
        ({"bidirectional": True, "text_pooling": "mean"}, "Remove bidirectional, text_pooling"),
        ({"prompt_name": "query", "prompt_prefix": "query: "}, "both set the prompt"),
    ],
)
def test_options_that_an_embedder_does_not_take_are_refused(
    options: dict[str, Any], error: str
) -> None:
    with pytest.raises(ValueError, match=error):
        BuildConfig(**{"prompt": "own", **options})


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", mostly_slow(["MiniLM", "gte-ModernBERT", "EmbeddingGemma", "SGPT"], {"SGPT"})
)
def test_the_folder_of_an_embedder_is_healthy_with_its_own_pooling_only(
    family: str, embedder: Sources, tmp_path: Path
) -> None:
    source = embedder(family)
    config = BuildConfig(prompt="own", prompt_prefix=PROMPT, **TINY)
    folder = build_model(tiny_vision(), source, tmp_path / "model", config)
    report = check_model(folder)
    assert report.healthy, str(report)
    # The doctor pools by hand: another pooling in config.json is another embedding.
    stated = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**stated, "text_pooling": "last_token"}))
    assert not check_model(folder).healthy


def test_prompts_are_found_by_name_and_by_default(tmp_path: Path) -> None:
    prompts = {"query": "find: the query: ", "document": "the passage: "}
    source = tiny_embedder(tmp_path, prompts=prompts, default_prompt_name="document")
    for name, shown in (("query", "query"), (None, "document")):
        _, embeds = encode_built(source, replace(OWN, prompt_name=name))
        assert measure_distance(embeds, encode_with_library(source, prompt_name=shown)) < ROUNDING
    with pytest.raises(ValueError, match=r"has no prompt 'image'; it has .*'query'"):
        join_towers(tiny_vision(), source, replace(OWN, prompt_name="image"))


def test_an_instruction_is_pooled_as_the_embedder_pools_it(tmp_path: Path) -> None:
    """Also if the tokenizer adds no token at the start of a text."""
    prompts = {"query": "find the query: "}
    source = tiny_embedder(tmp_path, "Qwen3-Embedding", pooling="mean", prompts=prompts)
    config = BuildConfig(prompt="own", keep_embeddings=True)
    model, processor = join_towers(tiny_vision(), source, config)
    assert not model.config.prompt_prefix_ids
    model.config.random_heads = []  # only a trained model is served
    folder = save_model(model, processor, tmp_path / "model", instructions=prompts)
    wanted = encode_with_library(source, prompt_name="query")
    assert measure_distance(encode_with_library(folder, prompt_name="query"), wanted) < ROUNDING
    service = EmbeddingService.open(folder, ServeConfig(device="cpu"))
    served = asyncio.run(service.embed(TEXTS, prompt_name="query"))
    service.close()
    assert measure_distance(torch.from_numpy(served.embeds), wanted) < ROUNDING
    assert check_model(folder, device="cpu").healthy


@pytest.mark.parametrize("prompt", [None, "find the image: "])
def test_a_prompt_that_is_not_pooled_is_left_out_of_the_mean(
    prompt: str | None, tmp_path: Path
) -> None:
    source = tiny_embedder(tmp_path, include_prompt=False)
    model, embeds = encode_built(source, replace(OWN, prompt_prefix=prompt))
    assert model.config.num_unpooled == (
        0 if prompt is None else len(model.config.prompt_prefix_ids)
    )
    assert measure_distance(embeds, encode_with_library(source, prompt=prompt or "")) < ROUNDING


@pytest.mark.parametrize("family", mostly_slow(["MiniLM", "EmbeddingGemma"], {"EmbeddingGemma"}))
def test_the_first_dimensions_point_where_those_of_the_library_do(
    family: str, embedder: Sources
) -> None:
    source = embedder(family)
    model, embeds = encode_built(source, replace(OWN, truncate_dim=8))
    assert embeds.shape[1] == model.config.text_width == 8
    expected = F.normalize(encode_with_library(source, truncate_dim=8), dim=-1)
    # The direction of the first dimensions, which are a part of the length.
    assert measure_distance(embeds, expected) < 3 * ROUNDING
    with pytest.raises(ValueError, match=r"truncate_dim=99, but the embeddings .* have"):
        join_towers(tiny_vision(), source, replace(OWN, truncate_dim=99))


def test_embeddings_that_are_not_normalized_keep_their_length(tmp_path: Path) -> None:
    source = tiny_embedder(tmp_path, last=[])
    _, embeds = encode_built(source, OWN)
    expected = encode_with_library(source)
    torch.testing.assert_close(embeds, expected, rtol=1e-5, atol=1e-5)  # lengths of about six


LINEAR = {"activation_function": None}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "activation": (
        {"last": [modules.Dense(32, 8, activation_function=nn.Tanh())]}, "a Dense has the"
    ),
    "residual": (
        {"last": [modules.Dense(32, 32, use_residual=True, **LINEAR)]}, "a Dense uses more than the"
    ),
    "module": ({"last": [modules.LayerNorm(32)]}, "LayerNorm is not a Dense"),
    "order": ({"last": [modules.Normalize(), modules.Dense(32, 8, **LINEAR)]}, "Normalize is not"),
    "pooling": ({"pooling": "max"}, "pooling_mode='max' is not one of"),
    "poolings": ({"pooling": ("cls", "mean"), "last": []}, r"pooling_mode=\('cls', 'mean'\)"),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_modules_that_cannot_be_repeated_are_refused_by_name(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = tiny_embedder(tmp_path, **settings)
    error = f"cannot be reproduced exactly: {message}.*another embedder"
    with pytest.raises(ValueError, match=error):
        join_towers(tiny_vision(), source, OWN)


def test_an_embedder_keeps_its_length_and_is_the_same_in_every_build(
    embedder: Sources, tmp_path: Path
) -> None:
    source = save_longer(embedder("MiniLM"), tmp_path / "longer", 600)
    weights = load_file(source / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "pooler" not in name}
    assert len(kept) < len(weights)
    save_file(kept, source / "model.safetensors", metadata={"format": "pt"})
    models = [join_towers(tiny_vision(), source, OWN)[0] for _ in range(2)]
    assert [model.config.max_text_length for model in models] == [600, 600]
    with pytest.raises(ValueError, match=r"max_text_length=601 exceeds the limit of .*, 600"):
        join_towers(tiny_vision(), source, replace(OWN, max_text_length=601))
    first, second = (model.text_model.state_dict() for model in models)
    assert all(torch.equal(first[name], value) for name, value in second.items())
    with pytest.raises(ValueError, match="normalize_text_before_adapter=False cannot be used"):
        join_towers(tiny_vision(), source, replace(OWN, normalize_text_before_adapter=False))


@pytest.mark.parametrize(
    "family", mostly_slow(["EmbeddingGemma", "Qwen3-Embedding"], {"EmbeddingGemma"})
)
def test_an_embedder_of_long_texts_is_repeated_beyond_its_window(
    family: str, embedder: Sources, tmp_path: Path
) -> None:
    """The longest sample is encoded whole, and exceeds the window by far."""
    source = save_longer(embedder(family), tmp_path / "longer", 1000)
    model, embeds = encode_built(source, OWN)
    assert model.config.max_text_length == 1000
    assert measure_distance(embeds, encode_with_library(source)) < ROUNDING


def test_a_bidirectional_network_keeps_its_window_with_a_prompt_of_ours(
    embedder: Sources, tmp_path: Path
) -> None:
    source = embedder("EmbeddingGemma")
    network = AutoModel.from_pretrained(source)
    ids = torch.arange(4, 44).unsqueeze(0)
    wanted = network(ids).last_hidden_state
    config = BuildConfig(prompt="llama-3", **TINY)
    built, processor = join_towers(tiny_vision(), source, config)
    folder = save_model(built, processor, tmp_path / "model")
    for model in (built, LLM2CLIPModel.from_pretrained(folder)):
        for attention in ("sdpa", "eager"):
            model.set_attn_implementation(attention)
            found = model.text_model(ids).last_hidden_state
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)  # rounding, of about 1
    network.config.sliding_window += 1  # a window wider by one token is seen
    assert (network(ids).last_hidden_state - wanted).abs().max() > 1e-3


def test_what_is_not_an_embedder_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"no modules\.json, so it is not a sentence-transformers"):
        join_towers(tiny_vision(), tmp_path, OWN)
    with pytest.raises(ValueError, match="needs the folder or Hub id of an embedder"):
        join_towers(tiny_vision(), tiny_vision(), OWN)


def test_an_old_layout_and_t5_are_refused_with_the_way_out(tmp_path: Path) -> None:
    source = tiny_embedder(tmp_path)
    old = tmp_path / "old"
    shutil.copytree(source, old / "0_Transformer")
    shutil.move(old / "0_Transformer" / "1_Pooling", old)
    modules_file = old / "modules.json"
    shutil.move(old / "0_Transformer" / "modules.json", modules_file)
    first, *others = json.loads(modules_file.read_text("utf-8"))
    modules_file.write_text(json.dumps([{**first, "path": "0_Transformer"}, *others][:2]))
    with pytest.raises(ValueError, match=r"the folder has no config\.json"):
        join_towers(tiny_vision(), old, OWN)
    assert find_model_type(old).content == "sentence-transformers"  # what `evaluate` takes
    encoder = sentence_transformers.SentenceTransformer(str(old), device="cpu")
    encoder.save(str(tmp_path / "saved again"))
    join_towers(tiny_vision(), tmp_path / "saved again", OWN)
    (source / "config.json").write_text('{"model_type": "t5"}')
    for prompt in ("own", "llama-3"):
        with pytest.raises(ValueError, match="is a 't5', an encoder-decoder model"):
            join_towers(tiny_vision(), source, replace(OWN, prompt=prompt))


def test_a_network_that_gives_other_embeddings_than_the_library_is_refused(tmp_path: Path) -> None:
    source = tiny_embedder(tmp_path)
    # The library lowercases what the tokenizer, without a normalizer, takes as it is.
    edit_json("tokenizer.json", lambda content: content.update(normalizer=None))(source)
    edit_json("sentence_bert_config.json", lambda c: c.update(do_lower_case=True))(source)
    with pytest.raises(
        ValueError, match="does not reproduce the embeddings of sentence-transformers"
    ):
        join_towers(tiny_vision(), source, OWN)


def test_a_recipe_does_not_fine_tune_an_embedder(tmp_path: Path) -> None:
    recipe: dict[str, Any] = {
        "vision_model": "a", "text_model": "b", "data": "c", "output": tmp_path,
        "build": BuildConfig(prompt="own"),
    }  # fmt: skip
    assert TrainConfig(**recipe).finetune is None
    with pytest.raises(ValueError, match="Leave finetune out"):
        TrainConfig(**recipe, finetune={"num_train_epochs": 3})


@pytest.mark.slow
def test_a_lora_leaves_out_the_pooler_of_an_encoder_which_nothing_reads(
    embedder: Sources, tmp_path: Path
) -> None:
    built = join_towers(tiny_vision(), embedder("MiniLM"), OWN)
    source = save_model(*built, tmp_path / "model")
    tuned = finetune_llm(source, RECORDS, tmp_path / "tuned", replace(SHORT, merge=True))
    data = write_color_data(tmp_path / "data", count=12)
    config = AlignConfig(
        text_training="lora", max_steps=1, global_batch_size=8, held_out_ratio=0.0,
        warmup_steps=0, projection_init="model", device="cpu",
    )  # fmt: skip
    aligned = align(source, load_records(data), tmp_path / "aligned", config)
    assert not [
        n for n in load_file(tmp_path / "tuned/lora/adapter_model.safetensors") if "pooler" in n
    ]
    before = built[0].text_model.state_dict()
    for folder in (tuned, aligned):
        after = LLM2CLIPModel.from_pretrained(folder).text_model.state_dict()
        changed = [name for name, value in before.items() if not torch.equal(after[name], value)]
        layers = [name for name in changed if name.startswith("encoder.layer.")]
        # Six linear layers in each of two, all of which a LoRA has.
        assert changed == layers and len(changed) == 12


@pytest.mark.slow
def test_the_packages_own_embedder_is_all_minilm(tmp_path: Path) -> None:
    if not (source := find_tower(MINILM)).is_dir():
        pytest.skip("all-MiniLM-L6-v2 is not in the cache")
    folder = build_model(tiny_vision(), source, tmp_path, OWN)
    model = LLM2CLIPModel.from_pretrained(folder)
    found = encode_texts(model, LLM2CLIPProcessor.from_pretrained(folder), TEXTS, project=False)
    # Six layers of real weights instead of two; about 1e-6 was measured.
    assert measure_distance(found, encode_with_library(source)) < 5e-6
    assert check_model(folder).healthy
