"""The order of the checks, and what each of them needs."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .._suggestions import counted
from ..encoding.devices import find_device
from ..encoding.float32 import float32_as_such
from ..model_folders.model_folder import find_model_folder
from .file_checks import (
    check_config,
    check_finite_weights,
    check_recorded_files,
    check_remote_code,
    check_training,
    check_training_images,
    check_weight_dtypes,
)
from .forward_checks import (
    check_attention_direction,
    check_batch_invariance,
    check_finite_outputs,
    check_loading,
    check_padding_invariance,
    check_pooled_span,
    check_temperature,
)
from .model_report import Check, ConcernError, ModelReport, NotApplicableError
from .model_under_test import ModelUnderTest
from .reference_checks import check_golden_embeddings, check_sentence_transformers
from .tokenizer_checks import (
    check_padding_side,
    check_processor,
    check_prompt,
    check_text_length,
    check_tokenizer,
    check_tokenizer_path,
)


@dataclass(frozen=True)
class _PlannedCheck:
    """A check, the earlier checks without which it cannot run, and the towers it is about."""

    name: str
    run: Callable[[ModelUnderTest], str]
    needs: tuple[str, ...] = ()
    towers: str | None = None


_TEXT, _BOTH = "text", "both"
_PLANNED_CHECKS = (
    _PlannedCheck("config", check_config),
    _PlannedCheck("training", check_training, ("config",)),
    _PlannedCheck("training images", check_training_images),
    _PlannedCheck("remote code", check_remote_code),
    _PlannedCheck("finite weights", check_finite_weights),
    _PlannedCheck("recorded files", check_recorded_files, ("config", "finite weights")),
    _PlannedCheck("weight dtype", check_weight_dtypes, ("config",)),
    _PlannedCheck("weights", check_loading, ("config",)),
    _PlannedCheck("tokenizer", check_tokenizer, ("config",), _TEXT),
    _PlannedCheck("processor", check_processor, ("config",)),
    _PlannedCheck("padding side", check_padding_side, ("tokenizer",), _TEXT),
    _PlannedCheck("text length", check_text_length, ("tokenizer",), _TEXT),
    _PlannedCheck("prompt", check_prompt, ("tokenizer",), _TEXT),
    _PlannedCheck("tokenizer path", check_tokenizer_path, ("tokenizer", "processor"), _TEXT),
    _PlannedCheck("temperature", check_temperature, ("weights",), _BOTH),
    _PlannedCheck("bidirectional", check_attention_direction, ("weights",), _TEXT),
    _PlannedCheck("finite outputs", check_finite_outputs, ("weights", "prompt")),
    _PlannedCheck("pooled span", check_pooled_span, ("finite outputs",), _TEXT),
    _PlannedCheck("batch invariance", check_batch_invariance, ("finite outputs",)),
    _PlannedCheck("padding invariance", check_padding_invariance, ("finite outputs",), _TEXT),
    _PlannedCheck("golden embeddings", check_golden_embeddings, ("finite outputs", "processor")),
    # Last, because it frees the model.
    _PlannedCheck("sentence-transformers", check_sentence_transformers, ("finite outputs",)),
)
_TOWERS_OF: dict[str, set[str | None]] = {
    "LLM2CLIPModel": {None, _TEXT, _BOTH},
    "LLM2CLIPTextModel": {None, _TEXT},
    "LLM2CLIPVisionModel": {None},
}


def check_model(
    source: str | Path, *, revision: str | None = None, device: str = "auto"
) -> ModelReport:
    """Check that a model gives the embeddings it was written with, everywhere it can be loaded.

    Code in its folder is compared with the installed package and never run.

    Args:
        source: Folder or Hub id of an LLM2CLIP model.
        revision: Branch, tag or commit of the Hub repository.
        device: Where the model runs; see `find_device`.

    Returns:
        Every check, in order; one that cannot run is marked as skipped with its reason.

    Raises:
        ValueError: The device is not there.

    Examples:
        >>> check_model("my-model").healthy
        True
    """
    device = str(find_device(device))
    checks: list[Check] = []
    try:
        folder = find_model_folder(source, revision=revision)
    except Exception as error:  # the client raises anything for connections, names, permissions
        checks.append(Check("folder", False, _describe(error)))
        checks += [
            Check(planned.name, False, "needs 'folder', which failed", skipped=True)
            for planned in _PLANNED_CHECKS
        ]
        return ModelReport(str(source), checks)
    checks.append(
        Check("folder", True, f"{counted(sum(1 for _ in folder.iterdir()), 'entry')} in {folder}")
    )
    tested = ModelUnderTest(folder, device)
    unmet: dict[str, str] = {}
    for planned in _PLANNED_CHECKS:
        check, blocks = _run(planned, tested, unmet)
        checks.append(check)
        if blocks:
            unmet[planned.name] = "did not run" if check.skipped else "failed"
    return ModelReport(str(source), checks)


def _run(
    planned: _PlannedCheck, tested: ModelUnderTest, unmet: dict[str, str]
) -> tuple[Check, bool]:
    """Make one check; returns it, and whether checks that need it must be skipped."""
    reasons = [f"needs {name!r}, which {unmet[name]}" for name in planned.needs if name in unmet]
    if reasons:
        return Check(planned.name, False, "; ".join(reasons), skipped=True), True
    model_class = getattr(tested.model_class, "__name__", "LLM2CLIPModel")
    if planned.towers not in _TOWERS_OF[model_class]:
        reason = f"the folder holds an {model_class}"
        return Check(planned.name, False, reason, skipped=True), False
    try:
        with float32_as_such():
            return Check(planned.name, True, planned.run(tested)), False
    except NotApplicableError as reason:
        return Check(planned.name, False, str(reason), skipped=True), False
    except ConcernError as concern:
        return Check(planned.name, True, str(concern), concern=True), False
    # A broken folder can raise anything anywhere; here all of it becomes a failed check.
    except Exception as error:
        return Check(planned.name, False, _describe(error)), True


def _describe(error: Exception) -> str:
    text = " ".join(str(error).split())
    if not text:  # a bare assertion has only its place
        *_, (frame, line) = traceback.walk_tb(error.__traceback__)
        text = f"raised at {frame.f_code.co_filename}, line {line}"
    return text if type(error) is ValueError else f"{type(error).__name__}: {text}"
