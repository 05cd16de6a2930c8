"""The checks of `doctor --server`, all of them or some, with models that are loaded once."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from breaking import choose_checks
from endpoints import Endpoint, load_once

from modeling_llm2clip.configs.serve_config import ServerCheckConfig
from modeling_llm2clip.doctor import server_checks
from modeling_llm2clip.doctor.model_report import ModelReport
from modeling_llm2clip.doctor.model_under_test import ModelUnderTest


@cache
def _load_tested(folder: Path) -> ModelUnderTest:
    model, processor = load_once(folder)
    return ModelUnderTest(
        folder, "cpu", config=model.config, model_class=type(model), model=model,
        tokenizer=processor.tokenizer, processor=processor,
    )  # fmt: skip


def check(
    folder: Path, endpoint: Endpoint | str, *names: str, schema: Any = "jina", **options: Any
) -> ModelReport:
    """Run the checks of these names and the checks that they need; without names, all."""
    url = endpoint if isinstance(endpoint, str) else endpoint.url
    config = ServerCheckConfig(server=url, schema=schema, device="cpu", **options)
    with pytest.MonkeyPatch.context() as patch:
        if names:
            patch.setattr(server_checks, "_PLANNED", choose_checks(server_checks._PLANNED, *names))
        return server_checks.check_served(_load_tested(folder), config, default_name=folder.name)
