"""Read weight files lazily, one tensor at a time, and write them in files of limited size.

Code in a file is never run: only safetensors files are read, and PyTorch files that contain just
tensors and plain values.
"""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from .._suggestions import counted, list_first
from ..data.safetensors_files import SafetensorsReader
from ..loading_llm2clip import list_model_files, list_weight_files, read_weight_shapes

_INDEX = "model.safetensors.index.json"
# Entries where the official training code and DeepSpeed store weights, in order of preference.
_NESTED_UNDER = ("model", "module", "state_dict")
_WRAPPER = "module."
_MODELS = ("model.safetensors", "pytorch_model.bin")
_LORAS = ("adapter_model.safetensors", "adapter_model.bin")
# Files that transformers and peft save, in search order.
WEIGHT_NAMES = (*_MODELS, *_LORAS)
# First bytes of an archive (torch.save since 1.6) and of a pickle (earlier versions).
_BEGINNINGS = (b"PK\x03\x04", b"\x80")
# Errors that torch and zipfile raise for damaged bytes.
_DAMAGED = (RuntimeError, EOFError, ValueError, OSError, zipfile.BadZipFile, zlib.error)
# Training also changes most entries in half precision. If it changes a smaller fraction than this,
# the embeddings differ from those of the exact weights.
_FEW_CHANGED = 0.5
# Disk space for configuration, tokenizer and card, in addition to the weights.
_OTHER_FILES_BYTES = 64 << 20
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class LazyTensor:
    """A tensor with known shape and dtype that is read or computed on demand."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize

    def then(self, make: Callable[[Tensor], Tensor]) -> LazyTensor:
        """Return a lazy tensor that applies a function to this tensor when read.

        The function is called once with a meta tensor to find the shape and dtype.
        """
        made = make(torch.empty(self.shape, dtype=self.dtype, device="meta"))
        return LazyTensor(tuple(made.shape), made.dtype, lambda: make(self.read()))

    @classmethod
    def of(cls, tensor: Tensor) -> LazyTensor:
        return cls(tuple(tensor.shape), tensor.dtype, tensor.detach)


def open_weights(path: Path) -> dict[str, LazyTensor]:
    """Open a weight file, or all weight files that transformers or peft saved in a folder.

    Returns tensors by name. Only headers are read, except that PyTorch files are read to verify
    their checksums. Files that contain anything other than weights, and weights with the same name
    in two files, are refused.
    """
    return open_weight_files(list_weight_files(path, names=WEIGHT_NAMES))


def open_model_weights(folder: Path) -> dict[str, LazyTensor]:
    return open_weight_files(list_model_files(folder))


def open_weight_files(files: Iterable[Path]) -> dict[str, LazyTensor]:
    tensors: dict[str, LazyTensor] = {}
    for file in files:
        if file.suffix == ".safetensors":
            opened = _open_safetensors(file)
        else:
            state = _find_state_dict(_load_pickle(file), file)
            opened = {name: LazyTensor.of(value) for name, value in state.items()}
        if twice := sorted(set(opened) & set(tensors)):
            raise ValueError(
                f"{file} repeats the weights {list_first(twice)} of another file in its folder. "
                "Keep one copy."
            )
        tensors |= opened
    return tensors


def count_changed(before: Tensor, after: Tensor, dtype: torch.dtype) -> tuple[int, int]:
    """Count the entries that differ after casting to a dtype, and those that differ before."""
    in_dtype = before.to(dtype) != after.to(dtype)
    return int(in_dtype.sum()), int((before.float() != after.float()).sum())


def warn_of_rounding(
    counts: Iterable[tuple[int, int]],
    dtype: torch.dtype,
    *,
    what: str,
    of_what: str = "the entries that it should",
) -> float:
    """Return the fraction of changed entries that still differ after rounding; warn if small.

    `counts` has, for each weight, the number of entries that differ after and before rounding.
    """
    num_left, num_changed = map(sum, zip(*counts, strict=True))
    share: float = num_left / num_changed if num_changed else 1.0
    if share < _FEW_CHANGED:
        warnings.warn(
            f"{what} changes {share:.1%} of {of_what}. In {dtype}, small changes are rounded away, "
            "so the embeddings differ from those of the exact weights. Use float32 weights "
            "(--dtype float32 of llm2clip export and convert), or train with a higher learning "
            "rate.",
            stacklevel=3,
        )
    return share


def is_lora_alone(folder: Path) -> bool:
    """Return whether a folder contains the weights of a LoRA, but not of its base model."""
    of_models = (*_MODELS, *(f"{name}.index.json" for name in _MODELS))
    whole = any((folder / name).is_file() for name in of_models)
    return not whole and any((folder / name).is_file() for name in _LORAS)


def plan_shards(
    weights: Mapping[str, LazyTensor], *, max_shard_size: int | str
) -> dict[str, list[str]]:
    """Distribute weights over files as transformers does: file name → names of its weights."""
    split = split_torch_state_dict_into_shards(
        {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in weights.items()},
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    return dict(split.filename_to_tensors)


def write_weights(
    weights: Mapping[str, LazyTensor], folder: Path, *, max_shard_size: int | str
) -> None:
    shards = plan_shards(weights, max_shard_size=max_shard_size)
    for file, names in shards.items():
        # Cloned: thirds of one matrix, and pieces of one mapped file, share their storage.
        tensors = {n: weights[n].read().clone(memory_format=torch.contiguous_format) for n in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        del tensors  # before the next file is read
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.num_bytes for tensor in weights.values())},
            "weight_map": {name: file for file, names in shards.items() for name in names},
        }
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def require_disk_space(weights: Mapping[str, LazyTensor], folder: Path) -> None:
    needed = sum(tensor.num_bytes for tensor in weights.values()) + _OTHER_FILES_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder} has {free / 1e9:.2f} GB free, but the model takes {needed / 1e9:.2f} GB. "
            "Free up space, choose another disk, or use a dtype of half the size (bfloat16)."
        )


def _open_safetensors(file: Path) -> dict[str, LazyTensor]:
    heads = read_weight_shapes([file])
    unknown = sorted({dtype for _, dtype in heads.values()} - set(_DTYPES))
    if unknown:
        raise ValueError(f"{file} has weights with dtypes {unknown}, expected {list(_DTYPES)}.")
    reader = SafetensorsReader(file)
    return {
        name: LazyTensor(shape, _DTYPES[dtype], partial(reader.read, name))
        for name, (shape, dtype) in heads.items()
    }


def _load_pickle(file: Path) -> Any:
    """Load tensors and plain values from a PyTorch file, memory-mapped if its format allows it."""
    with file.open("rb") as opened:
        beginning = opened.read(40)
    if not beginning.startswith(_BEGINNINGS):  # an HTML error page, a Git LFS pointer
        raise ValueError(
            f"{file} is not a PyTorch weight file: it begins with {beginning!r}. Download it again "
            "(with git lfs if the repository uses it) and compare its SHA-256."
        )
    try:
        # Files from torch before 1.6 cannot be mapped and have no checksums.
        mapped = beginning.startswith(_BEGINNINGS[0])
        if mapped:
            _require_checksums(file)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} contains more than weights ({_first_line(error)}). Unpickling it could run "
            "code, so it is refused. Save only its state dict, on a machine where you trust it: "
            "torch.save(checkpoint['state_dict'], …) or safetensors."
        ) from error
    except _DAMAGED as error:
        raise ValueError(
            f"{file} is not a complete PyTorch weight file ({_first_line(error)}). TorchScript "
            "archives are not supported. Download it again and compare its size and SHA-256."
        ) from error


def _require_checksums(file: Path) -> None:
    """Verify the CRC-32 checksum of each entry of a PyTorch file, which torch does not verify."""
    with zipfile.ZipFile(file) as archive:
        if not any(entry.CRC for entry in archive.infolist()):
            raise ValueError(
                "it was saved without CRC-32, so damage could not be detected: save it again "
                "without torch.serialization.set_crc32_options(False)"
            )
        if damaged := archive.testzip():
            raise ValueError(f"the CRC-32 of its entry {damaged} is wrong")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    unsupported = [line for line in lines if "Unsupported" in line or "GLOBAL" in line]
    return (unsupported or lines or [type(error).__name__])[0].rstrip(".")


def _find_state_dict(content: Any, file: Path) -> dict[str, Tensor]:
    """Find the weights in a PyTorch file: under `model`, `module`, `state_dict`, or at the top.

    If all names begin with `module.`, this prefix is removed.
    """
    state = content
    if isinstance(content, Mapping):
        nested = [name for name in _NESTED_UNDER if isinstance(content.get(name), Mapping)]
        state = content[nested[0]] if nested else content
    values = state.items() if isinstance(state, Mapping) else ()
    tensors = {str(name): value for name, value in values if isinstance(value, Tensor)}
    if not tensors or len(tensors) != len(state):
        others = sorted(str(name) for name, value in values if not isinstance(value, Tensor))
        raise ValueError(
            f"{file}: expected a state dict, at the top level or under {_NESTED_UNDER}; got "
            f"{type(content).__name__} with {counted(len(tensors), 'tensor')} and the other "
            f"entries {others}. Save only the state dict."
        )
    wrapped = [name for name in tensors if name.startswith(_WRAPPER)]
    if not wrapped:
        return tensors
    if len(wrapped) != len(tensors):
        raise ValueError(
            f"{file}: {len(wrapped)} of {len(tensors)} names begin with {_WRAPPER!r}, expected "
            "all or none. The file mixes several checkpoints. Save them separately."
        )
    return {name.removeprefix(_WRAPPER): value for name, value in tensors.items()}
