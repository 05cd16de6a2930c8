"""What commands print while they work: one line per stage, nothing raw, no warning of a library."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import warnings
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from aligning import Prepared
from safetensors.torch import load_file
from tiny import tiny_model
from transformers import TrainerControl, TrainerState

from modeling_llm2clip._library_warnings import hide_known_warnings
from modeling_llm2clip.configs.finetune_config import FinetuneConfig
from modeling_llm2clip.data.store.store_manifest import StoreManifest
from modeling_llm2clip.embedding.shard_computation import open_bar
from modeling_llm2clip.embedding.sharded_writer import begin_output
from modeling_llm2clip.embedding.store_writer import StoreWriter
from modeling_llm2clip.encoding import batches as captions
from modeling_llm2clip.encoding.encode import encode_texts
from modeling_llm2clip.training.alignment.alignment_report import NEAR_CHANCE
from modeling_llm2clip.training.finetuning.finetune_trainer import (
    CaptionEncoder,
    make_lora_config,
    write_lora,
)
from modeling_llm2clip.training.trainer_mixins import ProgressCallback, describe_numbers

ROOT = Path(__file__).parents[2]
NUMBER = r"-?[\d,.]+(e[+-]\d+)?%?"
# As tqdm draws it: share, bar, steps, time, rate, numbers.
BAR = re.compile(
    rf"(?P<stage>[a-z-]+): +\d+%\|.*\| (?P<step>\d+)/(?P<steps>\d+) \[.*(steps/s|s/ steps)"
    rf"(, [\w @-]+={NUMBER})*\]"
)
# Commands, each of which finds what the ones before it wrote; run in one process, which imports
# torch once. Their own warnings are shown, as they would be in a terminal.
RUN_COMMANDS = """
import json, sys
from modeling_llm2clip.__main__ import main
for words in json.loads(sys.stdin.read()):
    print("===", words[0], flush=True)
    print("===", words[0], file=sys.stderr, flush=True)
    code = main(words)
    assert code == 0, (words, code)
"""


def run_commands(folder: Path, *lines: str) -> list[tuple[str, str, str]]:
    """Name, stdout and stderr of each command; what a bar overwrote is lines of its own."""
    done = subprocess.run(
        [sys.executable, "-c", RUN_COMMANDS], cwd=folder, text=True, capture_output=True,
        input=json.dumps([line.split() for line in lines]), timeout=240,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    streams = [text.replace("\r", "\n").split("=== ")[1:] for text in (done.stdout, done.stderr)]
    names = [part.splitlines()[0] for part in streams[0]]
    return list(zip(names, *streams, strict=True))


def find_bars(shown: str, stage: str) -> list[str]:
    return [line.strip() for line in shown.splitlines() if line.strip().startswith(f"{stage}:")]


@pytest.mark.slow
def test_no_command_prints_a_dictionary_or_a_warning(prepared: Prepared, tmp_path: Path) -> None:
    short = "--max-steps 6"
    data = prepared.data
    shown = run_commands(
        tmp_path,
        f"finetune-llm {prepared.model} {data} tuned {short} --per-device-train-batch-size 8 "
        "--num-held-out 4 --save-steps 2 --gradient-checkpointing",
        f"extract tuned/model {data} captions --modality text",
        f"extract tuned/model {data} images --modality image",
        f"align tuned/model {data} aligned --caption-store captions --image-store images "
        f"{short} --global-batch-size 8 --logging-steps 2 --save-steps 2",
        f"align tuned/model {data} loras --text-training lora --vision-training lora {short} "
        "--global-batch-size 8 --logging-steps 3 --gradient-checkpointing --num-workers 1",
        f"evaluate ours=aligned/model --datasets folder={data} --tasks retrieval cra length",
        f"index aligned/model {data} my-index",
        "search my-index dog",
        "doctor aligned/model",
        "export aligned/model exported",
    )
    for name, out, err in shown:
        for stream in (out, err):
            assert not re.search(r"\{['\"]", stream), (name, stream)
            # Six steps give a model that is near chance, which a user should read.
            assert "warning" not in stream.replace(NEAR_CHANCE, "").lower(), (name, stream)
            assert "deprecated" not in stream and "Failed to load" not in stream, (name, stream)
    for name, _, err in shown[:1] + shown[3:5]:
        bars = [BAR.fullmatch(line) for line in find_bars(err, name)]
        assert all(bars), find_bars(err, name)
        assert bars[-1]["step"] == bars[-1]["steps"] == "6"
        assert " loss=" in bars[-1][0] and " lr=" in bars[-1][0]
        held_out = "loss=" if name == "finetune-llm" else "held-out loss="
        assert held_out in bars[-1][0]
    extracted = [err for name, _, err in shown if name == "extract"]
    assert " texts/s" in extracted[0] and " images/s" in extracted[1]


def test_a_run_is_one_line_with_its_latest_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    progress = ProgressCallback("align")
    state, control = TrainerState(max_steps=300, global_step=30), TrainerControl()
    arguments: Any = None
    progress.on_train_begin(arguments, state, control)
    for step, loss in ((40, 2.5), (50, 2.3149)):
        state.global_step = step
        progress.on_step_end(arguments, state, control)
        logs = {"loss": loss, "learning_rate": 9.1e-5, "grad_norm": 0.5, "total_flos": 0.0}
        progress.on_log(arguments, state, control, logs=logs)
    progress.on_train_end(arguments, state, control)
    line = capsys.readouterr().err.split("\r")[-1].strip()
    found = BAR.fullmatch(line)
    assert found and (found["step"], found["steps"]) == ("50", "300")
    assert line.endswith("loss=2.315, lr=9.1e-05]")


def test_times_and_sums_of_a_log_are_not_shown() -> None:
    logs = {"eval_cra": 0.4375, "eval_runtime": 3.0, "eval_steps_per_second": 1.0, "epoch": 1.25}
    assert describe_numbers(logs) == {"held-out CRA": "43.8%"}


def test_the_progress_of_captions_is_in_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token is about as much work, and the longest captions come first."""
    bars = []

    class Bar(captions.tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.seen: list[float] = []
            bars.append(self)

        def update(self, n: float | None = 1) -> bool | None:
            self.seen.append(n or 0)
            return super().update(n)

    monkeypatch.setattr(captions, "tqdm", Bar)
    model, processor = tiny_model()
    texts = ["a dog", "two red apples on a wooden table by the window", "x", "a dog"]
    lengths = [len(row) for row in processor.list_ids(list(dict.fromkeys(texts)))[0]]
    encode_texts(
        model, processor, texts, token_budget=max(lengths), show_progress=True, project=False
    )
    (bar,) = bars
    assert bar.total == bar.n == sum(lengths)
    assert bar.unit == " tokens" and bar.seen[0] == max(lengths)


def test_a_continued_store_counts_the_rows_that_are_left(tmp_path: Path) -> None:
    """And takes what an earlier run computed for no speed of this one."""
    planned = StoreManifest(
        content="caption_embeds", fingerprint={}, dtype="float32", dim=2, num_inputs=5,
        rows_per_shard=2, plan={},
    )  # fmt: skip
    begin_output(tmp_path, planned)
    writer = StoreWriter(tmp_path, planned)
    writer.write(0, torch.zeros(2, 2))
    missing = writer.list_missing()
    with closing(open_bar(writer, range(3), missing, "extract text", shown=True)) as bar:
        assert (bar.total, bar.n, bar.initial) == (5, 2, 2)
        assert bar.unit == " texts"


def test_other_words_of_a_library_are_shown() -> None:
    hide_known_warnings()
    hide_known_warnings()
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    known = "Failed to load CPU gemm_4bit_forward from kernels-community: %s"
    make = logging.LogRecord
    assert not logger.filter(make("x", logging.WARNING, "", 0, known, ("no kernels",), None))
    assert logger.filter(make("x", logging.WARNING, "", 0, "Failed to load the weights", (), None))
    assert len(logger.filters) == 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hide_known_warnings()
        for words in ("`is_gradient_checkpointing` is deprecated and", "`other` is deprecated"):
            warnings.warn_explicit(words, FutureWarning, "f.py", 1, "transformers.modeling_utils")
        warnings.warn_explicit(
            "`is_gradient_checkpointing` is deprecated", FutureWarning, "f.py", 1, "modeling"
        )
    assert len(caught) == 2


def test_a_lora_is_saved_without_asking_the_hub_for_its_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")  # which peft looks at, too
    model, processor = tiny_model()
    model.text_model.name_or_path = "owner/llm"  # no folder of this machine
    encoder = CaptionEncoder(model, processor, make_lora_config(FinetuneConfig(lora_rank=2)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # so would peft tell that it got no answer
        encoder.save(str(tmp_path / "checkpoint"))
        write_lora(encoder, tmp_path / "lora", dtype=torch.float32, base_weights=None)
    names = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert names and all("lora_" in name for name in names)
