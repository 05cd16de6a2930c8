"""All processes of a launcher join a run, or it is refused."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from launches import run_python
from transformers import TrainingArguments
from tuning import SHORT, tune

from modeling_llm2clip.configs.align_config import AlignConfig
from modeling_llm2clip.scheduling.processes import (
    LONGEST_WAIT,
    join_processes,
    refuse_lone_launch,
    require_all_processes,
    warn_of_idle_gpus,
)
from modeling_llm2clip.training.alignment.alignment_trainer import make_training_arguments
from modeling_llm2clip.training.finetuning.pair_sampling import PairCollator

ROOT = Path(__file__).resolve().parents[2]


def test_a_single_process_of_several_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    PartialState(cpu=True)
    join_processes(cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        RuntimeError, match=r"started 2 processes .* accelerate uses only 1\..*--device"
    ):
        join_processes(cpu=True)
    require_all_processes(2)


@pytest.mark.parametrize(
    ("variables", "is_refused"),
    [
        ({"ACCELERATE_DYNAMO_USE_FULLGRAPH": "False", "MASTER_ADDR": "127.0.0.1"}, True),
        ({"ACCELERATE_DYNAMO_USE_FULLGRAPH": "False"}, False),  # one process was asked for
        ({"MASTER_ADDR": "127.0.0.1"}, False),  # no launcher: a cluster that sets it for all
    ],
)
def test_one_process_is_refused_if_several_were_requested(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], is_refused: bool
) -> None:
    for name in ("ACCELERATE_DYNAMO_USE_FULLGRAPH", "MASTER_ADDR", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    refuse_lone_launch(2)
    if not is_refused:
        refuse_lone_launch(1)
        return
    with pytest.raises(RuntimeError, match=r"several processes.*--multi_gpu.*ddp\.yaml"):
        refuse_lone_launch(1)


def test_the_trainer_of_the_alignment_stays_on_the_device_of_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for kind in (torch.cuda, torch.xpu, torch.backends.mps):
        monkeypatch.setattr(kind, "is_available", lambda: False)
    assert make_training_arguments(tmp_path, AlignConfig()).use_cpu


def test_one_process_has_the_same_batch_size_on_a_machine_with_many_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish, collate = TrainingArguments.__post_init__, PairCollator.__call__
    sizes = []

    def see_three(self: Any) -> None:
        finish(self)
        self._n_gpu = 3  # for one process, as far as a Trainer knows

    def note(self: Any, rows: list[Any]) -> Any:
        sizes.append(len(rows))
        return collate(self, rows)

    monkeypatch.setattr(TrainingArguments, "__post_init__", see_three)
    monkeypatch.setattr(PairCollator, "__call__", note)
    tune(tmp_path / "run", replace(SHORT, max_steps=2, per_device_train_batch_size=4))
    assert sizes == [4, 4]
    assert make_training_arguments(tmp_path, AlignConfig()).n_gpu <= 1  # 0 on the CPU


def test_unused_gpus_trigger_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.warns(UserWarning, match=r"1 of 3 GPUs are used.*--num_processes 3"):
        warn_of_idle_gpus(torch.device("cuda"), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_idle_gpus(torch.device("cuda"), 3)
        warn_of_idle_gpus(torch.device("cpu"), 1)


TOGETHER = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from tiny import tiny_model
from tuning import GROUPS
from modeling_llm2clip.encoding.encode import encode_texts
from modeling_llm2clip.training.finetuning.nearest_groups import (
    encode_groups,
    encode_groups_together,
)
from modeling_llm2clip.scheduling.processes import join_processes

state, model = join_processes(cpu=True), tiny_model()
counts = []

def encode(captions):
    counts.append(len(captions))
    return encode_texts(*model, captions, project=False)

groups = [list(group.captions) for group in GROUPS[:7]]
[together] = encode_groups_together(encode, groups)
torch.save(
    {
        "together": together, "alone": encode_groups(encode, groups), "counts": counts,
        "wait": dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout,
    },
    Path(sys.argv[1]) / f"{state.process_index}.pt",
)
state.wait_for_everyone()
"""


@pytest.mark.slow
def test_processes_share_the_encoding_for_hard_batches_with_a_timeout_of_hours(
    tmp_path: Path,
) -> None:
    script = tmp_path / "script.py"
    script.write_text(TOGETHER)
    run_python(script, tmp_path, processes=2)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    assert torch.equal(found[0]["together"], found[1]["together"])
    # Five captions per group: four groups here, three there, then all seven by itself.
    assert [each["counts"] for each in found] == [[20, 35], [15, 35]]
    for each in found:
        assert each["wait"] == LONGEST_WAIT
        # Other batches, so sums in another order, of unit embeddings.
        torch.testing.assert_close(each["together"], each["alone"], atol=1e-5, rtol=0)
