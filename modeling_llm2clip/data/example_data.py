"""Finds the embedded images and the demo's model, which the notebooks run on."""

from __future__ import annotations

import os
import re
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent
_DEMO_MODEL = Path("..") / "llm2clip-demo" / "model"  # as a notebook in examples/ sees it


def find_example_data() -> Path:
    """Return the folder that holds `emoji` and `photographs`.

    Raises: FileNotFoundError when the installation lacks it.
    """
    # A wheel carries the folder inside the package; a checkout has it where people look for it.
    for folder in (_PACKAGE / "example_data", _PACKAGE.parent / "examples" / "data"):
        if (folder / "emoji").is_dir():
            return folder
    raise FileNotFoundError(
        f"The embedded images are not beside {_PACKAGE}. Install the package again, or give "
        "--images."
    )


def find_example_model() -> str:
    """Return the model of the notebooks: `LLM2CLIP_MODEL`, or the folder that the demo wrote.

    Raises:
        FileNotFoundError: there is no such model; the message names the command that writes one.
    """
    source = os.environ.get("LLM2CLIP_MODEL") or str(_DEMO_MODEL)
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and not Path(source).parent.exists()
    if not is_hub_id and not (Path(source) / "config.json").is_file():
        raise FileNotFoundError(
            f"There is no model in {source}. Run `llm2clip demo` at the root of the repository; it "
            "writes llm2clip-demo/model in a few minutes. Or set LLM2CLIP_MODEL to another model "
            "folder or Hub id."
        )
    return source
