"""Laws of what `benchmarks/training/finetuning_ideas.py` measures and trains with."""

from __future__ import annotations

import argparse
import json
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_model
from torch import Tensor
from tuning import RECORDS, SHORT, tune

from modeling_llm2clip.data.captions.caption_groups import group_captions


def test_the_cosine_of_joined_embeddings_is_the_weighted_mean_of_the_cosines() -> None:
    from benchmarks.training.finetuning_ideas import join

    torch.manual_seed(0)
    wide, narrow = torch.randn(2, 8), 100 * torch.randn(2, 3)  # lengths must not weigh
    wanted = sum(
        share * F.cosine_similarity(part[0], part[1], dim=0)
        for share, part in ((0.25, wide), (0.75, narrow))
    )
    joined = join(wide, narrow, shares=(0.25, 0.75))
    # Rounding of float32 alone.
    assert torch.allclose(joined[0] @ joined[1], torch.as_tensor(wanted), atol=1e-6)


def test_the_order_of_a_file_does_not_change_what_is_held_out(tmp_path: Path) -> None:
    from benchmarks.training.finetune_llm import load_in_order

    held_out = []
    for number, records in enumerate((RECORDS, RECORDS[::-1])):
        lines = [json.dumps({"group_id": r.group_id, "captions": r.captions}) for r in records]
        file = tmp_path / str(number) / "captions.jsonl"
        file.parent.mkdir()
        file.write_text("\n".join(lines), encoding="utf-8")
        held_out.append([*group_captions(load_in_order(file)).hold_out(4, seed=0)[1]])
    assert held_out[0] == held_out[1] and len(held_out[0]) == 4


def test_a_student_that_agrees_with_its_teacher_has_the_plain_loss() -> None:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    from benchmarks.training.finetuning_ideas import TEACHER_SCALE, DistillationLoss

    torch.manual_seed(0)
    anchors, positives = torch.randn(2, 4, 8)
    features = [{"sentence_embedding": side} for side in (anchors, positives)]
    plain = MultipleNegativesRankingLoss(torch.nn.Identity(), scale=TEACHER_SCALE)
    loss = DistillationLoss(plain)
    wanted = plain.compute_loss_from_embeddings([anchors, positives], None)
    agreeing = torch.stack([anchors, positives], dim=1)
    # A sum of probabilities differs from one by rounding.
    assert torch.allclose(loss(features, 3 * agreeing), wanted, atol=1e-5)
    assert loss(features, agreeing.flip(0)) > wanted + 0.01


def test_a_wrong_caption_is_compared_with_the_query_and_the_right_one() -> None:
    from benchmarks.training.finetuning_ideas import describe_errors, find_words

    assert find_words("A Dog, and the ball!") == {"dog", "ball"}
    first = [{"dog", "ball"}, {"cat", "sofa"}, {"bus"}]
    second = [{"puppy"}, {"cat", "couch"}, {"bus", "red"}]
    # Right; as many shared words as the right one, with half of its words; without any.
    found = describe_errors(first, [*second, {"cat", "sofa", "couch"}], torch.tensor([0, 3, 0]))
    assert found == {"errors": 2, "same_words": 0, "half_of_words": 0.5, "fits_as_well": 0.5}


def test_pairs_are_captions_or_sentences_of_one_image(tmp_path: Path) -> None:
    from benchmarks.training.finetuning_ideas import read_pairs

    sentences = [f"This is sentence number {number} of a long description." for number in range(8)]
    captions = [["one", "two", "one"], ["alone"], [" ".join(sentences)]]
    file = tmp_path / "captions.jsonl"
    lines = [json.dumps({"captions": texts}) for texts in captions]
    file.write_text("\n".join(lines), encoding="utf-8")
    (short, other), long = read_pairs(file)
    assert {short, other} == {"one", "two"}
    assert len(set(long)) == 2 and set(long) <= set(sentences)


def embed_by_checksum(texts: list[str]) -> Tensor:
    rows = [np.random.default_rng(zlib.crc32(text.encode())).normal(size=6) for text in texts]
    return torch.from_numpy(np.array(rows, np.float32))


@pytest.mark.slow
def test_every_idea_trains_the_lora_it_starts_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import benchmarks.training.finetuning_ideas as script

    lines = [json.dumps({"group_id": r.group_id, "captions": r.captions}) for r in RECORDS]
    for folder in ("captions", "texts", "work"):
        (tmp_path / folder).mkdir()
    (tmp_path / "captions" / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    others = [json.dumps({"captions": [f"{n} more", f"others {n}"]}) for n in range(20)]
    (tmp_path / "texts" / "captions.jsonl").write_text("\n".join(others), encoding="utf-8")
    lora = tune(tmp_path / "first").lora
    steps = replace(SHORT, init_lora=lora, save_steps=1, report_to=("none",))
    # Parts of this size stand in for the real ones; the LLM is tiny and random.
    for name, value in {
        "build": lambda bidirectional: tiny_model(bidirectional=bidirectional), "LORA": lora,
        "STEPS": steps, "SECOND_ROUND": replace(steps, num_hard_negatives=2), "LARGE_BATCH": 16,
    }.items():  # fmt: skip
        monkeypatch.setattr(script, name, value)
    bench = script.Bench(
        argparse.Namespace(
            captions=tmp_path / "captions",
            mpnet=None,
            texts=[tmp_path / "texts"],
            work=tmp_path / "work",
            steps=4,
            output=tmp_path / "ideas.json",
        )
    )
    bench.minilm = bench.mpnet = embed_by_checksum
    found = {
        name: idea(bench) for name, idea in script.IDEAS.items() if "measure" not in idea.__name__
    }
    assert list(found) == ["control", "distilled", "rank_64", "more_texts", "large_batches"]
    assert found["more_texts"]["num_pairs"] == len(others)
    for name, idea in found.items():
        [(steps_taken, scores)] = idea["rows"].items()
        assert steps_taken == ("2 steps" if name == "large_batches" else "4 steps")
        assert 0 <= scores["cra"]["value"] <= 1
    # The same start and the same batches: each idea changes what is learned.
    folders = [tmp_path / "work" / name / "checkpoints" for name in found]
    last = [max(folder.glob("checkpoint-*")) / "adapter_model.safetensors" for folder in folders]
    assert len({file.read_bytes() for file in last}) == len(found)
