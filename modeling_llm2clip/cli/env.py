"""`llm2clip env`."""

from __future__ import annotations

import platform

from .._environment import describe_hardware, find_cpu_name, list_versions, read_commit
from .._suggestions import counted
from .command import command


@command(group="Other", examples=("llm2clip env",))
def env() -> int:
    """Prints versions and hardware for a bug report.

    The lines are Markdown to copy into the report.
    """
    import torch

    from ..encoding.devices import describe_device, find_device

    hardware, versions = describe_hardware(), list_versions()
    lines = {
        "Platform": platform.platform(),
        "Python": versions.pop("python"),
        **versions,
        "Commit": read_commit(),
        "CPU": f"{find_cpu_name()}, {counted(hardware['processor_threads'], 'thread')}",
        "GPU": ", ".join(hardware["gpus"]) or "none",
        "CUDA of torch": torch.version.cuda or "none",
        "Device (auto)": describe_device(find_device("auto")),
        "Attention (auto)": _find_attention(),
    }
    for name, value in lines.items():
        print(f"- {name}: {value}")
    return 0


def _find_attention() -> str:
    from transformers import LlamaConfig, LlamaModel
    from transformers.utils import is_flash_attn_2_available

    tiny = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    chosen = LlamaModel(tiny).config._attn_implementation
    there = "installed" if is_flash_attn_2_available() else "not installed"
    return f"{chosen}; flash_attention_2 {there}"
