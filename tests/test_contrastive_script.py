"""A model that transformers' example script for CLIP trains and saves can be loaded again.

The script loads tokenizer, image processor and model with Auto classes, reads image size, mean and
std itself, trains with `Trainer`, and saves model, tokenizer and image processor one by one.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from shared_models import shared_model
from tiny import draw_noise, tiny_model
from torchvision.transforms import CenterCrop, ConvertImageDtype, Normalize, Resize
from torchvision.transforms.functional import pil_to_tensor
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

from modeling_llm2clip.model_folders.model_writing import save_model

FAMILIES = ("clip", "siglip", "timm with batch norm")
TEXTS = ["a dog", "a red car", "two red apples", "a cat sleeps"]
# Importing the package raises, so only the code in the folders is used.
LOAD = """
import sys
sys.modules["modeling_llm2clip"] = None
import torch
from transformers import AutoModel, AutoProcessor
for folder in sys.argv[1:]:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    wanted = torch.load(f"{folder}/wanted.pt")
    with torch.no_grad():
        output = model(**wanted["batch"])
    # Equal weights at other memory addresses, whose alignment selects other kernels.
    for name in ("text_embeds", "image_embeds"):
        torch.testing.assert_close(output[name], wanted[name], atol=1e-6, rtol=0)
    ids = processor(text=wanted["texts"])
    assert torch.equal(ids["input_ids"], wanted["ids"]), folder
    assert type(processor).__name__ == "LLM2CLIPProcessor"
    print(processor.max_text_length)
"""


def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    names = ("pixel_values", "input_ids", "attention_mask")
    batch = {name: torch.stack([example[name] for example in examples]) for name in names}
    return {**batch, "return_loss": True}


def train_as_the_script_does(source: Path, output: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source)
    image_processor = AutoImageProcessor.from_pretrained(source)
    model = AutoModel.from_pretrained(source)
    size = model.config.vision_config.image_size
    transform = torch.jit.script(
        torch.nn.Sequential(
            Resize([size]),
            CenterCrop(size),
            ConvertImageDtype(torch.float),
            Normalize(image_processor.image_mean, image_processor.image_std),
        )
    )
    model.vision_model.requires_grad_(False)
    texts = tokenizer(
        TEXTS, max_length=24, padding="max_length", truncation=True, return_tensors="pt"
    )
    images = [transform(pil_to_tensor(draw_noise(40, 48, seed=seed))) for seed in range(4)]
    dataset = [
        {"pixel_values": i, "input_ids": t, "attention_mask": m}
        for i, t, m in zip(images, texts.input_ids, texts.attention_mask, strict=True)
    ]
    arguments = TrainingArguments(
        str(output), max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        remove_unused_columns=False, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=arguments, train_dataset=dataset, eval_dataset=dataset,
        data_collator=collate,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    tokenizer.save_pretrained(output)
    image_processor.save_pretrained(output)
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.create_model_card()
    batch = {name: value for name, value in collate(dataset).items() if name != "return_loss"}
    with torch.no_grad():
        found = model.eval()(**batch)
    wanted = {
        "batch": batch,
        "text_embeds": found.text_embeds,
        "image_embeds": found.image_embeds,
        "texts": TEXTS,
        "ids": AutoProcessor.from_pretrained(source)(text=TEXTS)["input_ids"],
    }
    torch.save(wanted, output / "wanted.pt")


@pytest.mark.slow
def test_models_that_the_script_saves_load_in_a_clean_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = []
    for number, family in enumerate(FAMILIES):
        source = save_model(*tiny_model(family), tmp_path / f"source{number}")
        outputs.append(tmp_path / f"output{number}")
        train_as_the_script_does(source, outputs[-1])
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *map(str, outputs)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["32"] * len(FAMILIES)


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """A folder to which model, tokenizer and image processor were saved one by one."""
    model, processor = shared_model()
    model.save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    processor.image_processor.save_pretrained(tmp_path)
    assert not (tmp_path / "processor_config.json").exists()
    return tmp_path


def test_a_saved_folder_contains_every_module_that_its_config_names(parts: Path) -> None:
    auto_map = AutoModel.from_pretrained(parts).config.auto_map
    assert auto_map["AutoProcessor"] == "processing_llm2clip.LLM2CLIPProcessor"
    assert [
        name for name in auto_map.values() if not (parts / f"{name.split('.')[0]}.py").is_file()
    ] == []


def test_a_processor_saved_in_parts_has_the_maximum_length_of_the_model(parts: Path) -> None:
    processor = AutoProcessor.from_pretrained(parts)
    assert processor.max_text_length == shared_model()[0].config.max_text_length == 32


def test_a_processor_saved_in_parts_without_a_model_is_rejected(parts: Path) -> None:
    (parts / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match="lacks max_text_length, which has no default"):
        type(shared_model()[1]).from_pretrained(parts)
