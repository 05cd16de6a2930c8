"""Which device a command runs on: one choice, checked first, printed where there was one."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from torch import nn
from transformers import Trainer, TrainingArguments

from modeling_llm2clip.cli.options import use_device
from modeling_llm2clip.configs.align_config import AlignConfig
from modeling_llm2clip.configs.evaluation_config import EvaluationConfig
from modeling_llm2clip.encoding import devices
from modeling_llm2clip.encoding.devices import (
    find_device,
    list_devices,
    multiplies_bfloat16,
    to_float64,
)
from modeling_llm2clip.evaluation.evaluate import evaluate
from modeling_llm2clip.scheduling.processes import choose_device
from modeling_llm2clip.training.trainer_mixins import training_arguments_on


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretends to be a machine of other devices; this one has none to choose from."""

    def pretend(*, num_gpus: int = 0, mps: bool = False, local_rank: int | None = None) -> None:
        there = {"cpu", *(["mps"] if mps else []), *(["cuda"] if num_gpus else [])}

        def require(name: str) -> None:
            kind, _, index = name.partition(":")
            if kind not in there or int(index or 0) >= max(num_gpus, 1):
                raise ValueError(f"device={name!r} is not available")

        monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU number {index}")
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(devices, "require_device", require)
        if local_rank is not None:
            monkeypatch.setenv("LOCAL_RANK", str(local_rank))

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return pretend


@pytest.mark.parametrize(
    ("there", "best"),
    [({}, "cpu"), ({"mps": True}, "mps"), ({"num_gpus": 2}, "cuda"),
     ({"num_gpus": 1, "mps": True}, "cuda")],
)  # fmt: skip
def test_auto_is_cuda_else_mps_else_the_cpu(there: Any, best: str, machine: Any) -> None:
    machine(**there)
    assert find_device("auto") == find_device(None) == torch.device(best)


@pytest.mark.skipif(
    torch.cuda.is_available() or torch.backends.mps.is_available(), reason="asks for what is absent"
)
def test_a_named_device_that_is_not_there_is_an_error() -> None:
    for name in ("cuda", "cuda:0", "mps", "abacus"):
        for ask in (find_device, choose_device):
            with pytest.raises(ValueError, match=f"device='{name}' is not available"):
                ask(name)
    with pytest.raises(ValueError, match="device='mps' is not available"):
        evaluate("owner/model", "emoji", EvaluationConfig(device="mps"))


def test_a_gpu_beyond_the_last_is_not_there(machine: Any) -> None:
    machine(num_gpus=2)
    assert find_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="'cuda:2' is not available"):
        find_device("cuda:2")


def test_a_gpu_that_only_emulates_bfloat16_is_refused_by_its_name(
    machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_supported(including_emulation: bool = True) -> bool:
        return including_emulation

    machine(num_gpus=1)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    for precision in ("auto", "float32"):
        assert find_device("cuda", precision=precision) == torch.device("cuda")
    with pytest.raises(ValueError, match=r"GPU number 0.*does not compute in bfloat16"):
        find_device("cuda", precision="bfloat16")


def test_each_launched_process_takes_a_gpu_of_its_own(machine: Any) -> None:
    machine(num_gpus=2, mps=True, local_rank=3)
    for name in ("auto", "cuda"):
        assert find_device(name) == torch.device("cuda", 1)
    for name in ("cuda:0", "mps"):
        with pytest.raises(ValueError, match=r"is a single device.*Use 'auto' or 'cuda'"):
            find_device(name)
    machine(mps=True, local_rank=1)
    assert find_device("auto") == find_device("cpu") == torch.device("cpu")


def test_auto_is_the_cpu_where_the_launcher_says_so(
    machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(num_gpus=2, local_rank=1)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert find_device("auto") == torch.device("cpu")


def test_a_stage_runs_on_the_device_of_its_options_and_refuses_an_unknown_one() -> None:
    for device in ("auto", "cpu", "cuda", "cuda:1", "mps"):
        assert AlignConfig(device=device).device == device
    for device in ("gpu", "cuda:", "cuda:a", "cpu:0", ""):
        with pytest.raises(ValueError, match=r"device=.*: must be one of"):
            AlignConfig(device=device)
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("there", "name", "printed"),
    [
        ({}, "auto", ""),
        ({}, "cpu", ""),
        ({"num_gpus": 2}, "auto", "Device: cuda:0 (GPU number 0) (--device auto).\n"),
        ({"num_gpus": 2}, "cuda:1", "Device: cuda:1 (GPU number 1) (--device cuda:1).\n"),
        ({"num_gpus": 2}, "cpu", ""),
        ({"mps": True}, "auto", "Device: mps (--device auto).\n"),
    ],
)
def test_the_device_is_printed_where_there_was_something_to_choose(
    there: Any, name: str, printed: str, machine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    machine(**there)
    use_device(name)
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", printed)


def test_the_trainer_runs_on_the_device_that_was_named(tmp_path: Path) -> None:
    # "meta" takes the place of a GPU that is not the first, which transformers would never choose.
    for device in (torch.device("meta"), torch.device("cpu")):
        try:
            arguments = training_arguments_on(device, TrainingArguments, tmp_path, AlignConfig())
            trainer = Trainer(model=nn.Linear(2, 2), args=arguments)
            assert arguments.device == trainer.accelerator.device == PartialState().device == device
            assert next(trainer.model.parameters()).device == device
            assert arguments.use_cpu is (device.type == "cpu")
            assert arguments.n_gpu == (device.type != "cpu")  # more would be torch's DataParallel
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


def test_float64_is_computed_on_the_cpu_where_mps_has_none() -> None:
    on_mps: Any = SimpleNamespace(device=SimpleNamespace(type="mps"), cpu=lambda: torch.ones(2))
    assert to_float64(on_mps).dtype == to_float64(torch.ones(2)).dtype == torch.float64
    assert list_devices()[-1] == "cpu"


@pytest.mark.parametrize(
    ("instructions", "is_fast"),
    [({}, False), ({"avx512_f": True, "avx512_bf16": False}, False), ({"amx_bf16": True}, True),
     ({"avx512_bf16": True, "sse4a": False}, False), ({"avx512_bf16": True, "sse4a": True}, True),
     ({"neon": True, "bf16": True}, False)],
    ids=["none", "AVX-512", "AMX", "Intel without AMX", "AMD", "ARM"],
)  # fmt: skip
def test_a_cpu_multiplies_bfloat16_by_amx_or_if_amd_by_avx512(
    instructions: dict[str, bool], is_fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions, raising=False)
    cpu = torch.device("cpu")
    assert multiplies_bfloat16(cpu) == is_fast
    assert not multiplies_bfloat16(torch.device("mps"))
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")  # products then only emulate bfloat16
    assert not multiplies_bfloat16(cpu)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # an older torch
    assert not multiplies_bfloat16(cpu)
