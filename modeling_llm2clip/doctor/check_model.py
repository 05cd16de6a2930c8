"""The order of the checks, and what each of them needs."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..encoding.devices import find_device
from ..encoding.float32 import float32_as_such
from ..model_folders.model_folder import find_model_folder
from .file_checks import (
    check_config,
    check_finite_weights,
    check_remote_code,
    check_training,
    check_weight_dtypes,
)
from .forward_checks import (
    check_attention_direction,
    check_batch_invariance,
    check_finite_outputs,
    check_padding_invariance,
    check_pooled_span,
    check_temperature,
    load_model,
)
from .model_report import Check, ConcernError, ModelReport, NotApplicableError
from .model_under_test import ModelUnderTest
from .reference_checks import check_golden_embeddings, check_sentence_transformers
from .tokenizer_checks import (
    check_padding_side,
    check_prompt,
    check_text_length,
    check_tokenizer_path,
    load_processor,
    load_tokenizer,
)


@dataclass(frozen=True)
class _Plan:
    """A check, the earlier checks without which it cannot run, and the model half it is about."""

    name: str
    examine: Callable[[ModelUnderTest], str]
    needs: tuple[str, ...] = ()
    half: str | None = None


_TEXT, _BOTH = "text", "both"
_PLANS = (
    _Plan("config", check_config),
    _Plan("training", check_training, ("config",)),
    _Plan("remote code", check_remote_code),
    _Plan("finite weights", check_finite_weights),
    _Plan("weight dtype", check_weight_dtypes, ("config",)),
    _Plan("weights", load_model, ("config",)),
    _Plan("tokenizer", load_tokenizer, ("config",), _TEXT),
    _Plan("processor", load_processor, ("config",)),
    _Plan("padding side", check_padding_side, ("tokenizer",), _TEXT),
    _Plan("text length", check_text_length, ("tokenizer",), _TEXT),
    _Plan("prompt", check_prompt, ("tokenizer",), _TEXT),
    _Plan("tokenizer path", check_tokenizer_path, ("tokenizer", "processor"), _TEXT),
    _Plan("temperature", check_temperature, ("weights",), _BOTH),
    _Plan("bidirectional", check_attention_direction, ("weights",), _TEXT),
    _Plan("finite outputs", check_finite_outputs, ("weights", "prompt")),
    _Plan("pooled span", check_pooled_span, ("finite outputs",), _TEXT),
    _Plan("batch invariance", check_batch_invariance, ("finite outputs",)),
    _Plan("padding invariance", check_padding_invariance, ("finite outputs",), _TEXT),
    _Plan("golden embeddings", check_golden_embeddings, ("finite outputs", "processor")),
    # Last, because it frees the model.
    _Plan("sentence-transformers", check_sentence_transformers, ("finite outputs",)),
)
_HALVES_OF: dict[str, set[str | None]] = {
    "LLM2CLIPModel": {None, _TEXT, _BOTH},
    "LLM2CLIPTextModel": {None, _TEXT},
    "LLM2CLIPVisionModel": {None},
}


def check_model(
    source: str | Path, *, revision: str | None = None, device: str = "cpu"
) -> ModelReport:
    """Examine a checkpoint from the outside; code in its folder is compared, never run.

    Args:
        source: folder, or Hub id, which is downloaded.
        revision: branch, tag or commit of the Hub repository.
        device: where the model runs; see `find_device`.
    Returns: every check, in order; one that cannot run is marked as skipped with its reason.
    Raises: ValueError for a device that is not there.
    """
    device = str(find_device(device))
    checks: list[Check] = []
    try:
        folder = find_model_folder(source, revision=revision)
    except Exception as error:  # what the client raises for a lost network, name or permission
        checks.append(Check("folder", False, _describe(error)))
        checks += [
            Check(plan.name, False, "needs 'folder', which failed", skipped=True) for plan in _PLANS
        ]
        return ModelReport(str(source), checks)
    checks.append(Check("folder", True, f"{sum(1 for _ in folder.iterdir())} entries in {folder}"))
    patient = ModelUnderTest(folder, device)
    unmet: dict[str, str] = {}
    for plan in _PLANS:
        check, blocks = _examine(plan, patient, unmet)
        checks.append(check)
        if blocks:
            unmet[plan.name] = "did not run" if check.skipped else "failed"
    return ModelReport(str(source), checks)


def _examine(plan: _Plan, patient: ModelUnderTest, unmet: dict[str, str]) -> tuple[Check, bool]:
    """Make one check; returns it and whether checks that need it must be skipped."""
    reasons = [f"needs {name!r}, which {unmet[name]}" for name in plan.needs if name in unmet]
    if reasons:
        return Check(plan.name, False, "; ".join(reasons), skipped=True), True
    model_class = getattr(patient.model_class, "__name__", "LLM2CLIPModel")
    if plan.half not in _HALVES_OF[model_class]:
        reason = f"the folder holds a {model_class} alone"
        return Check(plan.name, False, reason, skipped=True), False
    try:
        with float32_as_such():
            return Check(plan.name, True, plan.examine(patient)), False
    except NotApplicableError as reason:
        return Check(plan.name, False, str(reason), skipped=True), False
    except ConcernError as concern:
        return Check(plan.name, True, str(concern), concern=True), False
    # A broken checkpoint can raise anything anywhere; here all of it becomes a failed check.
    except Exception as error:
        return Check(plan.name, False, _describe(error)), True


def _describe(error: Exception) -> str:
    text = " ".join(str(error).split())
    if not text:  # a bare assertion: where it stands is all there is to say
        *_, (frame, line) = traceback.walk_tb(error.__traceback__)
        text = f"raised at {frame.f_code.co_filename}, line {line}"
    return text if type(error) is ValueError else f"{type(error).__name__}: {text}"
