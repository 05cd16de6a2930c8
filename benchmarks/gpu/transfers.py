"""Counts what crosses between a host and its GPU, where one CPU plays both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

# On a CPU all devices are equal; this one has another name, and means the host.
_HOST = torch.device("cpu", 0)
# Functions whose result Python sees, or whose shape depends on values: the host waits for them.
_READS = frozenset(
    "item tolist numpy nonzero argwhere unique masked_select is_nonzero equal allclose bincount "
    "__bool__ __int__ __float__ __index__ __contains__".split()
)
_MOVES = frozenset(("to", "cuda"))
_GET_DEVICE = Tensor.device.__get__  # type: ignore[attr-defined]


@dataclass
class Crossings:
    """What crossed: calls, and bytes.

    Attributes:
        reads: Values of the device that the host waited for.
        copies_in: Tensors copied to the device while the host waited.
        copies_ahead: Tensors copied to the device while the host went on.
        bytes_in: Bytes of both.
        matrix_bytes_in: Those of tensors with two dimensions or more.
        copies_out: Tensors copied to the host.
        bytes_out: Their bytes.
        readers: How often each function read.
    """

    reads: int = 0
    copies_in: int = 0
    copies_ahead: int = 0
    bytes_in: int = 0
    matrix_bytes_in: int = 0
    copies_out: int = 0
    bytes_out: int = 0
    readers: dict[str, int] = field(default_factory=dict)

    def per(self, other: Crossings, count: int) -> dict[str, float]:
        """Return the mean of what another count has beyond this one."""
        names = [name for name in vars(self) if name != "readers"]
        return {
            name: round((getattr(other, name) - getattr(self, name)) / count, 2) for name in names
        }


class Transfers(TorchFunctionMode):
    """Follows which tensors a GPU would hold.

    Only calls of this thread are seen, and none that a backward pass makes.

    Parameters are on the device, and so is what a move with a device returns, what a function makes
    on a device that is not a host tensor's, and what any function makes of these. All else is on
    the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.crossings = Crossings()
        self._on_device: Any = WeakIdKeyDictionary()

    def place(self, tensor: Tensor) -> Tensor:
        """Note that a tensor is on the device."""
        self._on_device[tensor] = True
        return tensor

    def is_placed(self, tensor: object) -> bool:
        """Return whether a tensor is on the device."""
        return isinstance(tensor, nn.Parameter) or tensor in self._on_device

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function, and note what it crosses."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        first = args[0] if args else None
        held = any(self.is_placed(leaf) for leaf in _list_tensors((args, kwargs)))
        if func == _GET_DEVICE:
            return func(*args) if held else _HOST
        result = func(*args, **kwargs)
        if name == "cpu" or (name == "to" and _HOST in (*args[1:], *kwargs.values())):
            return self._take_out(first, result)
        if name in _MOVES:
            return self._move_in(first, result, args[1:], kwargs)
        if held and (name in _READS or (name == "__getitem__" and _has_mask(args[1]))):
            self._note_read(name)
        elif held and name in ("__getitem__", "__setitem__"):
            self._note_index(args[1])
        elif name == "copy_" and self.is_placed(first) and not self.is_placed(args[1]):
            self._note_in(args[1], ahead=_is_ahead(args[2:], kwargs))
        elif name == "copy_" and not self.is_placed(first) and held:
            self._note_out(args[1])
            return result
        # Code takes its device from a tensor or a model, and names the CPU where it means it.
        made = kwargs.get("device") not in (None, "cpu", _HOST)
        if made and name in ("tensor", "as_tensor"):
            self._note_in(result, ahead=False)
        if held or made:
            for tensor in _list_tensors(result):
                self.place(tensor)
        return result

    def _move_in(
        self, first: Tensor, result: Tensor, places: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        goals = [*places, *kwargs.values()]
        named = any(isinstance(goal, torch.device | str) for goal in goals)
        beside = any(isinstance(goal, Tensor) and self.is_placed(goal) for goal in goals)
        if self.is_placed(first):
            return self.place(result)
        if not (named or beside):
            return result
        self._note_in(first, ahead=_is_ahead(places, kwargs))
        # A CPU returns the same tensor, whose host copy may be moved once more.
        return self.place(result.view_as(result) if result is first else result)

    def _take_out(self, first: Tensor, result: Tensor) -> Tensor:
        if not self.is_placed(first):
            return result
        self._note_out(first)
        return result.view_as(result) if result is first else result

    def _note_in(self, tensor: Tensor, *, ahead: bool) -> None:
        self.crossings.copies_ahead += ahead
        self.crossings.copies_in += not ahead
        self.crossings.bytes_in += tensor.nbytes
        self.crossings.matrix_bytes_in += tensor.nbytes * (tensor.ndim > 1)

    def _note_out(self, tensor: Tensor) -> None:
        self.crossings.copies_out += 1
        self.crossings.bytes_out += tensor.nbytes

    def _note_read(self, name: str) -> None:
        self.crossings.reads += 1
        self.crossings.readers[name] = self.crossings.readers.get(name, 0) + 1

    def _note_index(self, index: Any) -> None:
        for part in index if isinstance(index, tuple) else (index,):
            if isinstance(part, list) or (isinstance(part, Tensor) and not self.is_placed(part)):
                self.crossings.copies_in += 1
                self.crossings.bytes_in += 8 * len(part) if isinstance(part, list) else part.nbytes


def _list_tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _has_mask(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, Tensor) and part.dtype == torch.bool for part in parts)


def _is_ahead(places: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("non_blocking", any(place is True for place in places)))
