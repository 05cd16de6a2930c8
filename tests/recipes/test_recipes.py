"""`train` accepts every recipe in `examples/recipes/`, and each states its sources."""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from sentence_transformers import SentenceTransformer
from tiny_embedders import tiny_embedder

from modeling_llm2clip.configs.config_fields import make_config, read_config, read_yaml
from modeling_llm2clip.configs.train_config import TrainConfig
from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.doctor.check_model import check_model
from modeling_llm2clip.encoding.encode import encode_texts
from modeling_llm2clip.evaluation.datasets.dataset_registry import resolve_dataset
from modeling_llm2clip.modeling_llm2clip import LLM2CLIPModel
from modeling_llm2clip.processing_llm2clip import LLM2CLIPProcessor
from modeling_llm2clip.recipes.recipe_plan import plan_recipe
from modeling_llm2clip.recipes.train import check_recipe, train
from modeling_llm2clip.training.run_folder import read_results

FILES = sorted((Path(__file__).parents[2] / "examples" / "recipes").glob("*.yaml"))
RECORDS = [
    CaptionedImage(None, f"{n}.jpg", f"{n}", (f"image {n}",), (f"a long text on image {n}",))
    for n in range(4200)
]
# Peak FLOPS of an A100 in bfloat16, times the utilization that the planner expects.
A100 = 0.4 * 312e12
CC15M = 2_873_538 + 10_000_225
PASSES = {"stage 1": 3, "stage 3": 4}  # both recompute activations


@dataclass(frozen=True)
class Published:
    """Numbers behind the estimates: images, tower weights, tokens per image, embedding width."""

    num_images: float
    vision: float
    tokens: int
    text: float
    width: int


PAPER = {
    "openai-b16": Published(CC15M, 85_799_424, 197, 8.03e9, 4096),
    "openai-l14-336": Published(CC15M, 303_507_456, 577, 8.03e9, 4096),
    "eva02-l14-336": Published(CC15M, 303_645_632, 577, 8.03e9, 4096),
    "eva02-l14-336-llama-1b": Published(CC15M, 303_645_632, 577, 1.236e9, 2048),
    "siglip2-so400m": Published(60e6, 427_680_704, 256, 8.03e9, 4096),
    "proclip-l14": Published(30e6, 303_179_776, 257, 8.03e9, 4096),
}


def read_header(file: Path) -> str:
    """Read the comment at the top of a file as one line."""
    lines = file.read_text("utf-8").split("\n\n")[0].splitlines()
    assert all(line.startswith("#") for line in lines)
    return " ".join(line.removeprefix("#").strip() for line in lines)


def test_every_published_run_has_a_recipe() -> None:
    assert {file.stem for file in FILES} == {"embedded", "locked-embedder", *PAPER}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
@pytest.mark.usefixtures("own_cache")
def test_a_recipe_is_planned_and_checked_without_a_network(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the evaluation datasets are missing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    config = read_config(file, TrainConfig)
    names = [stage.name for stage in plan_recipe(config, (RECORDS, [])).stages]
    assert names[0] == "build" and {"extract text", "align", "export", "doctor"} <= set(names)
    assert ("finetune-llm" in names) == (file.stem in PAPER)
    assert ("extract teacher" in names) == (file.stem == "proclip-l14")
    assert ("evaluate" in names) == bool(config.eval_datasets)
    for tower in {config.vision_model, config.text_model}:  # as if they were downloaded
        folder = repo_folder_name(repo_id=tower, repo_type="model")
        (tmp_path / "cache" / folder / "snapshots").mkdir(parents=True)
    for dataset in config.eval_datasets:
        assert resolve_dataset(dataset)[0].dataset_type == "retrieval"
    missing = pytest.raises(ValueError, match=r"(?m)^flickr30k: data/flickr30k does not exist\.")
    with missing if config.eval_datasets else nullcontext():
        check_recipe(config, (RECORDS, []))
    assert not config.output.exists()


@pytest.mark.parametrize("name", PAPER)
def test_a_run_of_the_paper_has_its_settings(name: str) -> None:
    config = read_config(FILES[0].with_name(f"{name}.yaml"), TrainConfig)
    finetune, align, build = config.finetune, config.align, config.build
    assert finetune is not None
    assert (finetune.learning_rate, finetune.warmup_steps, finetune.scale) == (2e-4, 300, 50)
    assert (finetune.lora_rank, finetune.max_steps) == (16, 10_000)
    assert (align.learning_rate, align.weight_decay, align.max_grad_norm) == (1e-5, 0.05, 5)
    assert (align.global_batch_size, align.num_train_epochs, align.warmup_steps) == (4096, 4, 0)
    is_siglip = name.startswith("siglip2")
    assert align.layer_decay == (1 if is_siglip else 0.85) and align.vision_training == "full"
    assert (build.prompt, build.max_text_length) == ("llama-3", 512)
    if name == "proclip-l14":
        assert config.inherit and build.keep_projection and align.distillation_weight == 1
        assert align.keep_texts and align.keep_weight == 10
    else:
        assert build.projection_dim == (1152 if is_siglip else 1280)
        assert build.visual_projection_bias is not name.startswith("openai")
    assert build.normalize_text_before_adapter is not is_siglip
    # The paper does not use the regularization for small datasets.
    assert align.caption_noise == 0 and align.held_out_ratio == 0 and config.test_size == 0


@pytest.mark.parametrize("name", PAPER)
def test_a_run_of_the_paper_states_source_cost_and_deviations(name: str) -> None:
    """The hours and sizes follow from the stated numbers by the planner's formula."""
    file = FILES[0].with_name(f"{name}.yaml")
    header, paper = read_header(file), PAPER[name]
    config = read_config(file, TrainConfig)
    assert "arXiv:2411.04997v6" in header and "microsoft/LLM2CLIP at cba3b45" in header
    assert "Differs from upstream: -" in header
    assert f"An image has {paper.tokens} tokens" in header
    assert config.finetune is not None and config.finetune.max_steps is not None
    assert config.align.num_train_epochs is not None
    tuned = 2 * 512 * config.finetune.max_steps * (30 + 110) / 2
    shown = config.align.num_train_epochs * paper.num_images * paper.tokens
    flops = (
        2 * PASSES["stage 1"] * paper.text * tuned,
        2 * paper.text * paper.num_images * (30 + 110),
        2 * PASSES["stage 3"] * paper.vision * shown,
    )
    hours = " ".join(f"{f / A100 / 3600:,.0f}" for f in flops)
    pattern = r"about (\S+) for stage 1, (\S+) for the caption store and (\S+) for stage 3\."
    stated = re.search(f"computed, not measured: {pattern}", header)
    assert stated and " ".join(stated.groups()) == hours
    store = paper.num_images * 2 * paper.width * 2 / 1e9
    assert f"Disk, computed: {store:,.0f} GB for the embeddings of two captions" in header
    model = (paper.vision + paper.text) * 2 / 1e9
    assert f"{model:,.{0 if model > 9 else 1}f} GB for each of four models" in header


@pytest.mark.slow
def test_images_are_trained_to_match_a_locked_embedder(sources: Path, tmp_path: Path) -> None:
    """The recipe is unchanged except for its towers, data and number of steps."""
    source = tiny_embedder(tmp_path, "Qwen3-Embedding")
    recipe = read_yaml(FILES[0].with_name("locked-embedder.yaml")) | {
        "vision_model": str(sources / "vision"), "text_model": str(source),
        "data": str(sources / "data"), "output": str(tmp_path / "run"), "device": "cpu",
    }  # fmt: skip
    recipe["align"] |= {"max_steps": 6, "global_batch_size": 4}
    config = make_config(TrainConfig, recipe)
    folder = train(config, report=lambda _: None)
    assert check_model(folder, device="cpu", text_like=config.output / "built").healthy
    assert not read_results(config.output / "aligned")["held_out"]["maybe_trained_on"]
    texts = ["a dog", "two red apples on a wooden table"]
    before, after = (
        LLM2CLIPModel.from_pretrained(f).eval() for f in (config.output / "built", folder)
    )
    processor = LLM2CLIPProcessor.from_pretrained(folder)
    found = encode_texts(after, processor, texts)
    assert torch.equal(found, encode_texts(before, processor, texts))
    library = SentenceTransformer(str(source), device="cpu")
    # Float32 sums in another order, for embeddings of unit length.
    wanted = library.encode(texts, convert_to_tensor=True).clone()
    assert float((found - wanted).norm(dim=-1).max()) < 1e-6
    moved = [n for n, w in before.state_dict().items() if not torch.equal(w, after.state_dict()[n])]
    assert {name.split(".")[0] for name in moved} == {
        "vision_model", "visual_projection", "logit_scale",
    }  # fmt: skip
