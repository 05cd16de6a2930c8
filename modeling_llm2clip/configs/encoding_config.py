"""Options for encoding texts and images, shared by `extract`, `embed`, `index` and `tag`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from annotated_types import Interval

from .config_fields import CompileConfig, DeviceConfig, Precision, WeightDtype

Backend: TypeAlias = Literal["torch", "onnx"]
TextWeights: TypeAlias = Literal["float32", "int8", "int4"]
EmbeddingDtype: TypeAlias = Literal["float32", "float16", "int8", "binary", "ubinary"]
EmbeddingColumn: TypeAlias = Literal[
    "text",
    "name",
    "group_id",
    "lang",
    "captions",
    "long_captions",
    "keywords",
    "url",
    "place",
    "image_file",
]
# Model types in transformers with an image encoder and a text encoder that share a space.
DUAL_ENCODERS = (
    "clip", "siglip", "siglip2", "metaclip_2", "tipsv2", "aimv2", "chinese_clip", "altclip",
    "vision-text-dual-encoder",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig(DeviceConfig):
    """Device to run a model on, and dtype of its towers."""

    precision: Precision = "auto"
    """Dtype of the towers. auto uses the stored dtype, but on GPUs and CPUs that multiply bfloat16
    in hardware, each float32 tower runs in bfloat16 if this hardly changes the embeddings of test
    inputs (cosines of at least 0.999). `serve` keeps the stored dtype on a CPU."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig(DeviceConfig):
    """Device to run an index's model on, and dtype of its towers."""

    precision: Precision = "auto"
    """Dtype of the towers; auto uses the stored dtype."""


@dataclass(frozen=True, kw_only=True)
class BatchConfig(DeviceConfig):
    """Options for batching the inputs; in float32 they do not affect the embeddings."""

    batch_size: Annotated[int, Interval(ge=1)] | None = None
    """Images per batch. In evaluate, a batch of texts may have 64 times as many tokens. Default: on
    a CPU, 8 images or 4,096 tokens; on other devices, 64 images or 16,384 tokens."""
    show_progress: bool = True
    """Show progress bars."""


@dataclass(frozen=True, kw_only=True)
class EncodingConfig(BatchConfig, PrecisionConfig):
    """Options for encoding."""


@dataclass(frozen=True, kw_only=True)
class JpegConfig(DeviceConfig):
    """Options for decoding JPEGs that are much larger than the model's input."""

    jpeg_decoding: Literal["full", "scaled"] = "full"
    """Decode JPEGs at full size (full), or at 1/2, 1/4 or 1/8 of it, but no smaller than three
    times the model's input size (scaled). scaled is faster, but slightly changes the embeddings of
    large images."""


@dataclass(frozen=True, kw_only=True)
class BackendConfig(PrecisionConfig, CompileConfig):
    """Options for choosing the library that runs a model."""

    backend: Backend = "torch"
    """Library that runs the model: torch, or onnx for ONNX Runtime on the CPU. With onnx, MODEL
    must be a folder written by `llm2clip export --onnx`."""
    text_weights: TextWeights | None = None
    """With `backend` onnx: weight format of the language model's linear layers. Default: the most
    precise in the folder."""

    def _list_conflicts(self) -> dict[str, object]:
        is_onnx = self.backend == "onnx"
        return {
            **super()._list_conflicts(),
            f"text_weights={self.text_weights} needs backend='onnx'.": (
                self.text_weights is not None and not is_onnx
            ),
            f"device={self.device}: backend='onnx' runs on the CPU. Remove the device.": (
                is_onnx and self.device not in ("auto", "cpu")
            ),
            f"precision={self.precision}: backend='onnx' runs graphs of fixed precision. Remove "
            "it, or set text_weights.": is_onnx and self.precision != "auto",
            "compile=True needs backend='torch'.": is_onnx and self.compile,
        }


@dataclass(frozen=True, kw_only=True)
class ShardConfig(EncodingConfig, JpegConfig):
    """Options for writing embeddings in shards."""

    rows_per_shard: Annotated[int, Interval(ge=1, le=2**20)] = 8192
    """Texts or images per file. A resumed run recomputes unfinished files."""
    batch_size: Annotated[int, Interval(ge=1)] | None = None
    """Images, or texts of maximum length, per batch; a batch holds more texts if they are shorter.
    Default: on a CPU, 8 images or 4,096 tokens; on other devices, 64 images or 16,384 tokens."""


@dataclass(frozen=True, kw_only=True)
class ExtractConfig(ShardConfig, CompileConfig):
    """Options for `extract`: computing and storing embeddings.

    An interrupted run resumes only with the same `store_dtype`, `rows_per_shard`, `batch_size`,
    `sentence_views`, `compile` and `jpeg_decoding`, and in the same precision.
    """

    store_dtype: WeightDtype = "float16"
    """Dtype of the stored embeddings. Values outside the dtype's range are an error; they are never
    clipped."""
    sentence_views: Annotated[int, Interval(ge=0, le=64)] = 0
    """Maximum number of extra views to store for each long caption. A view is a random subset of
    the caption's sentences without the first. Align samples views like long captions (DeBias-CLIP,
    arXiv:2602.22419)."""


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(ShardConfig, BackendConfig):
    """Options for `embed`: how to encode, and what the output files contain.

    An interrupted run resumes only with the same options, except for `device`, `skip_invalid` and
    `show_progress`. The image limits must also be the same.
    """

    dtype: EmbeddingDtype = "float32"
    """Dtype of the embeddings: float32, float16, int8 (each dimension's range divided into 255
    steps), or one bit per dimension, packed as binary (int8) or ubinary (uint8)."""
    truncate_dim: Annotated[int, Interval(ge=1)] | None = None
    """Number of leading dimensions to keep; the embeddings are then rescaled to unit length.
    Default: all."""
    columns: tuple[EmbeddingColumn, ...] = ()
    """Columns to write in addition to id and embedding: text (only with --modality text), name,
    group_id, lang, captions, long_captions, keywords, url, place, image_file. Default: none."""
    skip_invalid: bool = False
    """Skip images that cannot be decoded and report how many, instead of stopping."""
    int8_ranges: Path | None = None
    """Output folder of an earlier `embed` run whose int8 ranges to reuse, so both outputs fit into
    one index. Default: none; the ranges are measured on 1,024 records."""

    def _list_conflicts(self) -> dict[str, object]:
        return {
            **super()._list_conflicts(),
            f"columns={self.columns} has duplicates. List each column once.": (
                len(set(self.columns)) < len(self.columns)
            ),
            f"int8_ranges={self.int8_ranges} needs dtype='int8', not {self.dtype!r}.": (
                self.int8_ranges is not None and self.dtype != "int8"
            ),
        }


@dataclass(frozen=True, kw_only=True)
class IndexConfig(EncodingConfig, JpegConfig):
    """Options for `index`: how to encode, and whether to build an approximate index."""

    ann: Literal["auto", "always", "never"] = "auto"
    """Approximate index: auto builds one for 20,000 images or more, and keeps it if it is faster
    than exact search and its recall@10 is at least 0.97; always keeps it in any case; never builds
    none."""


@dataclass(frozen=True, kw_only=True)
class TagConfig(EncodingConfig):
    """Options for `tag`: encoding a folder of images."""

    index: str | None = None
    """Database for the image embeddings. It is updated as by `llm2clip index`, so the next call
    encodes only new images; an approximate index is left unchanged. Default: none, so all images
    are encoded."""
    skip_invalid: bool = False
    """Skip images that cannot be read and report how many, instead of stopping."""
