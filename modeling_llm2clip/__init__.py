"""LLM2CLIP: CLIP with a language model as its text encoder (arXiv:2411.04997).

After importing the package, `AutoModel`, `AutoProcessor` and the other Auto classes of transformers
load LLM2CLIP models without `trust_remote_code`. All public names can be imported from here. Each
name is loaded on first use, so importing the package is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._registration import register_auto_classes

if TYPE_CHECKING:
    from .building.build_model import build_model, join_towers
    from .configs.align_config import AlignConfig
    from .configs.build_config import BuildConfig
    from .configs.config_fields import DataConfig
    from .configs.encoding_config import EmbedConfig, ExtractConfig, IndexConfig, TagConfig
    from .configs.evaluation_config import EvaluatedDataset, EvaluatedModel, EvaluationConfig
    from .configs.export_config import CardConfig, ConvertConfig, ExportConfig, SourceFormat
    from .configs.finetune_config import FinetuneConfig
    from .configs.serve_config import RayServeConfig, ServeConfig, ServerCheckConfig
    from .configs.train_config import TrainConfig
    from .configuration_llm2clip import LLM2CLIPConfig
    from .conversion.convert_checkpoint import convert_checkpoint
    from .conversion.source_checkpoint import CheckpointSource, LLMSource
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
    from .embedding.extract import extract
    from .embedding.score_file import score_file
    from .encoding.encode import encode_images, encode_texts, score_pairs
    from .evaluation.datasets.dataset_registry import load_dataset
    from .evaluation.evaluate import evaluate
    from .image_loading_llm2clip import (
        ImageLimits,
        get_image_limits,
        load_images,
        set_image_limits,
    )
    from .model_folders.model_loading import load_heads, load_model
    from .model_folders.model_writing import save_heads
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

_HOMES = {
    "building.build_model": ("build_model", "join_towers"),
    "configs.align_config": ("AlignConfig",),
    "configs.build_config": ("BuildConfig",),
    "configs.config_fields": ("DataConfig",),
    "configs.evaluation_config": ("EvaluatedDataset", "EvaluatedModel", "EvaluationConfig"),
    "configs.export_config": ("CardConfig", "ConvertConfig", "ExportConfig", "SourceFormat"),
    "configs.encoding_config": ("EmbedConfig", "ExtractConfig", "IndexConfig", "TagConfig"),
    "configs.finetune_config": ("FinetuneConfig",),
    "configs.serve_config": ("RayServeConfig", "ServeConfig", "ServerCheckConfig"),
    "configs.train_config": ("TrainConfig",),
    "configuration_llm2clip": ("LLM2CLIPConfig",),
    "conversion.convert_checkpoint": ("convert_checkpoint",),
    "conversion.source_checkpoint": ("CheckpointSource", "LLMSource"),
    "data.records.dataset_objects": ("records_from_dataset",),
    "data.store.embedding_store": ("EmbeddingStore",),
    "data.records.record_loading": ("load_records",),
    "data.streams.dataset_streams": ("stream_dataset",),
    "data.streams.record_streams": ("stream_records",),
    "data.records.record_table": ("RecordTable",),
    "data.records.records": ("CaptionedImage",),
    "data.records.splits": ("split_records",),
    "data.validation_errors": ("DataValidationError",),
    "doctor.check_model": ("check_model",),
    "doctor.server_checks": ("check_server",),
    "encoding.encode": ("encode_images", "encode_texts", "score_pairs"),
    "evaluation.datasets.dataset_registry": ("load_dataset",),
    "evaluation.evaluate": ("evaluate",),
    "image_loading_llm2clip": (
        "ImageLimits",
        "get_image_limits",
        "load_images",
        "set_image_limits",
    ),
    "model_folders.model_loading": ("load_heads", "load_model"),
    "model_folders.model_writing": ("save_heads",),
    "model_folders.onnx_folder": ("load_onnx_encoder",),
    "modeling_llm2clip": (
        "LLM2CLIPModel",
        "LLM2CLIPOutput",
        "LLM2CLIPTextModel",
        "LLM2CLIPVisionModel",
    ),
    "processing_llm2clip": ("LLM2CLIPProcessor",),
    "publishing.export_model": ("export_model",),
    "publishing.push_to_hub": ("push_to_hub",),
    "recipes.train": ("train",),
    "embedding.embed": ("embed",),
    "search.image_files": ("records_from_images",),
    "search.image_index": ("ImageIndex",),
    "serving.app": ("create_app",),
    "serving.service": ("EmbeddingService",),
    "training.alignment.align": ("align",),
    "embedding.extract": ("extract",),
    "embedding.score_file": ("score_file",),
    "training.finetuning.finetune_llm": ("finetune_llm",),
    "scheduling.graceful_stop": ("StageInterrupt",),
    "training.losses.loss": ("LossInputs",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {__all__}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_auto_classes()
