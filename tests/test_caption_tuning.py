"""Stage 1: batches without false negatives, distributed and cached equal plain, resume, merge."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from aligning import read_losses, read_tensorboard_losses
from safetensors.torch import load_file
from tiny import tiny_model
from torch.utils.data import ConcatDataset

from modeling_llm2clip.__main__ import main
from modeling_llm2clip.data.caption_groups import (
    CaptionGroup,
    TextPair,
    draw_pairs,
    group_captions,
    hold_out_groups,
    read_text_pairs,
)
from modeling_llm2clip.evaluation.caption_retrieval import measure_caption_retrieval
from modeling_llm2clip.hub.caption_adapter import merge_caption_adapter
from modeling_llm2clip.hub.export import export_model
from modeling_llm2clip.modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel
from modeling_llm2clip.processing_llm2clip import LLM2CLIPProcessor
from modeling_llm2clip.training import alike_pictures
from modeling_llm2clip.training import caption_contrastive as stage
from modeling_llm2clip.training.caption_contrastive import (
    NEGATIVES,
    TuneArguments,
    tune_captions,
)
from modeling_llm2clip.training.caption_encoder import LoraArguments
from modeling_llm2clip.training.checkpoints import find_last_checkpoint
from modeling_llm2clip.training.pair_batches import (
    KeyedBatchSampler,
    WeightedBatchSampler,
    count_steps,
    make_pair_table,
)

ROOT = Path(__file__).resolve().parent.parent
GROUPS = [
    CaptionGroup(f"picture {n}", tuple(f"{view} of {n} {n * 7 % 31}" for view in "abcde"))
    for n in range(24)
]
# Long enough for two checkpoints, short enough for a test.
SHORT = TuneArguments(
    steps=6, batch_size=8, lr=1e-2, warmup_steps=2, held_out=4, save_every=3, precision="float32"
)


def tune(output: Path, arguments: TuneArguments = SHORT, **settings):
    return tune_captions(*tiny_model(), GROUPS, output, arguments, **settings)


def make_table(num_keys: int = 10, *, shared: str | None = None):
    pairs = draw_pairs(GROUPS[:num_keys], seed=0)
    if shared:
        pairs = [replace(p, positive=shared) if n % 4 == 0 else p for n, p in enumerate(pairs)]
    return make_pair_table(pairs)


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("epoch", [0, 1])
def test_no_batch_of_all_processes_repeats_a_picture_or_a_text(num_processes, epoch):
    table = make_table(shared="the same words")
    sampler = KeyedBatchSampler(table, 3, drop_last=True, seed=1)
    sampler.num_processes, sampler.window_size = num_processes, 3 * num_processes
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler) == len(table) // (3 * num_processes) * num_processes
    for start in range(0, len(batches), num_processes):
        rows = [row for batch in batches[start : start + num_processes] for row in batch]
        assert len({table[row]["key"] for row in rows}) == len(rows)
        texts = [text for row in rows for text in (table[row]["anchor"], table[row]["positive"])]
        assert len(set(texts)) == len(texts)


def test_epochs_differ_and_repeat_with_the_seed():
    def draw(epoch):
        sampler = KeyedBatchSampler(make_table(), 5, drop_last=True, seed=3)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


def test_hard_batches_bring_alike_pictures_together_and_each_pair_once_an_epoch():
    table = make_table(12)  # two or three pairs of each picture
    keys = table["key"][:]
    names = list(dict.fromkeys(keys))
    alike = {name: names[n // 3 * 3 : n // 3 * 3 + 3] for n, name in enumerate(names)}
    alike = {name: [other for other in near if other != name] for name, near in alike.items()}
    sampler = KeyedBatchSampler(table, 6, drop_last=True, seed=2, alike=alike, num_alike=2)
    batches = list(sampler)
    rows = [row for batch in batches for row in batch]
    assert len(rows) == len(set(rows)) == len(table)

    def count_met(batches):
        return sum(
            any(keys[other] in alike[keys[row]] for other in batch)
            for batch in batches
            for row in batch
        )

    by_chance = count_met(KeyedBatchSampler(table, 6, drop_last=True, seed=2))
    assert count_met(batches) > 0.9 * len(rows) > by_chance


def test_the_most_alike_rows_are_those_of_the_whole_matrix_of_cosines(monkeypatch):
    monkeypatch.setattr(alike_pictures, "_ROWS_A_TILE", 3)
    vectors = torch.randn(8, 5)
    cosines = torch.cosine_similarity(vectors[:, None], vectors[None], dim=-1)
    cosines.fill_diagonal_(-2)
    assert torch.equal(alike_pictures.find_alike(vectors, 4), cosines.topk(4, dim=1).indices)


def test_a_pictures_vector_is_the_mean_of_its_captions_unit_vectors():
    vectors = {"a": [3.0, 0], "b": [0, 0.5], "c": [-2.0, 0], "d": [-1.0, 0]}
    encode = lambda texts: torch.tensor([vectors[text] for text in texts])  # noqa: E731
    groups = [CaptionGroup("x", ("a", "b")), CaptionGroup("y", ("c", "d", "d"))]
    found = alike_pictures.encode_groups(encode, groups)
    assert torch.equal(found, torch.tensor([[0.5, 0.5], [-1.0, 0.0]]))


def test_too_few_pictures_for_a_batch_are_refused_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match="20 different pictures are too few for a batch of 64"):
        tune(tmp_path / "run", replace(SHORT, batch_size=64))
    assert not (tmp_path / "run").exists()


def test_texts_that_can_fill_no_batch_are_refused_and_not_searched_forever():
    pairs = [TextPair(f"q{n}", f"q{n}", "the same positive") for n in range(9)]
    sampler = KeyedBatchSampler(make_pair_table(pairs), 2, drop_last=True)
    with pytest.raises(ValueError, match="only 1 fit"):
        next(iter(sampler))


def test_a_run_of_several_epochs_mixes_tables_by_weight():
    tables = [make_table(8), make_pair_table([TextPair(f"q{n}", f"q{n}", f"p{n}") for n in "abcd"])]
    samplers = [KeyedBatchSampler(table, 2, drop_last=True) for table in tables]
    weights = [1.0, 0.25]
    assert count_steps([24, 4], weights, 2) == [12, 3]
    sampler = WeightedBatchSampler(
        ConcatDataset(tables), samplers, weights=weights, num_steps=30, seed=5
    )
    batches = list(sampler)
    assert len(batches) == len(sampler) == 30
    for epoch in (batches[:15], batches[15:]):
        assert sum(row >= 24 for batch in epoch for row in batch) == 6
    assert batches[:15] != batches[15:]


def test_pairs_use_each_caption_once_and_an_odd_one_twice_at_most():
    pairs = draw_pairs([CaptionGroup("k", ("a", "b", "c"))], seed=0)
    used = [text for pair in pairs for text in (pair.anchor, pair.positive)]
    assert sorted(set(used)) == ["a", "b", "c"] and len(used) == 4
    assert all(pair.anchor != pair.positive for pair in pairs)


def test_held_out_captions_are_never_trained_on():
    groups = [CaptionGroup(str(n), ("shared", f"{n} one", f"{n} two")) for n in range(10)]
    trained, held_out, num_lost = hold_out_groups(groups, 4, seed=0)
    seen = {caption for group in held_out for caption in group.captions}
    assert len(held_out) == 4 and num_lost == 6
    assert not any(seen & set(group.captions) for group in trained)


def test_pictures_with_one_caption_are_counted_and_named():
    from modeling_llm2clip.data.captioned_images import CaptionedImage

    records = [
        CaptionedImage(
            picture=None, name=f"{n}.jpg", key=f"{n}.jpg", captions=("one",) * (n + 1),
            long_captions=(), keywords=(), lang="en", place=f"captions.jsonl line {n + 1}",
        )
        for n in range(2)
    ]  # fmt: skip
    with pytest.raises(
        ValueError, match=r"2 of 2 .* one caption only.*0\.jpg \(captions\.jsonl line 1\)"
    ):
        group_captions(records)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "not JSON"),
        ('{"query": "a", "positive": " "}', "non-blank"),
        ('{"query": "a", "positive": "b", "negatives": ["b"]}', "among its negatives"),
        ('{"query": "a", "positive": "b", "score": 1}', "unknown field 'score'"),
        ('{"query": "a", "positive": "b", "negatives": ["c"]}', "between 0 and 1 negatives"),
    ],
)
def test_broken_text_pairs_are_named_by_line(tmp_path, line, fault):
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"query": "a", "positive": "b"}\n' + line + "\n")
    with pytest.raises(ValueError, match=fault):
        read_text_pairs(file)


def test_caption_retrieval_counts_first_captions_that_find_their_second():
    vectors = {"a": [1.0, 0], "a2": [1.0, 0.1], "b": [0.0, 1], "b2": [1.0, 0.05]}
    groups = [CaptionGroup("a", ("a", "a2")), CaptionGroup("b", ("b", "b2"))]
    # "a" is nearer to "b2" than to "a2"; "b" is nearest to "a2": neither finds its own.
    encode = lambda texts: torch.tensor([vectors[text] for text in texts])  # noqa: E731
    assert measure_caption_retrieval(encode, groups) == 0.0
    vectors["b2"] = [0.1, 1.0]
    assert measure_caption_retrieval(encode, groups) == 1.0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    output = tmp_path_factory.mktemp("tuned") / "run"
    return output, tune(output)


def test_a_run_leaves_adapter_record_and_metrics(run):
    output, result = run
    assert result.adapter == output / "adapter" and result.exit_code == 0
    record = json.loads((output / "run.json").read_text())
    assert record["parameters"]["all"]["trainable"] > 0
    assert record["arguments"]["lora"]["rank"] == 16
    assert set(record["parameters"]) > {"text_model", "all"}
    losses = read_losses(output)
    assert len(losses) == 6 and losses[6] < losses[1]
    saved = json.loads((output / "caption_retrieval.json").read_text())
    assert saved["cra_before"] == result.cra_before and saved["num_trained"] == 20


def test_tensorboard_shows_the_losses_of_the_metrics(run):
    pytest.importorskip("tensorboard")
    output, _ = run
    # An event holds a float32, of 24 bits.
    assert read_tensorboard_losses(output) == pytest.approx(read_losses(output), rel=1e-7)


def test_a_run_left_to_choose_its_precision_is_the_one_in_float32_on_a_processor(run, tmp_path):
    tune(tmp_path / "run", replace(SHORT, precision="auto"))
    assert read_losses(tmp_path / "run") == read_losses(run[0])


def test_a_run_continued_from_its_checkpoint_ends_bit_for_bit_the_same(run, tmp_path):
    output, result = run
    again = tmp_path / "run"
    shutil.copytree(output, again)
    shutil.rmtree(again / "checkpoints" / "checkpoint-6")
    shutil.rmtree(again / "adapter")
    continued = tune(again, resume=True)
    assert continued.cra_before == result.cra_before
    ours, theirs = (load_file(o / "adapter" / "adapter_model.safetensors") for o in (output, again))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_hard_batches_from_an_adapter_begin_where_it_ended_and_resume_bit_for_bit(run, tmp_path):
    first = tmp_path / "first"
    hard = replace(SHORT, num_alike=3, lr=1e-3)
    result = tune(first, hard, start=run[1].adapter)
    assert result.cra_before == run[1].cra_after
    alike = load_file(first / "alike.safetensors")["alike"]
    assert alike.shape == (20, 6)  # twice as many as come together, of each trained picture
    again = tmp_path / "again"
    shutil.copytree(first, again)
    shutil.rmtree(again / "checkpoints" / "checkpoint-6")
    shutil.rmtree(again / "adapter")
    tune(again, hard, start=run[1].adapter, resume=True)
    weights = [load_file(o / "adapter" / "adapter_model.safetensors") for o in (first, again)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    with pytest.raises(ValueError, match="start: '"):
        tune(again, hard, resume=True)


def test_an_adapter_of_another_scale_is_no_start(run, tmp_path):
    other = replace(SHORT, lora=LoraArguments(alpha=16))
    with pytest.raises(ValueError, match=r"rank 16 and alpha 32, this run rank 16 and alpha 16"):
        tune(tmp_path / "run", other, start=run[1].adapter)


def test_another_runs_folder_is_refused_with_what_differs(run):
    with pytest.raises(ValueError, match=r"lr: 0\.01 then, 0\.02 now"):
        tune(run[0], replace(SHORT, lr=2e-2), resume=True)
    with pytest.raises(ValueError, match="--resume"):
        tune(run[0])
    with pytest.raises(ValueError, match="data: '"):
        tune_captions(*tiny_model(), GROUPS[1:], run[0], SHORT, resume=True)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (
            {"pairings": 0, "held_out": 0},
            "pairings=0, wanted at least 1; held_out=0|held_out=0.*pai",
        ),
        ({"adapter_dtype": "fp16"}, "adapter_dtype='fp16', wanted one of"),
        ({"lr": 0.0}, "lr=0.0, wanted more than 0"),
        ({"lr": math.inf, "scale": math.nan}, "lr=inf, wanted a finite number; scale=nan"),
    ],
)
def test_bad_settings_are_refused_before_anything_runs(settings, fault):
    with pytest.raises(ValueError, match=fault):
        replace(SHORT, **settings)


def test_a_gradient_that_is_not_finite_stops_before_the_step(tmp_path, monkeypatch):
    step = stage._Trainer.training_step

    def break_third_gradient(self, *args, **kwargs):
        loss = step(self, *args, **kwargs)
        if self.state.global_step == 2:
            trained = [p for p in self.encoder.parameters() if p.requires_grad]
            trained[0].grad[0, 0] = math.inf
        return loss

    monkeypatch.setattr(stage._Trainer, "training_step", break_third_gradient)
    with pytest.raises(FloatingPointError, match="gradient's norm is inf at step 2"):
        tune(tmp_path / "run")
    assert not (tmp_path / "run" / "adapter").exists()


def test_weights_that_are_not_finite_are_in_no_checkpoint(tmp_path):
    # A finite gradient, times a rate that float32 cannot hold in Adam's first step.
    with pytest.raises(FloatingPointError, match="weights are not finite after step 1"):
        tune(tmp_path / "run", replace(SHORT, lr=1e38, warmup_steps=0, steps=1))
    assert find_last_checkpoint(tmp_path / "run") is None


def test_merged_equals_unmerged(run, tmp_path):
    from peft import PeftModel

    model, processor = tiny_model()
    folder = export_model(model, processor, tmp_path / "base")
    merged = LLM2CLIPModel.from_pretrained(
        merge_caption_adapter(folder, run[1].adapter, tmp_path / "merged")
    )
    unmerged = LLM2CLIPModel.from_pretrained(folder)
    inputs = LLM2CLIPProcessor.from_pretrained(folder)(text=["a of 3", "b of 4 five"])
    before = unmerged.get_caption_embeds(**inputs)
    PeftModel.from_pretrained(unmerged.text_model, str(run[1].adapter))  # in place
    with torch.no_grad():
        adapted = unmerged.get_caption_embeds(**inputs)
        # One sum a weight in another order, over two layers, on values of about one.
        assert torch.allclose(merged.get_caption_embeds(**inputs), adapted, atol=1e-4)
    assert not torch.allclose(before, adapted, atol=1e-2)


def test_the_command_tunes_merges_and_refuses_one_caption_a_picture(tmp_path, capsys):
    folder = export_model(*tiny_model(), tmp_path / "base")
    data = tmp_path / "data" / "captions.jsonl"
    data.parent.mkdir()
    lines = [json.dumps({"key": g.key, "captions": g.captions}) for g in GROUPS]
    data.write_text("\n".join(lines))
    output = tmp_path / "tuned"
    flags = ["--steps", "2", "--batch-size", "4", "--held-out", "4", "--merge"]
    assert main(["tune-captions", str(folder), str(data), str(output), *flags]) == 0
    assert "Next: llm2clip extract" in capsys.readouterr().out
    assert (output / "model" / "model.safetensors").is_file()
    data.write_text('{"key": "a", "captions": ["one"]}\n{"key": "b", "captions": ["two"]}')
    assert main(["tune-captions", str(folder), str(data), str(tmp_path / "other"), *flags]) == 2
    error = capsys.readouterr().err
    assert "2 of 2 pictures have one caption only" in error
    assert "b (captions.jsonl line 2)" in error


def test_the_command_refuses_folder_and_batch_before_it_loads_the_llm(
    tmp_path, capsys, monkeypatch
):
    data = tmp_path / "data" / "captions.jsonl"
    data.parent.mkdir()
    data.write_text("\n".join(json.dumps({"key": g.key, "captions": g.captions}) for g in GROUPS))
    monkeypatch.setattr(
        LLM2CLIPTextModel, "from_pretrained", lambda *_, **__: pytest.fail("the LLM was loaded")
    )
    command = ["tune-captions", "a-model", str(data)]
    assert main([*command, str(tmp_path / "new"), "--batch-size", "1000"]) == 2
    assert "1000" in capsys.readouterr().err
    assert main([*command, str(data.parent), "--batch-size", "4"]) == 2
    assert "is not empty and holds no run.json" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_mixed_in_text_pairs_come_by_weight(tmp_path):
    others = [TextPair(f"q{n}", f"q{n}", f"p{n}", (f"n{n}",)) for n in range(9)]
    result = tune(tmp_path / "run", other_pairs=[(others, 0.5)])
    assert result.exit_code == 0


GRADIENTS = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from transformers import TrainerCallback
from tiny import tiny_model
from test_caption_tuning import GROUPS, SHORT
from modeling_llm2clip.training import caption_contrastive as stage

class Keep(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        if state.is_world_process_zero and state.global_step == 0:
            named = {n.removeprefix("module."): p.grad for n, p in model.named_parameters()
                     if p.grad is not None}
            torch.save(named, sys.argv[1])

def keeping(*arguments, **settings):
    trainer = make(*arguments, **settings)
    trainer.add_callback(Keep())
    # The second matrix of a LoRA starts at zero and would hide the first one's gradient.
    for name, p in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return trainer

make, stage._make_trainer = stage._make_trainer, keeping
mini = int(sys.argv[4]) or None
arguments = replace(SHORT, steps=1, batch_size=int(sys.argv[3]), mini_batch_size=mini,
                    negatives=sys.argv[5])
stage.tune_captions(*tiny_model(), GROUPS, Path(sys.argv[2]), arguments)
"""


def compute_gradients(
    folder: Path, *, processes: int = 1, mini_batch_size: int = 0, negatives: str = "both-ways"
):
    """Gradients of the first step, and its loss, with a batch of eight over all processes."""
    folder.mkdir()
    script = folder / "script.py"
    script.write_text(GRADIENTS)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [
        sys.executable, *(launch if processes > 1 else []), str(script), str(folder / "gradients"),
        str(folder / "run"), str(8 // processes), str(mini_batch_size), negatives,
    ]  # fmt: skip
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    subprocess.run(
        command, check=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    first = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[0])
    return torch.load(folder / "gradients", weights_only=True), first["loss"]


@pytest.mark.parametrize(
    ("negatives", "processes", "mini_batch_size"),
    [
        ("all-captions", 2, 3),
        pytest.param("both-ways", 2, 0, marks=pytest.mark.slow),
        pytest.param("all-captions", 1, 3, marks=pytest.mark.slow),
    ],
)
def test_two_processes_and_cached_gradients_equal_one_whole_batch(
    tmp_path, negatives, processes, mini_batch_size
):
    whole, loss = compute_gradients(tmp_path / "whole", negatives=negatives)
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


def test_every_choice_of_negatives_is_known():
    assert set(NEGATIVES) == {"one-way", "both-ways", "all-captions"}
    with pytest.raises(ValueError, match="all-captions"):
        replace(SHORT, negatives="none")


STOPPED = """
import sys
from dataclasses import replace
from pathlib import Path
from tiny import tiny_model
from test_caption_tuning import GROUPS, SHORT
from modeling_llm2clip.training.caption_contrastive import tune_captions

arguments = replace(SHORT, steps=10_000, save_every=5_000)
sys.exit(tune_captions(*tiny_model(), GROUPS, Path(sys.argv[1]), arguments).exit_code)
"""


def test_a_signal_finishes_the_step_saves_and_exits_with_its_code(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(STOPPED)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    metrics = tmp_path / "run" / "metrics.jsonl"
    with subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        while process.poll() is None and not metrics.is_file():
            pass
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 143
    assert len(list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))) == 1
    assert not (tmp_path / "run" / "adapter").exists()
