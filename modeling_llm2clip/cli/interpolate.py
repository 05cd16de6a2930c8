"""`llm2clip interpolate`."""

from __future__ import annotations

from pathlib import Path

from ..configs.align_config import InterpolateConfig
from ..configs.data_config import DataConfig, ImageLimitsConfig
from .command import command
from .options import (
    read_captioned_images,
    require_data,
    require_model,
    use_device,
    use_image_limits,
)


@command(
    group="Train",
    examples=("llm2clip interpolate aligned/model tuned-tower/model other-images between",),
)
def interpolate(
    before: str,
    after: str,
    data: str,
    output: Path,
    /,
    *,
    caption_store: Path | None = None,
    reading: DataConfig,
    limits: ImageLimitsConfig,
    config: InterpolateConfig,
) -> int:
    """Writes the weights between two models that suit other images best; trains nothing.

    Args:
        before: Hub id or folder of a model before a training.
        after: Hub id or folder of that model after it.
        data: Captioned images that neither was trained on.
        output: Folder to write.
        caption_store: Caption embeddings of these images from `llm2clip extract`. Default: none;
            the language model runs.
        reading: How the data are read.
        limits: Which images are decoded.
        config: Which weights are tried, and what chooses.
    """
    for model in (before, after):
        require_model(model)
    from ..data.atomic_files import require_new_folder

    require_new_folder(output)
    require_data(data, reading)
    use_image_limits(limits)
    use_device(config.device)
    from ..training.alignment.interpolate import interpolate as run

    records = read_captioned_images(data, reading, require_images=True, trains_on_images=True)
    result = run(before, after, records, output, config, caption_store=caption_store)
    print(f"{result}\nWrote {output}, {result.chosen:.0%} of the way from {before} to {after}.")
    return 0
