"""What commands print while they work: lines of numbers, nothing raw, no warning of a library."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from aligning import Prepared
from modeling_llm2clip.training.progress import StepProgress, describe_seconds, list_numbers
from safetensors.torch import load_file
from tiny import tiny_model

from modeling_llm2clip.cli.library_warnings import hide_known_warnings
from modeling_llm2clip.data.embedding_store import StoreManifest
from modeling_llm2clip.data.embedding_store_writer import EmbeddingStoreWriter
from modeling_llm2clip.demo.feature_alignment import descend
from modeling_llm2clip.encoding import encode as captions
from modeling_llm2clip.encoding.encode import encode_texts
from modeling_llm2clip.training.alignment.alignment_report import NEAR_CHANCE
from modeling_llm2clip.training.extraction.extract import StoreProgress
from modeling_llm2clip.training.finetuning.lora_encoder import (
    CaptionEncoder,
    LoraArguments,
    write_lora,
)

ROOT = Path(__file__).parents[2]
NUMBER = r"-?[\d,.]+(e[+-]\d+)?"
STEP = re.compile(
    rf"step (\d+)/(\d+)(  (R@1 )?[a-zA-Z- ]+ {NUMBER}%?)*(  {NUMBER} (pairs|steps)/s)?"
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
    told = [stream.replace("\r", "\n").split("=== ")[1:] for stream in (done.stdout, done.stderr)]
    names = [part.splitlines()[0] for part in told[0]]
    return list(zip(names, *told, strict=True))


def find_steps(shown: str) -> list[str]:
    return [line.strip() for line in shown.splitlines() if line.strip().startswith("step ")]


@pytest.mark.slow
def test_no_command_prints_a_dictionary_or_a_warning(prepared: Prepared, tmp_path: Path) -> None:
    short = "--max-steps 6"
    data = prepared.data
    shown = run_commands(
        tmp_path,
        f"finetune-llm {prepared.model} {data} tuned {short} --per-device-train-batch-size 8 "
        "--num-held-out 4 --eval-steps 3 --save-steps 2 --gradient-checkpointing",
        f"extract tuned/model {data} captions --modality text",
        f"extract tuned/model {data} images --modality image",
        f"align tuned/model {data} aligned --caption-store captions --image-store images "
        f"{short} --global-batch-size 8 --logging-steps 2 --save-steps 2",
        f"align tuned/model {data} loras --text-training lora --vision-training lora {short} "
        "--global-batch-size 8 --logging-steps 3 --gradient-checkpointing --num-workers 1",
        f"evaluate ours=aligned/model --datasets folder={data} --tasks retrieval cra length",
        f"search aligned/model {data} dog",
        "doctor aligned/model",
        "export aligned/model exported",
    )
    for name, out, err in shown:
        for stream in (out, err):
            assert not re.search(r"\{['\"]", stream), (name, stream)
            # Six steps give a model that is near chance, which a user should read.
            assert "warning" not in stream.replace(NEAR_CHANCE, "").lower(), (name, stream)
            assert "deprecated" not in stream and "Failed to load" not in stream, (name, stream)
    steps = {name: find_steps(err) for name, _, err in shown}
    assert len(steps["finetune-llm"]) == 8  # one a step, and two measurements
    # Of the second run; the others are looks at the held-out images.
    losses = [line for line in steps["align"] if "  loss " in line]
    assert [line.split()[1] for line in losses] == ["1/6", "3/6", "6/6"]
    for lines in steps.values():
        assert all(STEP.fullmatch(line) for line in lines), lines
    assert all("  lr " in line for line in losses)
    assert all("  held-out loss " in line for line in steps["align"] if line not in losses)
    assert sum("held-out CRA " in line for line in steps["finetune-llm"]) == 2
    extracted = [err for name, _, err in shown if name == "extract"]
    assert " tokens/s" in extracted[0] and " images/s" in extracted[1]


def test_a_log_is_one_line_of_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    progress = StepProgress(300, first_step=30, pairs_per_step=64)
    progress.update(40)
    logs: dict[str, Any] = {
        "loss": 2.3149, "learning_rate": 9.1e-5, "grad_norm": 0.5, "note": "x", "total_flos": 0.0
    }  # fmt: skip
    progress.show(40, logs)
    progress.close({"mean loss": 2.5})
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    (line,) = find_steps("\n".join(lines))
    assert re.fullmatch(rf"step 40/300  loss 2\.315  lr 9\.1e-05  grad norm 0\.5  {NUMBER} pairs/s",
                        line)  # fmt: skip
    (last,) = (line for line in lines if line.startswith("10 steps in "))
    assert "  mean loss 2.5  " in last and last.endswith(" pairs/s")


def test_what_is_no_number_or_tells_nothing_is_not_shown() -> None:
    logs = {"eval_cra": 0.4375, "eval_runtime": 3.0, "eval_steps_per_second": 1.0, "name": "a"}
    assert list_numbers({**logs, "epoch": 1.25}) == ["held-out CRA 43.8%", "epoch 1.25"]


@pytest.mark.parametrize(
    ("seconds", "wanted"), [(4.04, "4.0 s"), (75.0, "1 min 15 s"), (3725.0, "1 h 2 min")]
)
def test_durations_are_told_in_their_largest_units(seconds: float, wanted: str) -> None:
    assert describe_seconds(seconds) == wanted


def test_the_descent_of_the_demo_shows_ten_lines(capsys: pytest.CaptureFixture[str]) -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    losses = ((weight**2).sum() for _ in range(40))
    descend(losses, [weight], steps=40, lr=1e-3, weight_decay=0.0, show_progress=True)
    lines = find_steps(capsys.readouterr().err.replace("\r", "\n"))
    assert len(lines) == 10 and lines[-1].startswith("step 40/40  loss ")
    assert all(STEP.fullmatch(line) for line in lines)


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


def test_a_continued_store_counts_the_tokens_that_are_left(tmp_path: Path) -> None:
    """And takes what an earlier run computed for no speed of this one."""
    lengths = [9, 7, 5, 3, 1]
    manifest = StoreManifest(
        content="caption_embeds", fingerprint={}, dtype="float32", dim=2, num_rows=5, num_items=5,
        rows_per_shard=2, plan={}, counts={}, index_bytes=1, index_sha256="",
    )  # fmt: skip
    writer = EmbeddingStoreWriter.open(tmp_path / "store", manifest, b"x")
    with writer.claim(0):
        writer.write_shard(0, torch.zeros(2, 2))
    progress = StoreProgress(writer, unit=" tokens", sizes=lengths, shown=True)
    assert (progress._bar.total, progress._bar.n, progress._bar.initial) == (25, 16, 16)
    with writer.claim(2):
        writer.write_shard(2, torch.zeros(1, 2))
    progress.recount(writer.list_missing())  # as when another process had done it
    assert progress._bar.n == 17
    progress.close()


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


def test_an_adapter_is_saved_without_asking_the_hub_for_its_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")  # which peft looks at, too
    model, processor = tiny_model()
    model.text_model.name_or_path = "owner/llm"  # no folder of this machine
    encoder = CaptionEncoder(model, processor, LoraArguments(rank=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # so would peft tell that it got no answer
        encoder.save(str(tmp_path / "checkpoint"))
        write_lora(encoder, tmp_path / "adapter", dtype=torch.float32, base_weights=None)
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert names and all("lora_" in name for name in names)
