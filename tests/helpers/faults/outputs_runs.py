"""Outputs of trainings that are read again: runs that are resumed, and models."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import aligning
from aligning import Prepared, Run
from tiny_recipe import make_recipe, prepare_sources
from tuning import SHORT, tune

from faults.damage import Target, call
from faults.outputs_data import make_once, prepare, prepare_inheriting
from modeling_llm2clip.evaluation.results import read_evaluation_results
from modeling_llm2clip.recipes.train import train

_TUNED = replace(SHORT, num_hard_negatives=3, max_steps=4, save_steps=2)


def hash_tensors(folder: Path) -> str:
    """Hash the weights of a folder; the same weights are the same bytes."""
    files = sorted(folder.glob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def align_before_model(folder: Path) -> Path:
    """Align with held-out images and a last fit on all, as a kill before the model leaves it."""
    run = _align(prepare(), folder / "whole")
    return run.copy_without_model(folder / "run")


def _align(prepared: Prepared, output: Path, *, resume: bool = False) -> Run:
    options = {**aligning.SHORT_RUN, "held_out_ratio": 0.25, "eval_steps": 2}
    return prepared.align_stored(output, resume=resume, **options)


def resume_alignment(output: Path) -> object:
    shutil.rmtree(output / "model", ignore_errors=True)  # of an earlier reader
    run = _align(prepare(), output, resume=True)
    return hash_tensors(run.model), run.results["held_out"]


def inherit_before_model(folder: Path) -> Path:
    run = _inherit(folder / "whole")
    return run.copy_without_model(folder / "run")


def _inherit(output: Path, *, resume: bool = False) -> Run:
    short = {n: v for n, v in aligning.SHORT_RUN.items() if n != "projection_init"}
    options = {**short, "inherit_steps": 4}
    return prepare_inheriting().align(output, resume=resume, **options)


def resume_inheriting(output: Path) -> object:
    shutil.rmtree(output / "model", ignore_errors=True)
    return hash_tensors(_inherit(output, resume=True).model)


def tune_before_end(folder: Path) -> Path:
    """Fine-tune with hard negatives, as a kill between two checkpoints leaves the run."""
    tuned = tune(folder / "run", _TUNED)
    shutil.rmtree(tuned.output / "checkpoints" / "checkpoint-4")
    shutil.rmtree(tuned.lora)
    return tuned.output


def resume_tuning(output: Path) -> object:
    tuned = tune(output, _TUNED, resume=True)
    return hash_tensors(tuned.lora), tuned.results["cra_before"], tuned.results["cra_after"]


def train_before_alignment(folder: Path) -> Path:
    """Run a recipe, as a kill before its alignment leaves it."""
    output = train_recipe(folder / "run")
    for name in ("aligned", "model", "evaluation"):
        shutil.rmtree(output / name)
    return output


def train_recipe(output: Path) -> Path:
    config = make_recipe(make_once("sources", prepare_sources), output)
    train(config, report=lambda _: None)
    return output


def resume_recipe(output: Path) -> object:
    train_recipe(output)
    return hash_tensors(output / "model")


def train_before_evaluation(folder: Path) -> Path:
    """Run a recipe, as a kill between the check of its model and the evaluation leaves it."""
    output = train_recipe(folder / "run")
    shutil.rmtree(output / "evaluation")
    return output


def evaluate_recipe(output: Path) -> object:
    shutil.rmtree(output / "evaluation", ignore_errors=True)  # of an earlier reader
    train_recipe(output)
    return [(result.task, result.scores) for result in
            read_evaluation_results(output / "evaluation")]  # fmt: skip


def align_model(folder: Path) -> Path:
    """Write the model of an alignment, with a summary of its training images."""
    return Path(shutil.copytree(_align(prepare(), folder / "run").model, folder / "model"))


def check(folder: Path) -> object:
    return call("doctor", folder, "--device", "cpu")


TARGETS = (
    Target("alignment", align_before_model, resume_alignment),
    Target("alignment that inherits", inherit_before_model, resume_inheriting),
    Target("fine-tuning", tune_before_end, resume_tuning),
    Target("recipe", train_before_alignment, resume_recipe,
           files=("run.json", "manifest.json", "shard-*", "index.arrow")),
    # Its weights, and those of the stages before, which are not read again.
    Target("recipe before its evaluation", train_before_evaluation, evaluate_recipe,
           files=("model/model.safetensors", "model/golden_embeddings.safetensors")),
    Target("model", align_model, check),
)  # fmt: skip
