"""Work of two processes for the tests of the alignment, each in a fresh interpreter."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode

from modeling_llm2clip.configs.align_config import AlignConfig
from modeling_llm2clip.processing_llm2clip import LLM2CLIPProcessor
from modeling_llm2clip.training.alignment.alignment_model import (
    AlignmentModel,
    choose_trained_parts,
)
from modeling_llm2clip.training.alignment.alignment_trainer import (
    AlignmentTrainer,
    ClampTemperatureCallback,
    RunLength,
)
from modeling_llm2clip.training.losses.pairs import ContrastiveLoss

NUM_ROWS = 8
# Some groups span both processes.
GROUP_IDS = torch.tensor([0, 1, 1, 2, 3, 0, 4, 3])


def load_trained(folder: Path) -> AlignmentModel:
    """Load the real module with everything trained except the LLM, which is not loaded."""
    model = AlignmentModel.from_pretrained(folder)
    model.loss = ContrastiveLoss()
    choose_trained_parts(model, AlignConfig(vision_training="full", layer_decay=1.0))
    return model.train()


def make_batch(folder: Path, records: list[Any]) -> dict[str, Tensor]:
    """Make a batch of the first images' pixels and random caption embeddings."""
    processor = LLM2CLIPProcessor.from_pretrained(folder)
    generator = torch.Generator().manual_seed(4)
    images = [str(record.path) for record in records[:NUM_ROWS]]
    return {
        "pixel_values": processor(images=images)["pixel_values"],
        "caption_embeds": torch.randn(NUM_ROWS, 32, generator=generator),
    }


def backward_module(model: torch.nn.Module, batch: dict[str, Tensor], part: slice) -> Tensor:
    """Run a forward and backward pass of a part of the batch through a module."""
    rows = {name: value[part] for name, value in batch.items()}
    loss, _ = model({**rows, "group_ids": GROUP_IDS[part]})
    loss.backward()
    return loss.detach()


def cache_gradients(
    model: AlignmentModel, wrapped: torch.nn.Module, batch: dict[str, Tensor], part: slice
) -> dict[str, Tensor]:
    """Run the part with two rows at a time through the towers; return all gradients."""
    wrapped.zero_grad()
    model.mini_batch_size = 2
    backward_module(wrapped, batch, part)
    return {
        name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad.clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def shard_and_step(model: AlignmentModel, batch: dict[str, Tensor], part: slice) -> dict[str, Any]:
    """Do the same with FSDP2, with half of the parameters on each process, and clamp."""
    mesh = init_device_mesh("cpu", (2,))
    for block in (*model.vision_model.encoder.layers, *model.text_adapter.blocks):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    loss = backward_module(model, batch, part)
    gradients = {
        name: parameter.grad.full_tensor()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    cached = cache_gradients(model, model, batch, part)
    with torch.no_grad():
        model.logit_scale.log_scale.fill_(9.0)
    ClampTemperatureCallback().on_optimizer_step(None, None, None, model=model)
    clamped = model.logit_scale.log_scale.full_tensor().detach()
    return {
        "sharded_loss": loss, "sharded": gradients, "clamped": clamped, "sharded_cached": cached,
        **collect_sharded(model),
    }  # fmt: skip


def collect_sharded(model: AlignmentModel) -> dict[str, Any]:
    """Collect the trained weights with a frozen tower, and count the gathered tensors."""
    model.vision_model.requires_grad_(False)
    trained = {name: p.full_tensor() for name, p in model.named_parameters() if p.requires_grad}
    trainer = AlignmentTrainer.__new__(AlignmentTrainer)
    trainer.alignment_model = trainer.model_wrapped = model
    trainer.is_fsdp_enabled, trainer.length = True, RunLength(1, NUM_ROWS, 0.1)
    with CommDebugMode() as communication:
        collected = trainer.collect_trained()
    count = communication.get_total_counts()
    return {"trained": trained, "collected": collected, "num_gathered": count}


def find_free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def work(rank: int, port: int, folder: Path, batch: dict[str, Tensor]) -> None:
    """Run half of the batch in its own process, and write the results to `folder/rank.pt`."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    from accelerate import Accelerator, DistributedDataParallelKwargs

    kwargs = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[kwargs])
    assert accelerator.num_processes == 2
    half = NUM_ROWS // 2
    part = slice(rank * half, (rank + 1) * half)
    model = load_trained(folder / "exported")
    wrapped = accelerator.prepare(model)
    assert type(wrapped).__name__ == "DistributedDataParallel"
    result: dict[str, Any] = {
        "module_loss": backward_module(wrapped, batch, part),
        "module": {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
    }
    result["module_cached"] = cache_gradients(model, wrapped, batch, part)
    result |= shard_and_step(load_trained(folder / "exported"), batch, part)
    torch.save(result, folder / f"{rank}.pt")
    accelerator.end_training()
