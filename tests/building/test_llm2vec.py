"""The text side gives LLM2Vec's ids, spans and embeddings, and differs where LLM2Vec is wrong."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from breaking import edit_json
from converting import LLM2VEC, read_captions
from safetensors.torch import load_file
from tiny_folders import save_tiny_vision

from modeling_llm2clip import LLM2CLIPConfig, LLM2CLIPModel
from modeling_llm2clip.__main__ import main
from modeling_llm2clip.building.build_model import build_model, join_towers
from modeling_llm2clip.building.pretrained_towers import SMOLLM2
from modeling_llm2clip.configs.build_config import BuildConfig
from modeling_llm2clip.data.atomic_files import default_cache_folder
from modeling_llm2clip.model_folders.model_loading import load_model

# LLM2Vec's own templates; it has none for Gemma's first version. Its Qwen2 is causal.
PROMPT_OF = {"llama": "llama-3", "mistral": "mistral", "gemma": "none", "qwen2": "chatml"}
LEAST_COSINE = 0.99999
SMOLLM2_FOLDER = default_cache_folder() / f"{SMOLLM2.name}-{SMOLLM2.sha256[:12]}"

# As LLM2Vec's Qwen2 is with the attention mask of its Llama.
BIDIRECTIONAL = {"qwen2": "_bidirectional"}

every_family = pytest.mark.parametrize("family", PROMPT_OF)


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_vision(tmp_path_factory.mktemp("towers") / "vision")


def build(vision: Path, folder: Path, config: BuildConfig) -> tuple[Any, Any]:
    """Build from an LLM2Vec folder, and load what was written."""
    with TemporaryDirectory() as output:
        return load_model(build_model(vision, folder, output, config))


@pytest.fixture(scope="module")
def built(vision: Path) -> dict[str, tuple[Any, Any]]:
    return {
        family: build(vision, LLM2VEC / family, BuildConfig(prompt=prompt))
        for family, prompt in PROMPT_OF.items()
    }


def smallest_cosine(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(F.cosine_similarity(found, wanted, dim=-1).min())


def encode(model: LLM2CLIPModel, processor: Any, texts: list[str], **settings: Any) -> torch.Tensor:
    inputs = processor(text=texts)
    with torch.inference_mode():
        return model.get_caption_embeds(**inputs, **settings)


def real_ids(recorded: dict[str, torch.Tensor], row: int, name: str) -> list[int]:
    """Ids of a row that LLM2Vec padded on the left, under a mask."""
    return recorded[f"input_ids{name}"][row][recorded[f"attention_mask{name}"][row].bool()].tolist()


@every_family
def test_ids_pooled_spans_and_embeddings_are_llm2vecs(built, family) -> None:
    model, processor = built[family]
    recorded, captions = load_file(LLM2VEC / f"{family}.safetensors"), read_captions()[0]
    num_prefix = len(model.config.prompt_prefix_ids)
    for row, caption in enumerate(captions):
        ids = processor.tokenizer(caption)["input_ids"]
        assert ids == real_ids(recorded, row, "")
        assert len(ids) - num_prefix == int(recorded["embed_mask"][row].sum())
    found = encode(model, processor, captions)
    wanted = recorded[f"caption_embeds{BIDIRECTIONAL.get(family, '')}"]
    assert smallest_cosine(found, wanted) >= LEAST_COSINE
    # Sums of float32 in another order, over two layers, of embeddings of length 6.
    assert float((found - wanted).abs().max()) <= 1e-5


@every_family
def test_an_instruction_is_attended_to_and_not_pooled_as_in_llm2vec(built, family) -> None:
    model, processor = built[family]
    recorded = load_file(LLM2VEC / f"{family}.safetensors")
    captions, instruction = read_captions()
    texts = [instruction + caption for caption in captions]
    name = "_with_instruction"
    alone = len(processor.tokenizer(instruction)["input_ids"])  # as sentence-transformers counts
    num_unpooled = alone - len(model.config.prompt_suffix_ids)
    longer = []
    for row, text in enumerate(texts):
        ids = processor.tokenizer(text)["input_ids"]
        assert ids == real_ids(recorded, row, name)
        span = int(recorded[f"embed_mask{name}"][row].sum())
        longer.append(len(ids) - num_unpooled - span)
    # LLM2Vec counts the caption's tokens without the space in front of it. Where that changes
    # them, its span is shorter by what the space added: it begins inside the caption.
    assert min(longer) == 0 and longer.count(0) > len(captions) // 2
    measured = alone - model.config.prompt_suffix_ends_special
    found = torch.cat(
        [
            encode(model, processor, [text], prompt_length=measured + extra)
            for text, extra in zip(texts, longer, strict=True)
        ]
    )
    wanted = recorded[f"caption_embeds{name}{BIDIRECTIONAL.get(family, '')}"]
    assert smallest_cosine(found, wanted) >= LEAST_COSINE
    assert smallest_cosine(found, recorded["caption_embeds"]) < LEAST_COSINE  # it matters


def test_a_lora_folder_of_llm2vec_is_merged_into_its_base(vision) -> None:
    config = BuildConfig(prompt="llama-3", lora=LLM2VEC / "llama_lora")
    model, processor = build(vision, LLM2VEC / "llama", config)
    found = encode(model, processor, read_captions()[0])
    wanted = load_file(LLM2VEC / "llama.safetensors")["caption_embeds_with_lora"]
    assert smallest_cosine(found, wanted) >= LEAST_COSINE


def test_qwen2_is_causal_in_llm2vec_and_not_here(vision, built) -> None:
    recorded, captions = load_file(LLM2VEC / "qwen2.safetensors"), read_captions()[0]
    causal = BuildConfig(prompt="chatml", bidirectional=False)
    as_theirs = encode(*build(vision, LLM2VEC / "qwen2", causal), captions)
    assert smallest_cosine(as_theirs, recorded["caption_embeds"]) >= LEAST_COSINE
    found = encode(*built["qwen2"], captions)
    assert smallest_cosine(found, recorded["caption_embeds"]) < LEAST_COSINE


def test_texts_that_llm2vec_empties_or_cuts_off_are_whole_here(built) -> None:
    model, processor = built["llama"]
    recorded = load_file(LLM2VEC / "llama.safetensors")
    with pytest.warns(UserWarning, match="A text is blank"):
        processor(text=[""])
    assert torch.isfinite(recorded["empty"]).all()  # LLM2Vec says nothing
    # A long text keeps its end.
    text = "a dog sits on a mat by the window, " * 6
    inputs = processor(text=[text], text_kwargs={"max_length": 48})
    suffix = model.config.prompt_suffix_ids
    assert inputs["input_ids"][0, -len(suffix) :].tolist() == suffix
    with torch.inference_mode():
        embeds = model.get_caption_embeds(**inputs)
    assert smallest_cosine(embeds, recorded["truncated"]) < LEAST_COSINE
    # A text without spaces keeps its tokens.
    assert torch.equal(recorded["without_spaces"], recorded["empty"])  # LLM2Vec saw no text
    embeds = encode(model, processor, ["一只猫在窗台上睡觉" * 3])
    assert smallest_cosine(embeds, recorded["without_spaces"]) < 0.99


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pooling_mode", "weighted_mean"),
        ("pooling_mode", []),
        ("skip_instruction", False),
        ("max_length", None),
    ],
)
def test_settings_that_would_give_other_embeddings_are_refused(
    vision, tmp_path, name, value
) -> None:
    folder = Path(shutil.copytree(LLM2VEC / "llama", tmp_path / "llama"))
    edit_json("llm2vec_config.json", lambda content: content.update({name: value}))(folder)
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}")):
        build_model(vision, folder, tmp_path / "model", BuildConfig(prompt="llama-3"))


def test_the_command_keeps_pooling_and_length_unless_others_are_chosen(
    vision, tmp_path, capsys
) -> None:
    command = ["build", str(vision), str(LLM2VEC / "qwen2"), "--prompt", "chatml"]
    assert main([*command, str(tmp_path / "model")]) == 0
    assert "Align the model before use" in capsys.readouterr().out
    config = LLM2CLIPConfig.from_pretrained(tmp_path / "model")
    assert (config.max_text_length, config.text_pooling) == (200, "mean")
    assert main(["doctor", str(tmp_path / "model")]) == 0
    others = ["--max-text-length", "64", "--text-pooling", "last_token"]
    assert main([*command, str(tmp_path / "other"), *others]) == 0
    config = LLM2CLIPConfig.from_pretrained(tmp_path / "other")
    assert (config.max_text_length, config.text_pooling) == (64, "last_token")


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2_FOLDER.is_dir(), reason="SmolLM2 is not in the cache")
def test_smollm2_gives_the_embeddings_that_llm2vec_gives(vision) -> None:
    config = BuildConfig(prompt="chatml", max_text_length=512)
    model, processor = join_towers(vision, SMOLLM2_FOLDER, config)
    found = encode(model, processor, read_captions()[0])
    recorded = load_file(LLM2VEC / "smollm2.safetensors")
    assert smallest_cosine(found, recorded["caption_embeds"]) >= LEAST_COSINE
