"""Options of encoding texts and images: to extract, embed, index and tag them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from annotated_types import Interval

from .config_fields import DeviceConfig, Precision, WeightDtype

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
# transformers' model types of an image encoder and a text encoder that share a space.
DUAL_ENCODERS = (
    "clip", "siglip", "siglip2", "metaclip_2", "tipsv2", "aimv2", "chinese_clip", "altclip",
    "vision-text-dual-encoder",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig(DeviceConfig):
    """The device of a model, and the dtype of its towers."""

    precision: Precision = "auto"
    """Dtype of the towers. auto is the stored one; a GPU that supports bfloat16 runs float32 towers
    in it if that keeps the embeddings of 64 inputs (cosines of at least 0.999)."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig(DeviceConfig):
    """The device of an index's model, and the dtype of its towers."""

    precision: Precision = "auto"
    """Dtype of the towers; auto is the stored one."""


@dataclass(frozen=True, kw_only=True)
class BatchConfig(DeviceConfig):
    """Batches of the inputs; in float32 they change no embedding."""

    batch_size: Annotated[int, Interval(ge=1)] | None = None
    """Texts or images per batch. Default: by device."""
    show_progress: bool = True
    """Show progress bars."""


@dataclass(frozen=True, kw_only=True)
class EncodingConfig(BatchConfig, PrecisionConfig):
    """Options of encoding."""


@dataclass(frozen=True, kw_only=True)
class JpegConfig(DeviceConfig):
    """The decoding of JPEGs that are much larger than the images of the model."""

    jpeg_decoding: Literal["full", "scaled"] = "full"
    """Size at which JPEGs are decoded: full, or scaled for a half, a quarter or an eighth, at least
    three times what the model reads, which is faster; embeddings of large ones differ slightly."""


@dataclass(frozen=True, kw_only=True)
class CompileConfig(DeviceConfig):
    """The compilation of a model."""

    compile: bool = False
    """Compile the layers of the towers, by Triton or a C++ compiler: the first batches take longer,
    the others less time, and embeddings may differ by rounding."""


@dataclass(frozen=True, kw_only=True)
class BackendConfig(PrecisionConfig, CompileConfig):
    """The library that runs a model."""

    backend: Backend = "torch"
    """Runtime of the model: torch, or onnx for ONNX Runtime on the CPU; with onnx, MODEL is a
    folder that `llm2clip export --onnx` wrote."""
    text_weights: TextWeights | None = None
    """With `backend` onnx, weights of the language model's linear layers. Default: the most precise
    in the folder."""

    def _list_conflicts(self) -> dict[str, object]:
        is_onnx = self.backend == "onnx"
        return {
            **super()._list_conflicts(),
            f"text_weights={self.text_weights} needs backend='onnx'.": (
                self.text_weights is not None and not is_onnx
            ),
            f"device={self.device}: backend='onnx' runs on the CPU. Leave the device out.": (
                is_onnx and self.device not in ("auto", "cpu")
            ),
            f"precision={self.precision}: backend='onnx' runs graphs of one precision. Leave it "
            "out, or choose text_weights.": is_onnx and self.precision != "auto",
            "compile=True needs backend='torch'.": is_onnx and self.compile,
        }


@dataclass(frozen=True, kw_only=True)
class ShardConfig(EncodingConfig, JpegConfig):
    """Options of encoding into shards."""

    rows_per_shard: Annotated[int, Interval(ge=1, le=2**20)] = 8192
    """Texts or images per file. An interrupted run computes a file that was begun again."""
    batch_size: Annotated[int, Interval(ge=1)] | None = None
    """Images per batch, or texts of the maximum length; shorter texts fill up a batch. Default: by
    device."""


@dataclass(frozen=True, kw_only=True)
class ExtractConfig(ShardConfig, CompileConfig):
    """Options of `extract`: computing and storing embeddings.

    An interrupted store continues only with the same `store_dtype`, `rows_per_shard`, `batch_size`,
    `sentence_views`, `compile` and `jpeg_decoding`, and in the same precision.
    """

    store_dtype: WeightDtype = "float16"
    """Dtype of the stored embeddings; values that it cannot hold are refused, never clipped."""
    sentence_views: Annotated[int, Interval(ge=0, le=64)] = 0
    """Views of each long caption to store beside it, each some of its sentences without the first
    one, which alignment then samples as long captions (DeBias-CLIP, arXiv:2602.22419)."""


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(ShardConfig, BackendConfig):
    """Options of `embed`: the encoding, and the content of its files.

    An interrupted output continues only with the same options, except for `device`,
    `skip_invalid` and `show_progress`, and with the same image limits.
    """

    dtype: EmbeddingDtype = "float32"
    """Dtype of the embeddings: float32, float16, int8 (a step of 1/255 of each dimension's range),
    or one bit per dimension as binary (int8) or ubinary (uint8)."""
    truncate_dim: Annotated[int, Interval(ge=1)] | None = None
    """Number of dimensions to keep from the first on; the embeddings are scaled to unit length
    again. Default: all."""
    columns: tuple[EmbeddingColumn, ...] = ()
    """Columns besides id and embedding: text, name, group_id, lang, captions, long_captions,
    keywords, url, place, image_file. Default: none."""
    skip_invalid: bool = False
    """Skip images that cannot be decoded and report their number, instead of stopping."""
    int8_ranges: Path | None = None
    """Output of an earlier `embed` whose int8 ranges to use, so that both fit into one index.
    Default: the ranges of a sample of 1,024 records."""

    def _list_conflicts(self) -> dict[str, object]:
        return {
            **super()._list_conflicts(),
            f"columns={self.columns} names a column twice. Name each once.": (
                len(set(self.columns)) < len(self.columns)
            ),
            f"int8_ranges={self.int8_ranges} needs dtype='int8', not {self.dtype!r}.": (
                self.int8_ranges is not None and self.dtype != "int8"
            ),
        }


@dataclass(frozen=True, kw_only=True)
class IndexConfig(EncodingConfig, JpegConfig):
    """Options of `index`: the encoding, and the approximate index."""

    ann: Literal["auto", "always", "never"] = "auto"
    """Approximate index: auto builds one from 20,000 images on, and keeps it if it is faster than
    comparing with every image and its recall@10 is at least 0.97."""


@dataclass(frozen=True, kw_only=True)
class TagConfig(EncodingConfig):
    """Options of `tag`: encoding a folder of images."""

    index: str | None = None
    """Database of the images' embeddings, updated as by `llm2clip index`, so that the next call
    encodes only new images; an approximate index stays as it is. Default: none, and all images are
    encoded."""
    skip_invalid: bool = False
    """Skip images that cannot be read and report their number, instead of stopping."""
