"""The command line, with accelerate taking processes over gloo for GPUs, so that FSDP runs on CPUs.

Nothing but the name of the kind of machine is changed: FSDP2 itself shards tensors of any device.
"""

from __future__ import annotations

import sys
from typing import Any

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from modeling_llm2clip.__main__ import main

_init = PartialState.__init__


def _init_as_gpus(self: PartialState, *args: Any, **kwargs: Any) -> None:
    _init(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState.__init__ = _init_as_gpus  # type: ignore[method-assign]
    sys.exit(main(sys.argv[1:]))
