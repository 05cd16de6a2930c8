"""Writes a model's vision tower as an ordinary model folder of transformers.

`AutoModel` loads it without this package, and so does whatever is built on a vision tower: a
detector, a classifier, a multimodal LLM. An image processor that crops as torchvision does needs
the code that is saved with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import AutoImageProcessor, PreTrainedModel, PreTrainedTokenizerFast

from ..building.tower_loading import forget_code
from ..loading_llm2clip import load_without_code
from ..model_folders.atomic_folder import atomic_folder, require_new_folder
from ..model_folders.golden_embeddings import require_golden
from ..model_folders.model_folder import find_model_folder
from ..modeling_llm2clip import LLM2CLIPModel, LLM2CLIPVisionModel
from ..processing_llm2clip import LLM2CLIPProcessor

_CARD = """
# {title}

The vision tower of an LLM2CLIP model ([arXiv:2411.04997](https://arxiv.org/abs/2411.04997)), an
ordinary `{architecture}` of transformers: `AutoModel` loads it without any further code.
{processor} It began as {origin}; the license of that applies.
"""
_PLAIN = "`AutoImageProcessor` does so too."
_CROPS = """`AutoImageProcessor` needs `trust_remote_code=True`, or `import modeling_llm2clip`
before: this tower takes images that are cropped as torchvision does, which transformers' own
classes miss by a pixel."""


def export_vision_tower(
    source: str | Path,
    output: str | Path,
    *,
    revision: str | None = None,
    license: str | None = None,
) -> Path:
    """Write the vision tower of an LLM2CLIP model folder; LLM and tokenizer are not read.

    Args:
        source: Folder or Hub id of an LLM2CLIP model.
        output: New or empty folder.
        revision: Branch, tag or commit of the Hub repository.
        license: License of the weights, for the card.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder exists and is not empty.
        ValueError: The source no longer gives its golden embeddings of images.
    """
    require_new_folder(Path(output))  # before the weights are read
    folder = find_model_folder(source, revision=revision)
    model = LLM2CLIPVisionModel.from_pretrained(folder)
    image_processor = forget_code(load_without_code(AutoImageProcessor, folder))
    no_tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()))
    processor = LLM2CLIPProcessor(image_processor, no_tokenizer)
    require_golden(folder, model.eval(), processor, of_vision_tower=True)
    return save_vision_tower(model, image_processor, output, license=license)


def save_vision_tower(
    model: LLM2CLIPModel | LLM2CLIPVisionModel,
    image_processor: Any,
    output: str | Path,
    *,
    license: str | None = None,
) -> Path:
    """Write a loaded model's vision tower, its image processor and a card.

    The folder is complete or absent. The projection into the shared space is left out, because it
    belongs to the captions.

    Args:
        model: Whole or vision-only model.
        image_processor: Its image processor.
        output: New or empty folder.
        license: License of the weights, for the card.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder exists and is not empty.
    """
    folder = Path(output)
    tower: PreTrainedModel = model.vision_model
    with atomic_folder(folder) as unfinished:
        tower.save_pretrained(unfinished)
        image_processor.save_pretrained(unfinished)
        data = ModelCardData(
            license=license,
            library_name="transformers",
            pipeline_tag="image-feature-extraction",
            tags=["llm2clip"],
        )
        name = tower.config._name_or_path
        body = _CARD.format(
            title=folder.name,
            architecture=type(tower).__name__,
            processor=_CROPS if image_processor._auto_class else _PLAIN,
            origin=f"`{name}`" if name else "a tower whose name is not recorded",
        )
        ModelCard(f"---\n{data.to_yaml()}\n---\n{body}").save(unfinished / "README.md")
    return folder
