"""Run the command line with accelerate treating gloo processes as GPUs, so FSDP runs on CPUs.

Only the name of the machine type changes: FSDP2 itself shards tensors on any device.
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
