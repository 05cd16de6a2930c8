"""Loads the tokenizer of an LLM; the code of a Hub repository runs only at a pinned commit.

What code makes of a tokenizer is written down as a plain one, so that a built folder does without
the code. A network or an image processor cannot be: their code is never run.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from ..loading_llm2clip import naming_code
from .tower_sources import naming

_COMMIT = re.compile(r"[0-9a-f]{40}")
_REMEDY = (
    "If its network is one of transformers and only the tokenizer needs the code, read it and pass "
    "the commit that you read (--tokenizer-code COMMIT, of a Hub repository). Else take an LLM "
    "that transformers has the classes for."
)


def require_pinned(source: str | Path, commit: str) -> None:
    """Raise ValueError unless the source is a Hub repository and the commit names one version."""
    if Path(source).exists() or str(source).endswith(".gguf"):
        raise ValueError(
            f"{source} is no Hub repository, so a commit does not pin its code. Leave "
            "--tokenizer-code out, or name the repository."
        )
    if not _COMMIT.fullmatch(commit):
        raise ValueError(
            f"--tokenizer-code {commit!r} must be a commit of 40 hexadecimal digits: a branch or "
            "tag may come to mean other code than you read."
        )


def load_tokenizer(
    source: str | Path,
    name: str | Path,
    config: PreTrainedConfig,
    *,
    runs_code: bool = False,
    **where: Any,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of an LLM.

    Args:
        source: how errors call it.
        name: folder or Hub id.
        config: of the LLM, loaded without code; its own code stays unused.
        runs_code: run the tokenizer's code, at the commit in `where`.
    Raises: ValueError naming the file that names code without which nothing can be loaded, or when
        code gives a tokenizer that cannot be written down as a plain one.
    """
    settings = {"config": config, **where}
    if not runs_code:
        with naming(source), naming_code(name, revision=where.get("revision"), remedy=_REMEDY):
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **settings)
        if tokenizer.init_kwargs.get("auto_map"):
            warnings.warn(
                f"{source} names code for its tokenizer, which is not run: transformers' "
                f"{type(tokenizer).__name__} is taken. Make sure that it gives the same ids.",
                stacklevel=3,
            )
        return tokenizer
    with naming(source):
        tokenizer = AutoTokenizer.from_pretrained(
            name, trust_remote_code=True, code_revision=where["revision"], **settings
        )
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError(
            f"{source}: its code gives a {type(tokenizer).__name__}, which cannot be written down "
            "as tokenizer.json, so the built folder would need the code. Take another LLM."
        )
    return tokenizer
