"""Weights that lie in files and are read one at a time.

Nothing here runs code from a file: safetensors, or PyTorch files that hold tensors and plain
values.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..data.safetensors_files import list_weight_files

# Where the official training code and DeepSpeed put the weights, in its order.
_NESTED_UNDER = ("model", "module", "state_dict")
_WRAPPER = "module."
_MODELS = ("model.safetensors", "pytorch_model.bin")
_LORAS = ("adapter_model.safetensors", "adapter_model.bin")
# Files that transformers and peft save, in the order in which they are looked for.
WEIGHT_NAMES = (*_MODELS, *_LORAS)


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of known shape that is read, or computed, when it is asked for."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    def then(self, make: Callable[[Tensor], Tensor]) -> LazyTensor:
        """Return what `make` makes of it; the shape is found without reading."""
        made = make(torch.empty(self.shape, device="meta"))
        return LazyTensor(tuple(made.shape), lambda: make(self.read()))


def open_weights(path: Path) -> dict[str, LazyTensor]:
    """Open a weight file, or the weight files of a folder.

    Args:
        path: a `.safetensors`, `.pt`, `.pth` or `.bin` file, or a folder as transformers or peft
            saves it.
    Raises: ValueError when it is broken, holds more than weights, or holds none.
    """
    tensors: dict[str, LazyTensor] = {}
    for file in list_weight_files(path, names=WEIGHT_NAMES):
        opened = _open_safetensors(file) if file.suffix == ".safetensors" else _open_pickle(file)
        if twice := sorted(set(opened) & set(tensors)):
            raise ValueError(f"{file} repeats the weights {twice[:8]} of another file beside it.")
        tensors |= opened
    return tensors


def is_lora_alone(folder: Path) -> bool:
    """Whether a folder's weights are those of a LoRA, without the model that it is for."""
    of_models = (*_MODELS, *(f"{name}.index.json" for name in _MODELS))
    whole = any((folder / name).is_file() for name in of_models)
    return not whole and any((folder / name).is_file() for name in _LORAS)


def _open_safetensors(path: Path) -> dict[str, LazyTensor]:
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or corrupt ({error}). Download it again and compare its size "
            "and SHA-256 with the source's."
        ) from error
    return {
        name: LazyTensor(shape, partial(_read_safetensor, path, name))
        for name, shape in shapes.items()
    }


def _read_safetensor(path: Path, name: str) -> Tensor:
    # Opened anew for each tensor, so that the pages of those before are given back.
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)  # type: ignore[no-any-return]


def _open_pickle(path: Path) -> dict[str, LazyTensor]:
    state = find_state_dict(_load_pickle(path), path)
    return {name: LazyTensor(tuple(value.shape), partial(_itself, value))
            for name, value in state.items()}  # fmt: skip


def _itself(value: Tensor) -> Tensor:
    return value.detach()


# Of an archive, as torch.save writes them now, and of a pickle, as it did before.
_BEGINNINGS = (b"PK\x03\x04", b"\x80")


def _load_pickle(path: Path) -> Any:
    """Load tensors and plain values; mapped from the disk where the file's format allows it."""
    with path.open("rb") as opened:
        beginning = opened.read(40)
    if not beginning.startswith(_BEGINNINGS):  # a page of an error, a pointer to the file
        raise ValueError(
            f"{path} is not a PyTorch file of weights: it begins with {beginning!r}. Download it "
            "again (with git lfs, where the repository keeps it there) and compare its SHA-256."
        )
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than weights ({_first_line(error)}), and unpickling that would run "
            "code from the file, which is never done here. Save its state dict alone, on a machine "
            "where you trust it: torch.save(checkpoint['state_dict'], …) or safetensors."
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise ValueError(
            f"{path} is not a whole PyTorch file of weights ({_first_line(error)}). A TorchScript "
            "archive is not one either. Download it again and compare its size and SHA-256."
        ) from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    unsupported = [line for line in lines if "Unsupported" in line or "GLOBAL" in line]
    return (unsupported or lines or [type(error).__name__])[0].rstrip(".")


def find_state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """Find the weights in what a PyTorch file holds, and take off what wraps their names.

    They may stand under `model`, `module` or `state_dict`, and begin with `module.`.

    Raises: ValueError when there are no weights, or only some names are wrapped.
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
            f"{path}: wanted a state dict, at the top or under {_NESTED_UNDER}; got "
            f"{type(content).__name__} with {len(tensors)} tensors and the other entries {others}. "
            "Save the state dict alone."
        )
    wrapped = [name for name in tensors if name.startswith(_WRAPPER)]
    if not wrapped:
        return tensors
    if len(wrapped) != len(tensors):
        raise ValueError(
            f"{path}: {len(wrapped)} of {len(tensors)} names begin with {_WRAPPER!r}, wanted "
            "all or none. The file is a mixture of checkpoints."
        )
    return {name.removeprefix(_WRAPPER): value for name, value in tensors.items()}
