"""`llm2clip doctor`."""

from __future__ import annotations

from .._extras import require
from ..configs.config_fields import DeviceConfig
from .chosen_device import use_device
from .command import command
from .extras import list_needs_of_model


@command(group="Use", examples=("llm2clip doctor llm2clip-demo/model",))
def doctor(model: str, /, *, config: DeviceConfig, revision: str | None = None) -> int:
    """Checks a model folder from the outside.

    The exit code is 0 for a healthy model and 1 for any other.

    Args:
        model: Hub id or folder of an LLM2CLIP model.
        config: Where it runs.
        revision: Branch, tag or commit of a Hub repository. Default: its main branch.
    """
    require(*list_needs_of_model(model, revision=revision))
    from ..model_folders.model_types import require_own_model

    require_own_model(model, revision=revision)
    device = use_device(config.device)

    from ..doctor.check_model import check_model

    report = check_model(model, revision=revision, device=str(device))
    print(report)
    return 0 if report.healthy else 1
