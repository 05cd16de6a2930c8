"""Strict loading: every weight must fit, and custom code in a folder is never run.

Uploaded with the weights.
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
# Files in which transformers looks for references to custom code.
_NAMING_FILES = (
    "config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json",
)  # fmt: skip
_REMEDY = "Choose one whose classes are part of transformers."
# Errors of a loader that lacks a class which only the folder's code defines.
_LOADING_ERRORS = (ValueError, OSError, LookupError, AttributeError, TypeError, ImportError)


def load_without_code(loader: Any, source: str | Path, **settings: Any) -> Any:
    """Call `loader.from_pretrained` without ever running code of the folder or repository.

    transformers would ask on the terminal whether to run it. If transformers has a class of its
    own, that class is used.

    Args:
        loader: class with `from_pretrained`, such as `AutoTokenizer`.
        source: folder or Hub repository.
        **settings: further arguments of `from_pretrained`.

    Returns:
        Whatever the loader returns.

    Raises:
        ValueError: loading fails without that code; the message names the file that refers to it.
        Exception: any other error of the loader.
    """
    with naming_code(source, revision=settings.get("revision")):
        return loader.from_pretrained(source, trust_remote_code=False, **settings)


@contextmanager
def naming_code(
    source: Any, *, revision: str | None = None, remedy: str = _REMEDY
) -> Iterator[None]:
    """Explain a loader's error by the custom code that was not run, if the source refers to any.

    Args:
        source: folder or Hub repository that the body of the `with` statement loads.
        revision: revision of the repository.
        remedy: what to do, as the message's last sentence.

    Raises:
        ValueError: loading failed, and the source refers to custom code.
    """
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
            f"{source} needs custom code, which is never run here: {named}. It cannot be loaded "
            f"without that code{reason}. {remedy}"
        ) from error


def find_foreign_code(source: Any, *, revision: str | None = None) -> dict[str, list[str]]:
    """List references to custom code, other than this package's, in a source's JSON files.

    Args:
        source: folder or Hub repository; of a repository only cached files are read.
        revision: revision of the repository.

    Returns:
        File name → references such as `AutoModel: module.Class`.
    """
    found = {
        name: list_foreign_code(_read_settings(source, name, revision=revision))
        for name in _NAMING_FILES
    }
    return {name: refs for name, refs in found.items() if refs}


def _read_settings(source: Any, name: str, *, revision: str | None) -> Any:
    """Read a JSON file; None if it is absent or invalid, which its loader will report."""
    try:
        path: Any = Path(source) / name
        if not Path(source).exists():
            path = try_to_load_from_cache(str(source), name, revision=revision)
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return None


def list_foreign_code(content: Any) -> list[str]:
    """List references to custom code, other than this package's, at any depth of JSON content.

    Args:
        content: parsed JSON of a file such as `config.json`.

    Returns:
        References such as `AutoModel: module.Class`.
    """
    if isinstance(content, list):
        return [ref for value in content for ref in list_foreign_code(value)]
    if not isinstance(content, dict):
        return []
    named = content.get("auto_map") or {}
    named = named if isinstance(named, dict) else {"AutoTokenizer": named}  # the old format
    refs = [
        f"{auto_class}: {ref}"
        for auto_class, given in named.items()
        for ref in (given if isinstance(given, list | tuple) else [given])
        if ref is not None and not str(ref).startswith(_OWN_CODE)
    ]
    inside = [value for name, value in content.items() if name != "auto_map"]
    return refs + list_foreign_code(inside)


def build_tower(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a tower with random weights, from a class that transformers has.

    Its configuration may still refer to custom code of the repository it came from, which is never
    run.

    Args:
        config: configuration of the tower.

    Raises:
        ValueError: transformers has no class for this configuration.
    """
    # Imported here because it registers the model's classes, whose module imports this one.
    from transformers import AutoModel

    return AutoModel.from_config(config, trust_remote_code=False)  # type: ignore[no-any-return]


def refuse_unaccounted_keys(cls: type, info: dict[str, Any], *, allow_misshapen: bool) -> None:
    """Check that every weight was loaded.

    Args:
        cls: class that is loaded, for the error message.
        info: transformers' loading info.
        allow_misshapen: accept weights of another shape, which keep their initialization.

    Raises:
        ValueError: weights are missing, unexpected or of another shape.
    """
    mismatched = {} if allow_misshapen else {key[0]: key[1:] for key in info["mismatched_keys"]}
    missing = sorted(set(info["missing_keys"]) - {key[0] for key in info["mismatched_keys"]})
    unexpected = sorted(info["unexpected_keys"])
    if not (mismatched or missing or unexpected):
        return
    raise ValueError(
        f"{cls.__name__}: the weights do not fit the configuration. "
        f"Missing ({len(missing)}): {missing[:8]}. Unexpected ({len(unexpected)}): "
        f"{unexpected[:8]}. Of another shape ({len(mismatched)}; saved, expected): "
        f"{dict(list(mismatched.items())[:8])}. Use the class that saved the folder (text-only: "
        "LLM2CLIPTextModel, image-only: LLM2CLIPVisionModel), the transformers version it names, "
        "or convert the checkpoint again."
    )
