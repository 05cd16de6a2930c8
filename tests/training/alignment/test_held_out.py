"""Stage 3, images that training never sees: they choose the best weights, and warn."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from aligning import EndAfter, Prepared, names_that_differ, read_metrics, weights_of
from safetensors import safe_open
from transformers import TrainerCallback

from modeling_llm2clip import LLM2CLIPConfig
from modeling_llm2clip._suggestions import counted
from modeling_llm2clip.configs.encoding_config import ExtractConfig
from modeling_llm2clip.configs.finetune_config import FinetuneConfig
from modeling_llm2clip.data.sealed_manifest import read_sealed
from modeling_llm2clip.embedding.extract import extract
from modeling_llm2clip.heads_llm2clip import LogitRule
from modeling_llm2clip.training.alignment import held_out as held_out_module
from modeling_llm2clip.training.alignment.alignment_data import AlignmentDataset
from modeling_llm2clip.training.alignment.alignment_report import (
    CLEARLY_LOWER,
    NEAR_CHANCE,
    SEEN,
    TUNED_ON,
    describe_alignment,
    make_caution,
)
from modeling_llm2clip.training.alignment.best_weights import BEST_FILE
from modeling_llm2clip.training.alignment.held_out import (
    HeldOutImages,
    HeldOutScores,
    choose_held_out,
)
from modeling_llm2clip.training.finetuning.finetune_llm import finetune_llm
from modeling_llm2clip.training.losses.loss import LossInputs
from modeling_llm2clip.training.losses.pairs import ContrastiveLoss, SigmoidLoss
from modeling_llm2clip.training.run_folder import add_results


@pytest.mark.slow
def test_small_data_ends_no_lower_than_its_start(colored: Prepared, tmp_path: Path) -> None:
    run = colored.align_stored(tmp_path / "run", max_steps=40)
    assert run.after.loss <= run.before.loss
    losses = {0: run.before.loss, **read_metrics(run.output, "held_out_loss")}
    # Weights on the way to those of a step, which are not logged, may be better than any step's.
    if run.results["held_out"]["best_share"] == 1:
        assert run.after.loss == min(losses.values()) == losses[run.best_step]
    else:
        assert run.after.loss < min(losses.values())


@pytest.mark.slow
def test_a_run_that_gets_worse_returns_its_start(few: Prepared, tmp_path: Path) -> None:
    # Nothing is learned before the text adapter joins, after a quarter of the run.
    run = few.align_stored(
        tmp_path / "run", max_steps=100, learning_rate=1.0, eval_steps=1, early_stopping_patience=3
    )
    assert (run.best_step, run.results["steps"], run.after) == (0, 25 + 3, run.before)
    assert not LLM2CLIPConfig.from_pretrained(run.model).random_heads
    start = weights_of(few.align_stored(tmp_path / "other", max_steps=1, learning_rate=1e-30).model)
    for name, value in weights_of(run.model).items():
        # A step of 1e-30 rounds to none, but for what Adam divides by.
        torch.testing.assert_close(value, start[name], rtol=1e-6, atol=1e-6)


def test_the_last_step_is_kept_by_choice_even_if_the_start_was_better(
    few: Prepared, tmp_path: Path
) -> None:
    """As in a paper that trains for a fixed number of epochs; the scores still show."""
    options: dict[str, Any] = {
        "max_steps": 12, "eval_steps": 3, "learning_rate": 1.0, "early_stopping_patience": 1,
        "choose_by": "last_step", "refit": False,
    }  # fmt: skip
    run = few.align_stored(tmp_path / "run", **options)
    assert list(read_metrics(run.output, "held_out_loss")) == [3, 6, 9, 12]
    assert (run.best_step, run.results["steps"]) == (12, 12)
    assert run.results["held_out"]["best_share"] == 1 and run.after.loss > run.before.loss
    said = "The option choose_by=last_step chose the weights of step 12 of 12."
    assert said in describe_alignment(run.output)
    # They are the last weights indeed: those that the last checkpoint holds.
    resumed = few.align_stored(run.copy_without_model(tmp_path / "other"), resume=True, **options)
    assert not names_that_differ(resumed.model, run.model)
    # No weights are written that a later step replaces.
    killed, options = tmp_path / "killed", {**options, "save_steps": 4}
    with pytest.raises(KeyboardInterrupt):
        few.align_stored(killed, callbacks=[EndAfter(7)], **options)
    with safe_open(killed / BEST_FILE, framework="pt") as file:
        assert read_sealed(file.metadata()["held_out"])["best_step"] == 0
    again = few.align_stored(killed, resume=True, **options)
    assert not names_that_differ(again.model, run.model)


class StopAtSeven(TrainerCallback):
    def on_step_end(self, _: Any, state: Any, control: Any, **__: Any) -> None:
        control.should_training_stop = state.global_step == 7


def test_the_last_step_is_kept_even_if_a_callback_ends_the_run(
    few: Prepared, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "max_steps": 12, "eval_steps": 3, "choose_by": "last_step", "refit": False
    }  # fmt: skip
    run = few.align_stored(tmp_path / "run", callbacks=[StopAtSeven()], **options)
    assert run.best_step == run.results["steps"] == 7
    assert list(read_metrics(run.output, "held_out_loss")) == [3, 6, 7]


@pytest.fixture(scope="module")
def dataset(few: Prepared) -> AlignmentDataset:
    return few.dataset(None, "caption", "image")


def test_held_out_images_are_not_trained_on(dataset: AlignmentDataset) -> None:
    items, held_out = (part.tolist() for part in choose_held_out(dataset.records, 0.1, seed=0))
    # A tenth of 60 is too few to tell models apart, and more than a fifth would be missed.
    assert len(held_out) == 12 and not set(items) & set(held_out)
    assert sorted([*items, *held_out]) == list(range(60))
    assert choose_held_out(dataset.records, 0.1, seed=1)[1].tolist() != held_out
    everything, nothing = choose_held_out(dataset.records, 0.0, seed=0)
    assert (everything.tolist(), nothing.tolist()) == (list(range(60)), [])


@pytest.mark.parametrize(
    ("num_fitted", "loss"),
    [(2_000, ContrastiveLoss()), (40, ContrastiveLoss()), (2_000, SigmoidLoss(logit_bias=-10.0))],
)
def test_the_held_out_loss_is_that_of_the_best_temperature(
    dataset: AlignmentDataset, num_fitted: int, loss: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_out_module, "_MAX_ROWS_OF_TEMPERATURE", num_fitted)
    held_out = HeldOutImages(dataset, range(60))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(len(held_out.group_ids), 8, generator=generator)
    texts = images + 0.5 * torch.randn(images.shape, generator=generator)
    images, texts = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)
    inputs = LossInputs(images, texts, LogitRule(torch.ones(1)), held_out.group_ids)
    with torch.no_grad():
        scales = torch.arange(1.0, 100.0).tolist()
        losses = [float(loss(inputs.at_scale(scale))) for scale in scales]
    # The loss is flat where it is lowest: a temperature that fewer rows chose costs little.
    assert held_out.score(loss, inputs).loss == pytest.approx(min(losses), rel=0.02)
    assert max(losses[0], losses[-1]) > 1.5 * min(losses)


def test_what_shows_the_same_thing_is_held_out_together(prepared: Prepared) -> None:
    dataset = prepared.dataset(None, "caption")
    for seed in range(8):
        items, held_out = choose_held_out(dataset.records, 0.1, seed=seed)
        group_ids = [set(dataset.read_group_ids(part).tolist()) for part in (items, held_out)]
        assert not group_ids[0] & group_ids[1]


@pytest.mark.slow
def test_a_model_of_noise_is_near_chance_and_says_so(prepared: Prepared, tmp_path: Path) -> None:
    run = prepared.align_stored(tmp_path / "run", max_steps=2)
    assert run.after.is_near_chance
    caution = make_caution(run.results)
    card = (run.model / "README.md").read_text(encoding="utf-8")
    assert caution and caution in card and "chance_t2i_r1" in card
    assert describe_alignment(run.output)[-1] == NEAR_CHANCE


def test_an_image_in_several_languages_is_one_held_out_image(prepared: Prepared) -> None:
    records = [
        dataclasses.replace(record, lang=lang, group_id=record.name)
        for record in prepared.records[:10]
        for lang in ("en", "de", "fr")
    ]
    held_out = HeldOutImages(prepared.dataset(records), range(30))
    images = F.normalize(torch.randn(10, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    images = images.repeat_interleave(3, dim=0)
    # Six images, in all languages, find their texts, and four those of their neighbors.
    texts = images.clone()
    texts[18:] = texts[18:].roll(3, dims=0)
    inputs = LossInputs(images, texts, LogitRule(torch.ones(1)), held_out.group_ids)
    scores = held_out.score(ContrastiveLoss(), inputs)
    assert (scores.num_images, scores.num_texts) == (10, 30)
    assert (scores.t2i_r1, scores.i2t_r1) == pytest.approx((0.6, 0.6))
    assert (scores.chance_t2i_r1, scores.chance_i2t_r1) == pytest.approx((0.1, 0.1))
    # With 95 % confidence, half of 30 images are above 0.33, and half of ten above 0.24 only.
    few = dataclasses.replace(scores, t2i_r1=0.5, i2t_r1=0.5)
    assert few.is_near_chance and not dataclasses.replace(few, num_groups=30).is_near_chance
    # As three images of a group each, they are more images, and no more groups.
    records = [
        dataclasses.replace(record, name=f"{record.name} {record.lang}", lang="en")
        for record in records
    ]
    grouped = HeldOutImages(prepared.dataset(records), range(30))
    scores = grouped.score(ContrastiveLoss(), inputs._replace(group_ids=grouped.group_ids))
    assert (scores.num_images, scores.num_groups) == (30, 10)
    assert scores.find_interval(0.5) == few.find_interval(0.5)


@pytest.mark.parametrize(
    ("score", "count", "is_near"),
    # 1.9 % of 240 is 4.6 images; three times chance is 3. Half of ten is two of what chance gives.
    [(0.019, 240, True), (0.3, 240, False), (0.5, 10, True), (1.0, 10, False), (0.0, 1000, True)],
)
def test_near_chance_is_up_to_three_times_chance(score: float, count: int, is_near: bool) -> None:
    scores = HeldOutScores(1.0, score, score, 1 / count, 1 / count, count, count, count)
    assert scores.is_near_chance == is_near


@pytest.mark.slow
def test_captions_shared_with_held_out_are_counted(prepared: Prepared, tmp_path: Path) -> None:
    # Each image of the second half has a caption of the one before it by twelve.
    records = [
        dataclasses.replace(record, captions=(f"thing {number % 12}", f"alone {number}"))
        for number, record in enumerate(prepared.records)
    ]
    run = prepared.align(
        tmp_path / "run", records=records, max_steps=1, held_out_ratio=0.2,
        text_training="frozen-online",
    )  # fmt: skip
    dataset = prepared.dataset(records)
    to_train, held_out = (part.tolist() for part in choose_held_out(dataset.records, 0.2, seed=0))
    texts = {text for number in held_out for text in records[number].captions}
    expected = sum(text in texts for number in to_train for text in records[number].captions)
    assert expected > 0
    assert run.results["held_out"]["num_shared_captions"] == expected
    assert f"  Shared with held-out images: {counted(expected, 'training caption')}." in (
        describe_alignment(tmp_path / "run")
    )


@pytest.mark.slow
def test_images_that_may_have_been_trained_on_are_named(few: Prepared, tmp_path: Path) -> None:
    first = few.align_stored(tmp_path / "first", max_steps=1, refit=False)
    assert not first.results["held_out"]["maybe_trained_on"]  # of random projections
    assert not first.results["held_out"]["text_training_data"]
    aligned = dataclasses.replace(few, model=first.model)
    for name, seed, is_seen in (("same", 0, False), ("seed", 1, True)):
        run = aligned.align_stored(tmp_path / name, max_steps=1, seed=seed, refit=False)
        card = (run.model / "README.md").read_text(encoding="utf-8")
        said = any("may have been trained on" in line for line in describe_alignment(run.output))
        assert said == is_seen == run.results["held_out"]["maybe_trained_on"]
        assert (SEEN in card) == is_seen
        assert (run.results["held_out"]["groups"] in card) != is_seen
    # What the second run was not sure of, a third with its seed is not either.
    again = dataclasses.replace(few, model=tmp_path / "seed" / "model")
    run = again.align_stored(tmp_path / "again", max_steps=1, seed=1, refit=False)
    assert run.results["held_out"]["maybe_trained_on"]


@pytest.mark.slow
def test_captions_that_may_have_been_tuned_on_are_named(few: Prepared, tmp_path: Path) -> None:
    config = FinetuneConfig(max_steps=1, per_device_train_batch_size=4, device="cpu")
    tuned = finetune_llm(few.model, few.records, tmp_path / "tuned", config, data_name="mine")
    extract(tuned, few.records, tmp_path / "captions", ExtractConfig(device="cpu"), modality="text")
    prepared = dataclasses.replace(few, model=tuned, captions=tmp_path / "captions")
    run = prepared.align_stored(tmp_path / "run", max_steps=1, refit=False)
    line = "The language model was fine-tuned on captions (mine)."
    assert any(line in shown for shown in describe_alignment(run.output))
    assert TUNED_ON in (run.model / "README.md").read_text(encoding="utf-8")
    # An alignment that holds the same images out again does not make them unseen.
    again = dataclasses.replace(prepared, model=run.model)
    run = again.align_stored(tmp_path / "again", max_steps=1, refit=False)
    assert run.results["held_out"]["text_training_data"] == ["mine"]


@dataclasses.dataclass(frozen=True)
class FarthestLoss:
    """Pairs apart from each other: the contrary of what the contrastive loss wants."""

    def __call__(self, inputs: LossInputs) -> torch.Tensor:
        return 1 + (inputs.image_embeds * inputs.text_embeds).sum(dim=1).mean()


@pytest.mark.slow
def test_the_loss_that_is_trained_chooses_weights_and_start(few: Prepared, tmp_path: Path) -> None:
    options = {"max_steps": 8, "eval_steps": 1, "learning_rate": 1e-2}
    run = few.align_stored(tmp_path / "run", loss_function=FarthestLoss(), **options)
    losses = [*read_metrics(run.output, "held_out_loss").values()]
    # Away from where canonical correlation puts them, pairs come apart.
    assert run.after.loss == min(losses) < run.before.loss
    assert run.best_step == 1 + losses.index(min(losses))
    assert run.after.t2i_r1 < run.before.t2i_r1
    # The model that was trained so has the lower loss, beside canonical correlation again.
    aligned = dataclasses.replace(few, model=run.model)
    again = aligned.align_stored(
        tmp_path / "again", max_steps=1, loss_function=FarthestLoss(), refit=False
    )
    assert again.results["start"]["method"] == "model"
    contrastive = aligned.align_stored(tmp_path / "contrastive", max_steps=1, refit=False)
    assert contrastive.results["start"]["method"] == "cca"


@pytest.mark.slow
def test_a_choice_clearly_worse_than_its_start_is_a_warning(few: Prepared, tmp_path: Path) -> None:
    run = few.align_stored(tmp_path / "run", max_steps=0, refit=False)
    assert f"Wrote {run.model} with the weights of the start." in describe_alignment(run.output)
    before = HeldOutScores(3.0, 0.45, 0.5, 0.0125, 0.0125, 80, 90, 80)
    held_out = run.results["held_out"]
    # Wilson's interval of 45 % of 80 images is 34.6 to 55.9 %.
    for t2i_r1, is_warned in ((0.36, False), (0.33, True), (0.45, False)):
        best = dataclasses.replace(before, loss=2.9, t2i_r1=t2i_r1)
        scores = {"before": dataclasses.asdict(before), "best": dataclasses.asdict(best)}
        add_results(run.output, held_out={**held_out, **scores})
        lines = describe_alignment(run.output)
        assert (CLEARLY_LOWER in lines) == is_warned
        assert "  at the start   45.0% [34.6%, 55.9%]  50.0% [39.3%, 60.7%]  loss 3.000" in lines
