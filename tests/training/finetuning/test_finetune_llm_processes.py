"""Stage 1 on several processes equals stage 1 on one."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from aligning import read_losses
from launches import run_python

ROOT = Path(__file__).resolve().parents[3]

GRADIENTS = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from accelerate import PartialState
from transformers import TrainerCallback
from tuning import RECORDS, SHORT, tune
from modeling_llm2clip.training.finetuning import finetune_llm as stage
from modeling_llm2clip.training.finetuning import finetune_trainer

state, folder = PartialState(cpu=True), Path(sys.argv[1])

class Keep(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        if state.is_world_process_zero and state.global_step == 0:
            named = {n.removeprefix("module."): p.grad for n, p in model.named_parameters()
                     if p.grad is not None}
            torch.save(named, folder / "gradients")

def keeping(*arguments):
    trainer = make(*arguments)
    trainer.add_callback(Keep())
    # The second matrix of a LoRA starts at zero and would hide the first one's gradient.
    for name, p in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return trainer

def writing(adapted, output):
    with (folder / f"written by {state.process_index}").open("a") as file:
        print(output, file=file)
    write(adapted, output)

make, stage.make_trainer = stage.make_trainer, keeping
write, finetune_trainer._save_lora = finetune_trainer._save_lora, writing
mini = int(sys.argv[3]) or None
config = replace(SHORT, max_steps=1, save_steps=1, per_device_train_batch_size=int(sys.argv[2]),
                 mini_batch_size=mini, negatives=sys.argv[4])
stage.check_finetuning(RECORDS, config)
tune(folder / "run", config)
"""


def compute_gradients(
    folder: Path, *, processes: int = 1, mini_batch_size: int = 0, negatives: str = "symmetric"
) -> tuple[dict[str, torch.Tensor], float]:
    """Gradients of the first step, and its loss, with a batch of eight over all processes."""
    folder.mkdir()
    script = folder / "script.py"
    script.write_text(GRADIENTS)
    words = (8 // processes, mini_batch_size, negatives)
    run_python(script, folder, *words, processes=processes)
    # All processes check, but only one writes.
    assert [file.name for file in folder.glob("written by *")] == ["written by 0"]
    assert len(list((folder / "run" / "checkpoints").glob("checkpoint-*"))) == 1
    return torch.load(folder / "gradients", weights_only=True), read_losses(folder / "run")[1]


@pytest.fixture(scope="module")
def compute_whole(tmp_path_factory):
    """Return the same for one process, by `negatives`."""
    root = tmp_path_factory.mktemp("whole")
    return cache(lambda negatives: compute_gradients(root / negatives, negatives=negatives))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("negatives", "processes", "mini_batch_size"),
    [("all", 2, 3), ("symmetric", 2, 0), ("all", 1, 3)],
)
def test_two_processes_and_cached_gradients_equal_one_whole_batch(
    tmp_path, compute_whole, negatives, processes, mini_batch_size
):
    whole, loss = compute_whole(negatives)
    other, other_loss = compute_gradients(
        tmp_path / "other",
        processes=processes,
        mini_batch_size=mini_batch_size,
        negatives=negatives,
    )
    assert whole.keys() == other.keys() and len(whole) == 28
    assert other_loss == pytest.approx(loss, abs=1e-4)  # logged with four digits
    for name, gradient in whole.items():
        # float32 sums in another order, times the scale of 50.
        assert torch.allclose(other[name], gradient, rtol=1e-3, atol=1e-5), name
