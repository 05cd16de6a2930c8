"""`llm2clip doctor`."""

from __future__ import annotations

from dataclasses import replace

from .._suggestions import escape_controls
from ..configs.serve_config import ServerCheckConfig
from .command import command
from .options import require_model, use_device


@command(
    group="Use",
    examples=(
        "llm2clip doctor llm2clip-demo/model",
        "llm2clip doctor llm2clip-demo/model --server http://127.0.0.1:8000 --schema jina",
    ),
)
def doctor(
    model: str,
    /,
    *,
    text_like: str | None = None,
    config: ServerCheckConfig,
    revision: str | None = None,
) -> int:
    """Checks a model folder, or an endpoint that serves it.

    The exit code is 0 if no check fails, otherwise 1.

    Args:
        model: Hub id or folder of an LLM2CLIP model.
        text_like: Hub id or folder of another model. Its text embeddings must be bit-identical to
            this model's, so an index of them stays valid. Default: none.
        config: Device to run on, and the endpoint to check.
        revision: Branch, tag or commit of the Hub repository. Default: the main branch.
    """
    require_model(model, revision=revision)
    device = str(use_device(config.device))
    if config.server is not None and text_like is not None:
        raise ValueError(
            "--text-like compares model folders, so it cannot be combined with --server. Remove "
            "one."
        )
    if config.server is None:
        from ..doctor.check_model import check_model

        report = check_model(model, revision=revision, device=device, text_like=text_like)
    else:
        from ..doctor.server_checks import check_server

        report = check_server(model, replace(config, device=device), revision=revision)
    print(escape_controls(report))
    return 0 if report.healthy else 1
