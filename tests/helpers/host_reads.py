"""Counts the numbers that Python reads from tensors: each would wait for a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

_READS = ("aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.is_nonzero")


class HostReads(TorchDispatchMode):
    """While it is entered, lists the operators that give Python a number of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if str(func).startswith(_READS):
            self.names.append(str(func))
        called: Callable[..., Any] = func
        return called(*args, **(kwargs or {}))
