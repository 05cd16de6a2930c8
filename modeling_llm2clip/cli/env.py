"""`llm2clip env`."""

from __future__ import annotations

import platform

from .._environment import describe_hardware, list_versions, read_commit
from .._suggestions import counted
from .command import command


@command(group="Other", examples=("llm2clip env",))
def env() -> int:
    """Prints versions and hardware for a bug report.

    The output is Markdown; paste it into the report.
    """
    import torch
    from transformers.utils import is_flash_attn_2_available

    from ..encoding.devices import describe_device, find_device

    hardware, versions = describe_hardware(), list_versions()
    lines = {
        "Platform": platform.platform(),
        "Python": versions.pop("python"),
        **versions,
        "Commit": read_commit(),
        "CPU": f"{hardware['machine']}, {counted(hardware['processor_threads'], 'thread')}",
        "GPU": ", ".join(hardware["gpus"]) or "none",
        "CUDA of torch": torch.version.cuda or "none",
        "Device (auto)": describe_device(find_device("auto")),
        "flash_attention_2": "installed" if is_flash_attn_2_available() else "not installed",
    }
    for name, value in lines.items():
        print(f"- {name}: {value}")
    return 0
