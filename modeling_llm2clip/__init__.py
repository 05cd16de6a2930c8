"""LLM2CLIP: CLIP with a language model as its text encoder (arXiv:2411.04997).

Importing the package makes `AutoModel`, `AutoProcessor` and the other Auto classes of transformers
load its models without `trust_remote_code`. All public names can be imported from here. Each is
loaded on first use, so importing the package is fast.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._registration import register_auto_classes

if TYPE_CHECKING:
    from .building.build_model import build_model, join_towers
    from .configs.align_config import AlignConfig
    from .configs.build_config import BuildConfig
    from .configs.data_config import DataConfig
    from .configs.embed_config import EmbedConfig
    from .configs.evaluation_config import EvaluatedDataset, EvaluatedModel, EvaluationConfig
    from .configs.export_config import CardConfig, ConvertConfig, ExportConfig
    from .configs.extract_config import ExtractConfig
    from .configs.finetune_config import FinetuneConfig
    from .configs.search_config import IndexConfig, TagConfig
    from .configs.serve_config import RayServeConfig, ServeConfig
    from .configs.server_check_config import ServerCheckConfig
    from .configs.source_format import SourceFormat
    from .configs.train_config import TrainConfig
    from .configuration_llm2clip import LLM2CLIPConfig
    from .conversion.convert_checkpoint import convert_checkpoint
    from .conversion.source_checkpoint import CheckpointSource, LLMSource
    from .data.captions.caption_joins import join_captions
    from .data.records.dataset_objects import records_from_dataset
    from .data.records.record_loading import load_records
    from .data.records.record_table import RecordTable
    from .data.records.records import CaptionedImage
    from .data.records.splits import split_records
    from .data.store.embedding_store import EmbeddingStore
    from .data.streams.dataset_streams import stream_dataset
    from .data.streams.record_streams import stream_records
    from .data.validation_errors import DataValidationError
    from .doctor.check_model import check_model
    from .doctor.server_checks import check_server
    from .embedding.embed import embed
    from .embedding.extract import extract, merge_store
    from .encoding.encode import encode_images, encode_texts
    from .evaluation.datasets.dataset_registry import load_dataset
    from .evaluation.evaluate import evaluate
    from .image_loading_llm2clip import (
        ImageLimits,
        get_image_limits,
        load_images,
        set_image_limits,
    )
    from .model_folders.model_loading import load_model
    from .model_folders.onnx_folder import load_onnx_encoder
    from .modeling_llm2clip import (
        LLM2CLIPModel,
        LLM2CLIPOutput,
        LLM2CLIPTextModel,
        LLM2CLIPVisionModel,
    )
    from .processing_llm2clip import LLM2CLIPProcessor
    from .publishing.export_model import export_model
    from .publishing.push_to_hub import push_to_hub
    from .recipes.train import train
    from .scheduling.graceful_stop import StageInterrupt
    from .search.image_files import records_from_images
    from .search.image_index import ImageIndex
    from .serving.app import create_app
    from .serving.service import EmbeddingService
    from .training.alignment.align import align
    from .training.finetuning.finetune_llm import finetune_llm
    from .training.losses.loss import LossInputs

__version__ = "0.1.0"

# Module by public name: the imports above, which transformers too reads off its own sources.
_SOURCE = Path(__file__).read_text(encoding="utf-8")
_HOME = {
    name: module
    for module, names in re.findall(
        r"^    from \.([a-z]\S+) import (\w.*|\([^)]*\))$", _SOURCE, re.M
    )
    for name in re.findall(r"\w+", names)
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {__all__}")
    from ._library_warnings import imports_hidden

    with imports_hidden():
        return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_auto_classes()
