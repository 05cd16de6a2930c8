"""Tiny towers and models as folders, for tests of commands, documents and notebooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny import tiny_llm, tiny_model, tiny_tokenizer, tiny_vision

from modeling_llm2clip.model_folders.model_writing import save_model


def save_tiny_vision(folder: Path) -> Path:
    """Save a vision tower with its image processor, as a Hub repository holds them."""
    model, image_processor = tiny_vision()
    model.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    return folder


def save_tiny_llm(folder: Path) -> Path:
    """Save a decoder with its tokenizer."""
    tokenizer = tiny_tokenizer()
    tiny_llm(vocabulary_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def export_tiny_model(folder: Path, **settings: Any) -> Path:
    """Export a model with room for labels in sentences, whose tokens are almost single bytes."""
    model, processor = tiny_model(max_text_length=128, **settings)
    return save_model(model, processor, folder)
