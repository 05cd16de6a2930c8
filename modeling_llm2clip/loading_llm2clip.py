"""Strict loading: every weight has its place, and code that a folder brings is not run.

Travels to the Hub beside the weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.hub import try_to_load_from_cache

_OWN_CODE = ("configuration_llm2clip.", "modeling_llm2clip.", "processing_llm2clip.")
# Files in which transformers looks for the names of code.
_NAMING_FILES = (
    "config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json",
)  # fmt: skip
_REMEDY = "Take one that transformers has the classes for."
# What a loader raises where it lacks the class that only the folder's code would give it.
_LOADING_ERRORS = (ValueError, OSError, LookupError, AttributeError, TypeError, ImportError)


def load_without_code(loader: Any, source: str | Path, **settings: Any) -> Any:
    """Call `loader.from_pretrained` so that code in a folder or repository is never run.

    transformers would ask on the terminal whether to run it. Where transformers has a class of its
    own, it takes that.

    Raises:
        ValueError: naming the file that names the code, where loading fails without it.
        Exception: what the loader raises.
    """
    with naming_code(source, revision=settings.get("revision")):
        return loader.from_pretrained(source, trust_remote_code=False, **settings)


@contextmanager
def naming_code(
    source: Any, *, revision: str | None = None, remedy: str = _REMEDY
) -> Iterator[None]:
    """Say in a loader's error which files of the source name code that was not run."""
    try:
        yield
    except _LOADING_ERRORS as error:
        found = find_foreign_code(source, revision=revision)
        if not found:
            raise
        named = "; ".join(f"{file} names {', '.join(refs)}" for file, refs in found.items())
        # transformers' own advice is to run the code.
        reason = "" if "trust_remote_code" in str(error) else f" ({error})"
        raise ValueError(
            f"{source} brings code of its own, which is never run here: {named}. Without it the "
            f"source cannot be loaded{reason}. {remedy}"
        ) from error


def find_foreign_code(source: Any, *, revision: str | None = None) -> dict[str, list[str]]:
    """List the code that is not this package's and that files of a folder or repository name.

    Returns:
        file → `Auto class: module.Class`; of the Hub, only what is in the cache already.
    """
    found = {
        name: list_foreign_code(_read_settings(source, name, revision=revision))
        for name in _NAMING_FILES
    }
    return {name: refs for name, refs in found.items() if refs}


def _read_settings(source: Any, name: str, *, revision: str | None) -> Any:
    """Read a settings file; None where it is absent or damaged, which its loader tells."""
    try:
        path: Any = Path(source) / name
        if not Path(source).exists():
            path = try_to_load_from_cache(str(source), name, revision=revision)
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return None


def list_foreign_code(content: Any) -> list[str]:
    """List what a settings file names as code that is not this package's, at any depth."""
    if isinstance(content, list):
        return [ref for value in content for ref in list_foreign_code(value)]
    if not isinstance(content, dict):
        return []
    named = content.get("auto_map") or {}
    named = named if isinstance(named, dict) else {"AutoTokenizer": named}  # as it once was
    refs = [
        f"{auto_class}: {ref}"
        for auto_class, given in named.items()
        for ref in (given if isinstance(given, list | tuple) else [given])
        if ref is not None and not str(ref).startswith(_OWN_CODE)
    ]
    inside = [value for name, value in content.items() if name != "auto_map"]
    return refs + list_foreign_code(inside)


def build_tower(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a tower of transformers' own class, with random weights.

    Its configuration may still name the code of the repository it came from. That code is never
    run: what is not in transformers is refused instead of asked about.
    """
    # Not at the top: its import registers the model's classes, and their module imports this one.
    from transformers import AutoModel

    return AutoModel.from_config(config, trust_remote_code=False)  # type: ignore[no-any-return]


def refuse_unaccounted_keys(cls: type, info: dict[str, Any], *, allow_misshapen: bool) -> None:
    """Raise ValueError for weights that are missing, unexpected or of another shape.

    Args:
        info: transformers' loading info.
        allow_misshapen: leave weights of another shape as they were initialized.
    """
    mismatched = {} if allow_misshapen else {key[0]: key[1:] for key in info["mismatched_keys"]}
    missing = sorted(set(info["missing_keys"]) - {key[0] for key in info["mismatched_keys"]})
    unexpected = sorted(info["unexpected_keys"])
    if not (mismatched or missing or unexpected):
        return
    raise ValueError(
        f"{cls.__name__}: the weights do not fit the configuration, and nothing is guessed. "
        f"Missing ({len(missing)}): {missing[:8]}. Unexpected ({len(unexpected)}): "
        f"{unexpected[:8]}. Of another shape ({len(mismatched)}; saved, wanted): "
        f"{dict(list(mismatched.items())[:8])}. Use the class that saved the folder (text-only: "
        "LLM2CLIPTextModel, image-only: LLM2CLIPVisionModel), the transformers version it names, "
        "or convert the checkpoint again."
    )
