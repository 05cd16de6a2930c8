"""`train` accepts every recipe in `examples/recipes/`, and those of papers state their sources."""

from __future__ import annotations

import json
import math
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from captioned_files import write_shard
from downloads import IMAGES, describe_rows
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from sentence_transformers import SentenceTransformer
from tiny_embedders import tiny_embedder
from tiny_folders import save_tiny_llm, save_tiny_vision

from modeling_llm2clip.__main__ import main
from modeling_llm2clip.configs.build_config import list_vision_sources
from modeling_llm2clip.configs.config_fields import make_config, read_config, read_yaml
from modeling_llm2clip.configs.train_config import TrainConfig
from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.doctor.check_model import check_model
from modeling_llm2clip.encoding.encode import encode_texts
from modeling_llm2clip.evaluation.datasets.dataset_registry import parse_dataset, resolve_dataset
from modeling_llm2clip.modeling_llm2clip import LLM2CLIPModel
from modeling_llm2clip.processing_llm2clip import LLM2CLIPProcessor
from modeling_llm2clip.recipes.recipe_plan import plan_recipe
from modeling_llm2clip.recipes.train import check_recipe, train
from modeling_llm2clip.training.run_folder import read_results

ROOT = Path(__file__).parents[2] / "examples" / "recipes"
BASE = ROOT / "paper" / "base.yaml"
RUNS = sorted(file for file in BASE.parent.glob("*.yaml") if file != BASE)
OTHERS = sorted(ROOT.glob("*.yaml"))
PROCLIP = ROOT / "proclip-l14.yaml"
RECORDS = [
    CaptionedImage(None, f"{n}.jpg", f"{n}", (f"image {n}",), (f"a long text on image {n}",))
    for n in range(4200)
]
# Peak FLOPS of an A100 in bfloat16, times the utilization that the planner expects.
A100 = 0.4 * 312e12


def read_header(file: Path) -> str:
    """Read the comment at the top of a file as one line."""
    lines = file.read_text("utf-8").split("\n\n")[0].splitlines()
    assert all(line.startswith("#") for line in lines)
    return " ".join(line.removeprefix("#").strip() for line in lines)


def list_sizes(tower: str) -> set[str]:
    """Sizes of the training data of a tower's runs."""
    names = [file.stem.rsplit("-", 1) for file in RUNS]
    return {size for name, size in names if name == tower}


def test_every_row_of_the_paper_has_a_recipe() -> None:
    assert {file.stem for file in OTHERS} == {
        "clip-dinov2", "embedded", "locked-embedder", "proclip-l14",
    }  # fmt: skip
    # Table 1.
    for tower in ("openai-b16", "openai-l14", "openai-l14-336", "eva02-b16", "eva02-l14-336"):
        assert "15m" in list_sizes(tower)
    for tower in ("openai-l14-336", "eva02-l14-336", "siglip2-so400m"):
        assert "60m" in list_sizes(tower)
    assert list_sizes("eva02-l14") == {"3m", "15m", "60m"}
    assert list_sizes("openai-l14-llama-1b") == {"3m"} <= list_sizes("openai-l14")
    assert list_sizes("eva02-l14-336-llama-1b") == {"15m"}


@pytest.mark.parametrize("file", [*RUNS, *OTHERS], ids=lambda file: file.stem)
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
    is_of_a_paper = file in (*RUNS, PROCLIP)
    assert ("finetune-llm" in names) == is_of_a_paper
    assert ("extract teacher" in names) == (file == PROCLIP)
    assert ("evaluate" in names) == bool(config.eval_datasets) == is_of_a_paper
    towers = {*list_vision_sources(config.vision_model), config.text_model}
    for tower in towers:  # as if they were downloaded
        folder = repo_folder_name(repo_id=tower, repo_type="model")
        (tmp_path / "cache" / folder / "snapshots").mkdir(parents=True)
    for dataset in config.eval_datasets:
        assert resolve_dataset(dataset)[0].dataset_type == "retrieval"
    missing = pytest.raises(ValueError, match=r"(?m)^flickr30k: data/flickr30k does not exist\.")
    with missing if config.eval_datasets else nullcontext():
        check_recipe(config, (RECORDS, []))
    assert not config.output.exists()


def write_published_shards(folder: Path) -> Path:
    """Write shards with the seven captions that upstream's script downloads, and their list."""
    for dataset in ("cc3m", "cc12m"):
        members: dict[str, bytes] = {}
        for number in range(30):
            name = f"{number:09d}"
            fields = describe_rows()[0] | {
                f"{length}{source}_captions": f"{length} {source} of {dataset} {number}"
                for length in ("short", "long")
                for source in ("IB", "SV", "LLA")
            }
            members |= {f"{name}.jpg": IMAGES[0] or b"", f"{name}.txt": b"a caption"}
            members[f"{name}.json"] = json.dumps(fields).encode()
        write_shard(folder / dataset / "00000.tar", members)
    (folder / "15m.txt").write_text(f"{folder}/cc3m/*.tar\n{folder}/cc12m/*.tar\n")
    return folder / "15m.txt"


@pytest.mark.usefixtures("own_cache")
def test_a_dry_run_counts_two_of_the_seven_captions_of_the_published_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a recipe of the reader's own, which takes the paper's settings from its base."""
    recipe = tmp_path / "own.yaml"
    recipe.write_text(
        f"base: {BASE}\nvision_model: {save_tiny_vision(tmp_path / 'vision')}\n"
        f"text_model: {save_tiny_llm(tmp_path / 'llm')}\n"
        f"data: {write_published_shards(tmp_path)}\noutput: {tmp_path / 'run'}\n"
        "finetune: {per_device_train_batch_size: 4}\nalign: {global_batch_size: 8}\n"
        "eval_datasets: []\neval_tasks: []\n"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["train", str(recipe), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "60 images to train on, 0 to evaluate on." in shown and "| 120 captions " in shown
    # 60 images without 12 held-out ones, in 4 epochs.
    assert "| 10000 steps of 4 pairs " in shown.replace("10,000", "10000")
    assert "| 24 steps of 8 images, vision tower full " in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("file", RUNS, ids=lambda file: file.stem)
def test_a_run_of_the_paper_adds_only_its_towers_and_data(file: Path) -> None:
    own = read_yaml(file)
    assert set(own) <= {"base", "vision_model", "text_model", "data", "output", "build", "align"}
    tower, _, size = file.stem.rpartition("-")
    assert (own["base"], own["output"]) == ("base.yaml", f"runs/{file.stem}")
    assert own["data"] == f"data/{size}.txt"
    assert ("Llama-3.2-1B" in own.get("text_model", "")) == tower.endswith("llama-1b")
    assert own["vision_model"].startswith(
        {"openai": "openai/clip-vit-", "eva02": "timm/eva02_", "siglip2": "google/siglip2-so400m"}[
            tower.split("-")[0]
        ]
    )
    assert "LLM2CLIP, arXiv:2411.04997v6" in read_header(file)


@pytest.mark.parametrize("file", [*RUNS, PROCLIP], ids=lambda file: file.stem)
def test_a_run_of_the_paper_has_its_settings(file: Path) -> None:
    config = read_config(file, TrainConfig)
    finetune, align, build = config.finetune, config.align, config.build
    assert finetune is not None
    assert (finetune.learning_rate, finetune.warmup_steps, finetune.scale) == (2e-4, 300, 50)
    assert (finetune.lora_rank, finetune.max_steps) == (16, 10_000)
    assert (align.learning_rate, align.weight_decay, align.max_grad_norm) == (1e-5, 0.05, 5)
    assert (align.global_batch_size, align.num_train_epochs, align.warmup_steps) == (4096, 4, 0)
    assert (align.beta2, align.min_crop_area) == (0.999, 0.9)
    is_siglip = file.stem.startswith("siglip2")
    assert align.layer_decay == (1 if is_siglip else 0.85) and align.vision_training == "full"
    assert (build.prompt, build.max_text_length) == ("llama-3", 512)
    assert config.caption_fields == ("shortSV_captions", "longSV_captions")
    if file == PROCLIP:
        assert config.inherit and build.keep_projection and align.distillation_weight == 1
        assert align.keep_texts and align.keep_weight == 10
    else:
        assert build.projection_dim == (1152 if is_siglip else 1280)
        assert build.visual_projection_bias is not file.stem.startswith("openai")
        assert build.normalization == "openai"
    assert build.normalize_text_before_adapter is not is_siglip
    # A learning rate of 1e-5 leaves the temperature of an untrained model where it starts.
    assert build.logit_scale_init_value == (None if is_siglip else pytest.approx(math.log(100)))
    # The paper does not use the regularization for small datasets.
    assert align.caption_noise == 0 and config.test_size == 0


@pytest.mark.parametrize("file", [*RUNS, PROCLIP], ids=lambda file: file.stem)
def test_a_run_of_the_paper_shows_scores_but_trains_to_its_last_step(file: Path) -> None:
    config = read_config(file, TrainConfig)
    assert 0 < config.align.held_out_ratio < 0.01 and config.align.choose_by == "last_step"
    names = [parse_dataset(written).name for written in config.eval_datasets]
    assert {"flickr30k", "coco", "sharegpt4v-1k", "urban1k", "docci"} <= set(names)  # table 1
    assert {"flickr30k-cn", "coco-cn", "xm3600"} <= set(names)
    # The only task that takes both a dataset in one language and one in 36.
    assert config.eval_tasks == ("cross-lingual",)


def test_the_shared_settings_state_their_source_and_deviations() -> None:
    header = read_header(BASE)
    assert "arXiv:2411.04997v6" in header and "microsoft/LLM2CLIP at cba3b45" in header
    assert "Differs from upstream:" in header
    assert set(read_yaml(BASE)).isdisjoint({"vision_model", "data", "output"})


def test_the_hours_of_proclip_follow_from_its_numbers() -> None:
    """By the planner's formula: 2 operations per weight, token and pass."""
    header, config = read_header(PROCLIP), read_config(PROCLIP, TrainConfig)
    assert "Differs from upstream: -" in header and "An image has 257 tokens" in header
    assert config.finetune is not None and config.finetune.max_steps is not None
    assert config.align.num_train_epochs is not None
    images, vision, text = 30e6, 303_179_776, 8.03e9
    # Three and four passes, because both recompute activations.
    flops = (
        2 * 3 * text * 2 * 512 * config.finetune.max_steps * (30 + 110) / 2,
        2 * text * images * (30 + 110),
        2 * 4 * vision * config.align.num_train_epochs * images * 257,
    )
    hours = " ".join(f"{f / A100 / 3600:,.0f}" for f in flops)
    pattern = r"about (\S+) for stage 1, (\S+) for the caption store and (\S+) for stage 3\."
    stated = re.search(f"computed, not measured: {pattern}", header)
    assert stated and " ".join(stated.groups()) == hours
    assert f"Disk, computed: {images * 2 * 4096 * 2 / 1e9:,.0f} GB for the embeddings" in header
    assert f"{(vision + text) * 2 / 1e9:,.0f} GB for each of four models" in header


@pytest.mark.slow
def test_images_are_trained_to_match_a_locked_embedder(sources: Path, tmp_path: Path) -> None:
    """The recipe is unchanged except for its towers, data and number of steps."""
    source = tiny_embedder(tmp_path, "Qwen3-Embedding")
    recipe = read_yaml(ROOT / "locked-embedder.yaml") | {
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
