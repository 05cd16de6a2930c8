"""Which weight files load, and that everything else reads the same; no network outgrows them."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from breaking import edit_json
from peft import LoraConfig, get_peft_model
from peft.utils import save_and_load
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from shared_models import mostly_slow, shared_batch
from tiny import tiny_model, tiny_vision
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModel

from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel
from modeling_llm2clip.doctor.check_model import check_model
from modeling_llm2clip.loading_llm2clip import (
    list_weight_files,
    load_without_code,
    naming_fields,
    read_weight_shapes,
)
from modeling_llm2clip.model_folders.fingerprint import (
    fingerprint_embeddings,
    fingerprint_model,
    fingerprint_text,
    fingerprint_vision,
)
from modeling_llm2clip.model_folders.model_loading import load_model, load_partial_model
from modeling_llm2clip.model_folders.model_writing import open_model

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def write_shards(folder: Path) -> None:
    for number, shard in enumerate(SHARDS):
        save_file({f"weight.{number}": torch.ones(2)}, folder / shard)
    write_index(folder, {f"weight.{number}": shard for number, shard in enumerate(SHARDS)})


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


def write_file(folder: Path, name: str = FILE) -> None:
    save_file({"weight": torch.ones(2)}, folder / name)


# Which files


def test_a_file_or_the_shards_of_an_index_are_listed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no weights: none of model\.safetensors"):
        list_weight_files(tmp_path)
    write_shards(tmp_path)
    assert list_weight_files(tmp_path) == [tmp_path / shard for shard in SHARDS]
    assert list_weight_files(tmp_path / SHARDS[0]) == [tmp_path / SHARDS[0]]
    (tmp_path / SHARDS[1]).unlink()
    with pytest.raises(ValueError, match=r"lacks the weight files \['model-00002-of-00002"):
        list_weight_files(tmp_path)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        *((text, r"index\.json is damaged")
          for text in ("{", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}')),
        ('{"weight_map": {}}', "no files"),
    ],
)  # fmt: skip
def test_a_damaged_index_is_named(content: str, error: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(ValueError, match=error):
        list_weight_files(tmp_path)


def test_names_are_looked_for_in_the_order_of_transformers(tmp_path: Path) -> None:
    names = (FILE, "pytorch_model.bin")
    (tmp_path / "pytorch_model.bin").touch()
    assert list_weight_files(tmp_path, names=names) == [tmp_path / "pytorch_model.bin"]
    write_file(tmp_path)
    assert list_weight_files(tmp_path, names=names) == [tmp_path / FILE]
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / "pytorch_model.bin.index.json").write_text("{")  # transformers does not read it
    assert list_weight_files(tmp_path, names=names) == [tmp_path / FILE]


def test_a_shard_that_the_index_does_not_name_is_not_read(tmp_path: Path) -> None:
    write_shards(tmp_path)
    write_index(tmp_path, {"weight.0": SHARDS[0]})
    assert list_weight_files(tmp_path) == [tmp_path / SHARDS[0]]  # as transformers reads them


@pytest.mark.parametrize("name", ["../other.safetensors", "/other.safetensors", "sub/a.safetensors",
                                  "..\\\\other.safetensors", "..", ""])  # fmt: skip
def test_an_index_that_names_a_file_elsewhere_is_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    write_file(tmp_path, "other.safetensors")
    write_file(folder / "sub", "a.safetensors")
    write_shards(folder)
    write_index(folder, {"weight.0": SHARDS[0], "weight.1": SHARDS[1], "weight": name})
    with pytest.raises(ValueError, match="files in its own folder"):
        list_weight_files(folder)


@pytest.mark.parametrize(
    "reason",
    ["DefaultCPUAllocator: can't allocate memory", "Found no NVIDIA driver on your system"],
)
def test_an_error_of_the_machine_blames_no_file(reason: str) -> None:
    with pytest.raises(RuntimeError, match=reason), naming_fields("model"):
        raise RuntimeError(reason)


def test_weights_that_would_run_code_are_refused_as_such(tmp_path: Path) -> None:
    tiny_vision()[0].save_pretrained(tmp_path)
    weights = load_file(tmp_path / FILE)
    (tmp_path / FILE).unlink()
    file = tmp_path / "pytorch_model.bin"
    torch.save(weights, file)
    assert load_without_code(AutoModel, tmp_path)
    torch.save({**weights, "arguments": Random(0)}, file)
    with pytest.raises(ValueError, match=f"{tmp_path}: a weight file that is not safetensors"):
        load_without_code(AutoModel, tmp_path)


def test_a_weight_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        write_file(tmp_path, name)
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    assert read_weight_shapes(files[:1]) == {"weight": ((2,), "F32")}
    with pytest.raises(ValueError, match=r"b\.safetensors repeats the weights \['weight'\]"):
        read_weight_shapes(files)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a saved model, which no test may change."""
    path = tmp_path_factory.mktemp("model")
    model, processor = tiny_model()
    model.save_pretrained(path)
    processor.save_pretrained(path)
    check_model(path, device="cpu")  # imports what else would count as built
    return path


def change_config(folder: Path, target: Path, change: dict[str, Any]) -> Path:
    """Copy a folder, with other values of dotted fields of its `config.json`."""

    def apply(config: dict[str, Any]) -> None:
        for field, value in change.items():
            *above, last = field.split(".")
            (config[above[0]] if above else config)[last] = value

    copied = Path(shutil.copytree(folder, target))
    edit_json("config.json", apply)(copied)
    return copied


# What loads nowhere


def test_two_layouts_of_weights_load_nowhere(folder: Path, tmp_path: Path) -> None:
    both = Path(shutil.copytree(folder, tmp_path / "both"))
    LLM2CLIPModel.from_pretrained(folder).save_pretrained(
        tmp_path / "shards", max_shard_size="50KB"
    )
    for file in (tmp_path / "shards").glob("model*"):
        shutil.copy(file, both)
    for load in (
        LLM2CLIPModel.from_pretrained,
        LLM2CLIPTextModel.from_pretrained,
        AutoModel.from_pretrained,
        lambda source: SentenceTransformer(str(source), device="cpu"),
        load_model,
        load_partial_model,
        open_model,
        fingerprint_model,
        fingerprint_text,
        fingerprint_vision,
        lambda source: fingerprint_embeddings(source, "image"),
    ):
        with pytest.raises(ValueError, match=r"twice: in model\.safetensors and .* Delete model"):
            load(both)
    report = check_model(both, device="cpu")
    assert {c.name for c in report.failed} >= {"finite weights", "weight dtype", "weights"}


def test_an_index_that_names_a_file_of_another_folder_loads_nowhere(
    folder: Path, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "copied"))
    moved = (copied / "model.safetensors").rename(tmp_path / "other.safetensors")
    weight_map = dict.fromkeys(load_file(moved), "../other.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    for load in (AutoModel.from_pretrained, load_model, open_model, fingerprint_model):
        # AutoModel refuses it with a message of its own from transformers 5.25 on.
        with pytest.raises(ValueError, match=r"in its own folder|outside the model directory"):
            load(copied)
    assert not check_model(copied, device="cpu").healthy


def test_a_lora_beside_the_weights_or_another_file_in_the_configuration_loads_nowhere(
    folder: Path, tmp_path: Path
) -> None:
    with_lora = Path(shutil.copytree(folder, tmp_path / "with-lora"))
    lora = {"peft_type": "LORA", "base_model_name_or_path": str(folder)}
    (with_lora / "adapter_config.json").write_text(json.dumps(lora), encoding="utf-8")
    for load in (AutoModel.from_pretrained, load_model, open_model, fingerprint_model):
        with pytest.raises(ValueError, match=r"adapter_config\.json of a LoRA.* Merge"):
            load(with_lora)
    change = {"transformers_weights": "other.safetensors"}
    renamed = change_config(folder, tmp_path / "renamed", change)
    with pytest.raises(ValueError, match="transformers_weights would load a different"):
        AutoModel.from_pretrained(renamed)


@pytest.mark.skipif(
    not hasattr(save_and_load, "_maybe_shard_state_dict_for_tp"),
    reason="transformers needs peft 0.19 or later to load a LoRA",
)
@pytest.mark.parametrize("load", [AutoModel.from_pretrained, LLM2CLIPModel.from_pretrained])
def test_a_folder_of_a_lora_alone_loads_with_the_model_that_it_names(
    load: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers 5.24 asks for a later peft than the latest one.
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.18.0")
    lora = LoraConfig(target_modules=".*q_proj", init_lora_weights=False)
    trained = get_peft_model(LLM2CLIPModel.from_pretrained(folder), lora)
    trained.save_pretrained(tmp_path)
    batch = shared_batch()
    found = load(tmp_path)(**batch).logits_per_image
    assert torch.equal(found, trained(**batch).logits_per_image)
    assert not torch.equal(found, load(folder)(**batch).logits_per_image)


# Bounds

HUGE = 10**12
OVERSIZED: dict[str, dict[str, Any]] = {
    "labels": {"num_labels": 10**7},
    "labels of a tower": {"vision_config.num_labels": 10**7},
    "labels of the LLM": {"text_config.num_labels": 10**7},
    "layers": {"text_config.num_hidden_layers": 20_000},
    "very many layers": {"text_config.num_hidden_layers": 10**9},
    "layers of the vision tower": {"vision_config.num_hidden_layers": 20_000},
    "width": {"text_config.hidden_size": HUGE},
    "width and text width": {"text_config.hidden_size": HUGE, "text_width": HUGE},
    "text width": {"text_width": HUGE},
    "inner width": {"text_config.intermediate_size": HUGE},
    "width of the vision tower": {"vision_config.hidden_size": HUGE},
    "vocabulary": {"text_config.vocab_size": HUGE},
    "head width": {"text_config.head_dim": HUGE},
    "image size": {"vision_config.image_size": 10**8},
    "patch size": {"vision_config.patch_size": 10**8},
    "adapter layers": {"text_adapter_layers": HUGE},
    "adapter expansion": {"text_adapter_expansion": HUGE},
    "shared space": {"projection_dim": HUGE},
    "text length": {"max_text_length": 10**9},
}


# One of each kind: labels, layers, widths, tables and images.
FIRST_OVERSIZED = {"labels", "very many layers", "width", "vocabulary", "image size"}


@contextmanager
def building_little() -> Iterator[None]:
    """Require that little is built: 20,000 layers, or a dictionary of 10 million labels, are not.

    Of the 78 weights of the folder the bound allows 880 registrations, and what was built until
    then takes 3 MB. The dictionary would take a gigabyte.
    """
    names: list[str] = []
    hook = register_module_parameter_registration_hook(lambda _, name, __: names.append(name))
    tracemalloc.start()
    try:
        yield
        _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        hook.remove()
    assert len(names) < 1_000
    assert most_bytes < 2**25


@pytest.mark.parametrize("part", mostly_slow(OVERSIZED, FIRST_OVERSIZED))
def test_a_configuration_far_beyond_the_weights_is_refused_before_it_is_built(
    part: str, folder: Path, tmp_path: Path
) -> None:
    changed = change_config(folder, tmp_path / "changed", OVERSIZED[part])
    with building_little():
        with pytest.raises(ValueError, match=r"larger model than the weight files|at most"):
            load_model(changed, device="cpu")


# The doctor builds towers by another way; one field of each part shows that it is bounded too.
@pytest.mark.parametrize(
    "part",
    mostly_slow(
        ["labels", "layers", "layers of the vision tower", "adapter expansion", "vocabulary",
         "image size", "text length"],
        {"labels", "layers of the vision tower"},
    ),
)  # fmt: skip
def test_doctor_builds_nothing_oversized(part: str, folder: Path, tmp_path: Path) -> None:
    changed = change_config(folder, tmp_path / "changed", OVERSIZED[part])
    with building_little():
        assert not check_model(changed, device="cpu").healthy
