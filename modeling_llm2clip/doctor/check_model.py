"""The ordered table of model folder checks, each with the checks that it depends on."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from .._suggestions import counted
from ..encoding.devices import find_device
from ..model_folders.model_folder import find_model_folder, require_own_model
from . import file_checks, forward_checks
from .model_report import Check, ModelReport, PlannedCheck, describe_error, run_checks
from .model_under_test import ModelUnderTest

_TEXT, _BOTH = "text", "both"
_PLANNED_CHECKS: tuple[PlannedCheck[ModelUnderTest], ...] = (
    PlannedCheck("config", file_checks.check_config),
    PlannedCheck("training", file_checks.check_training, ("config",)),
    PlannedCheck("training images", file_checks.check_training_images),
    PlannedCheck("remote code", file_checks.check_remote_code),
    PlannedCheck("finite weights", file_checks.check_finite_weights),
    PlannedCheck("recorded files", file_checks.check_recorded_files, ("config", "finite weights")),
    PlannedCheck("weight dtype", file_checks.check_weight_dtypes, ("config",)),
    PlannedCheck("weights", forward_checks.check_loading, ("config",)),
    PlannedCheck("tokenizer", file_checks.check_tokenizer, ("config",), _TEXT),
    PlannedCheck("processor", file_checks.check_processor, ("config",)),
    PlannedCheck("text length", file_checks.check_text_length, ("tokenizer",), _TEXT),
    PlannedCheck("prompt", file_checks.check_prompt, ("tokenizer",), _TEXT),
    PlannedCheck(
        "tokenizer path", file_checks.check_tokenizer_path, ("tokenizer", "processor"), _TEXT
    ),
    PlannedCheck("temperature", forward_checks.check_temperature, ("weights",), _BOTH),
    PlannedCheck("bidirectional", forward_checks.check_attention_direction, ("weights",), _TEXT),
    PlannedCheck("finite outputs", forward_checks.check_finite_outputs, ("weights", "prompt")),
    PlannedCheck("pooled span", forward_checks.check_pooled_span, ("finite outputs",), _TEXT),
    PlannedCheck("batch invariance", forward_checks.check_batch_invariance, ("finite outputs",)),
    PlannedCheck(
        "padding invariance", forward_checks.check_padding_invariance, ("finite outputs",), _TEXT
    ),
    PlannedCheck(
        "golden embeddings",
        forward_checks.check_golden_embeddings,
        ("finite outputs", "processor"),
    ),
    # Last, because it frees the model.
    PlannedCheck(
        "sentence-transformers", forward_checks.check_sentence_transformers, ("finite outputs",)
    ),
)
_TOWERS_OF: dict[str, set[str | None]] = {
    "LLM2CLIPModel": {None, _TEXT, _BOTH},
    "LLM2CLIPTextModel": {None, _TEXT},
    "LLM2CLIPVisionModel": {None},
}


def check_model(
    source: str | Path,
    *,
    revision: str | None = None,
    device: str = "auto",
    text_like: str | Path | None = None,
) -> ModelReport:
    """Check that a model reproduces its recorded embeddings, however it is loaded.

    Code in the folder is compared with the installed package and never run.

    Args:
        source: Folder or Hub id of an LLM2CLIP model.
        revision: Branch, tag or commit of the Hub repository.
        device: Device to run the model on, such as cpu or cuda; see `find_device`.
        text_like: Folder or Hub id of a model whose text embeddings must be bit-identical, so an
            existing text index stays valid. None skips this comparison.

    Returns:
        All checks, in order; a check that cannot run is marked as skipped, with the reason.

    Raises:
        ValueError: The device is not available, or `text_like` is not an LLM2CLIP model.

    Examples:
        >>> check_model("my-model").healthy
        True
    """
    device = str(find_device(device))
    try:
        folder = find_model_folder(source, revision=revision)
    except Exception as error:  # bad connections, names or permissions raise all kinds of errors
        reason = "needs 'folder', which failed"
        skipped = [Check(check.name, False, reason, skipped=True) for check in _PLANNED_CHECKS]
        failed = Check("folder", False, describe_error(error))
        return ModelReport(str(source), [failed, *skipped])
    tested = ModelUnderTest(folder, device)
    planned = _PLANNED_CHECKS
    if text_like is not None:
        require_own_model(text_like)
        compare = partial(file_checks.check_text_like, other=find_model_folder(text_like))
        planned = (*planned, PlannedCheck("text like", compare, ("config",), _TEXT))

    def find_obstacle(about: str | None) -> str | None:
        model_class = getattr(tested.model_class, "__name__", "LLM2CLIPModel")
        return None if about in _TOWERS_OF[model_class] else f"the folder holds an {model_class}"

    contents = f"{counted(sum(1 for _ in folder.iterdir()), 'entry')} in {folder}"
    checks = run_checks(planned, tested, find_obstacle)
    return ModelReport(str(source), [Check("folder", True, contents), *checks])
