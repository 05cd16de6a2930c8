"""Choose the dtype that towers run in, load models in it, and compute in exact float32."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..packing_llm2clip import PACKED_ATTENTION
from .devices import count_free_bytes, multiplies_bfloat16

# Since torch 2.9, each operation of a backend has its own setting, and reading the old settings can
# raise an error.
_EACH_ALONE = hasattr(torch.backends.cuda.matmul, "fp32_precision")
_lock = threading.Lock()
_passes: list[Sequence[Any]] = []  # the program's settings, once per running pass


@dataclass(frozen=True)
class DeviceTraits:
    """Traits of a device that decide which dtype towers run in.

    Attributes:
        kind: Type of device, such as cpu or cuda.
        has_bfloat16: Whether the device multiplies bfloat16 in hardware, faster than float32.
        free_bytes: Free memory of a GPU; 0 for other devices.
    """

    kind: str
    has_bfloat16: bool
    free_bytes: int = 0

    @classmethod
    def read(cls, device: torch.device) -> DeviceTraits:
        """Read the traits of a device as they are now."""
        return cls(device.type, multiplies_bfloat16(device), count_free_bytes(device))


def choose_tower_dtype(
    precision: str, traits: DeviceTraits, stored: torch.dtype
) -> tuple[torch.dtype, bool]:
    """Choose the dtype of the towers, and whether embeddings in that dtype must first be checked.

    `auto` is the stored dtype, except that a device that multiplies bfloat16 in hardware runs each
    float32 tower in bfloat16 if that preserves its embeddings.
    """
    if precision != "auto":
        return getattr(torch, precision), False
    casts = traits.has_bfloat16 and stored == torch.float32
    return (torch.bfloat16, True) if casts else (stored, False)


def describe_precision(model: Any, stored: torch.dtype) -> dict[str, str]:
    """Describe how the towers of a model compute; empty on a CPU in the stored dtype.

    Outputs record this description with the other options that determine their bytes.
    """
    towers = {name: getattr(model, f"{name}_model", None) for name in ("text", "vision")}
    present = {name: tower for name, tower in towers.items() if tower is not None}
    tower = next(iter(present.values()))
    if tower.device.type == "cpu" and all(each.dtype == stored for each in present.values()):
        return {}
    dtypes = {name: str(each.dtype).removeprefix("torch.") for name, each in present.items()}
    mixed = " and ".join(f"{dtype} {name}" for name, dtype in dtypes.items())
    attention = str(tower.config._attn_implementation)
    return {
        "precision": mixed if len({*dtypes.values()}) > 1 else next(iter(dtypes.values())),
        "device": tower.device.type,
        # An LLM that packs texts changes to this name on its first pass.
        "attention": "sdpa" if attention == PACKED_ATTENTION else attention,
        "float32 products": "ieee",  # see `float32_as_such`
    }


def load_on_device(
    model_class: Any,
    folder: str | Path,
    device: torch.device,
    *,
    dtype: torch.dtype | str = "auto",
    **options: Any,
) -> Any:
    """Load a model folder straight to a device, in evaluation mode.

    Weights are read, cast and copied one at a time, so host memory never holds a whole model that
    runs on another device. `dtype` is as in `from_pretrained` and defaults to the stored dtype;
    further options are passed on to `from_pretrained`.
    """
    model = model_class.from_pretrained(
        folder, local_files_only=True, dtype=dtype, device_map={"": device}, **options
    )
    return model.eval()


@contextmanager
def float32_as_such() -> Iterator[None]:
    """Compute products and convolutions in exact float32 within the block, on every device.

    TF32 keeps only 10 bits of the mantissa. On CUDA, torch uses it for float32 convolutions by
    default, and programs often enable it for matrix products as well. Both settings are global.
    Blocks of several threads may overlap: the last block to end restores the program's settings.
    """
    with _lock:
        before = _swap_settings(None)
        _passes.append(_passes[0] if _passes else before)
    try:
        yield
    finally:
        with _lock:
            first = _passes.pop()
            if not _passes:
                _swap_settings(first)


@contextmanager
def float32_as_tf32() -> Iterator[None]:
    """Compute float32 matrix products in TF32 on CUDA within the block; convolutions do not change.

    The setting is global. Other devices ignore it.
    """
    matmul = torch.backends.cuda.matmul
    name, value = ("fp32_precision", "tf32") if _EACH_ALONE else ("allow_tf32", True)
    before = getattr(matmul, name)
    setattr(matmul, name, value)
    try:
        yield
    finally:
        setattr(matmul, name, before)


def _swap_settings(settings: Sequence[Any] | None) -> list[Any]:
    """Apply settings, or exact float32 for None; return the previous settings."""
    if not _EACH_ALONE:
        before = [torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32]
        precision, torch.backends.cudnn.allow_tf32 = settings or ("highest", False)
        torch.set_float32_matmul_precision(precision)
        return before
    cuda, cudnn, mkldnn = (getattr(torch.backends, name) for name in ("cuda", "cudnn", "mkldnn"))
    operations = [cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn]
    before = [operation.fp32_precision for operation in operations]
    for operation, setting in zip(operations, settings or ["ieee"] * len(before), strict=True):
        operation.fp32_precision = setting
    return before
