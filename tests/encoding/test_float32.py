"""What is called float32 is float32: no encoder computes in TF32, on whatever device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from shared_models import CAPTIONS, shared_model
from tiny_encoders import MODEL_TYPES, TEXTS
from torch import nn

from modeling_llm2clip.doctor.check_model import check_model
from modeling_llm2clip.encoding.encode import encode_images, encode_texts
from modeling_llm2clip.encoding.precision import float32_as_such
from modeling_llm2clip.evaluation.encoders.auto import load_encoder
from modeling_llm2clip.model_folders.golden_embeddings import compute_golden


def read_settings() -> tuple[str, str]:
    """Of convolutions and of products, as a program sees them."""
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        return (torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision)
    allowed = torch.backends.cudnn.allow_tf32
    return "tf32" if allowed else "ieee", torch.get_float32_matmul_precision()


@pytest.fixture
def seen() -> Iterator[set[tuple[str, str]]]:
    """The settings in which any layer with weights ran, in a program that likes TF32."""
    noted: set[tuple[str, str]] = set()

    def note(module: nn.Module, _: Any) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear):
            noted.add(read_settings())

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    hook = nn.modules.module.register_module_forward_pre_hook(note)
    usual = read_settings()
    assert "ieee" not in usual
    yield noted
    hook.remove()
    assert read_settings() == usual
    torch.set_float32_matmul_precision(before)


EXACT = {("ieee", "ieee" if hasattr(torch.backends.cuda.matmul, "fp32_precision") else "highest")}


def test_images_and_captions_are_encoded_without_it(
    seen: set[tuple[str, str]], images: list[Path]
) -> None:
    model, processor = shared_model()
    seen.clear()  # of its building
    encode_images(model, processor, images[:2], project=False)
    encode_texts(model, processor, CAPTIONS, project=False)
    assert seen == EXACT


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_every_encoder_is_evaluated_without_it(
    kind: str, models: Any, images: list[Path], seen: set[tuple[str, str]]
) -> None:
    if kind == "open_clip":
        pytest.importorskip("open_clip", reason='needs pip install -e ".[baselines]"')
    encoder = load_encoder(models(kind))
    seen.clear()  # of the model's building
    encoder.encode_texts(TEXTS)
    if kind != "sentence-transformers":
        encoder.encode_images(images, names=[path.name for path in images])
    assert seen == EXACT
    assert encoder.description.run["float32_products"] == "ieee"


def test_a_checkpoint_is_recorded_and_examined_without_it(
    good: Path, seen: set[tuple[str, str]]
) -> None:
    tiny = shared_model()
    seen.clear()  # of its building
    compute_golden(*tiny)
    assert check_model(good).healthy
    assert seen == EXACT


def test_the_program_gets_its_settings_back_when_the_last_pass_ends() -> None:
    usual = read_settings()
    first, second = float32_as_such(), float32_as_such()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert {read_settings()} == EXACT
    second.__exit__(None, None, None)
    assert read_settings() == usual
