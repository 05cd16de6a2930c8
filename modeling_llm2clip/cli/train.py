"""`llm2clip train`."""

from __future__ import annotations

from pathlib import Path

from .._extras import CAPTION_TUNING, DEMO, require
from ..configs.build_config import EMBEDDED_VISION, list_vision_sources
from ..configs.config_fields import ImageLimitsConfig, read_config
from ..configs.train_config import TrainConfig
from .command import command
from .options import require_data, require_text_tower, use_device, use_image_limits


@command(
    group="Train",
    examples=("llm2clip train recipe.yaml --dry-run", "llm2clip train recipe.yaml"),
)
def train(recipe: Path, /, *, dry_run: bool = False, limits: ImageLimitsConfig) -> int:
    """Runs all stages from one YAML file, or resumes an interrupted run.

    Build, fine-tune, extract, align, export and evaluate each write their own folder.

    Args:
        recipe: YAML file with the options of all stages; see docs/train.md.
        dry_run: Run all checks and print the plan with counts and steps, but compute nothing.
        limits: Limits on the images to decode.
    """
    config = read_config(recipe, TrainConfig)
    towers = (*list_vision_sources(config.vision_model), config.text_model)
    if "/" in (folder := _find_folder(config.data)):  # before the towers are looked up on the Hub
        require_data(folder, config)
    require(*CAPTION_TUNING, *(() if {*EMBEDDED_VISION}.isdisjoint(towers) else DEMO))
    require_text_tower(config.text_model, config.build.lora)
    use_image_limits(limits)
    use_device(config.device)
    if dry_run:
        from ..recipes.train import plan_train

        print(plan_train(config))
        print("Nothing was computed or written. Remove --dry-run to run it.")
        return 0
    from ..recipes.train import train as run

    run(config)
    return 0


def _find_folder(data: str) -> str:
    """Return FOLDER of NAME=FOLDER; an existing path, or one with a slash before "=", is kept."""
    name, sign, folder = data.partition("=")
    return folder if sign and "/" not in name and not Path(data).exists() else data
