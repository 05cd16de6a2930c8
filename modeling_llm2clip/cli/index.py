"""`llm2clip index`."""

from __future__ import annotations

from pathlib import Path

from .._extras import list_needs_of_index
from .._suggestions import counted
from ..configs.config_fields import ImageLimitsConfig
from ..configs.encoding_config import IndexConfig
from .command import command
from .options import report, require_image_folder, require_model, use_device, use_image_limits


@command(
    group="Use",
    examples=(
        "llm2clip index aligned/model my-images my-index",
        "llm2clip index aligned/model my-images s3://bucket/index --ann always",
    ),
)
def index(
    model: str,
    images: Path,
    db: str,
    /,
    *,
    limits: ImageLimitsConfig,
    config: IndexConfig,
) -> int:
    """Builds a search database from a folder of images, or updates it.

    Args:
        model: Hub id or folder of an LLM2CLIP model.
        images: Folder of images; subfolders are included.
        db: Folder of the database, new or existing, or a URI such as s3://bucket/index.
        limits: Limits on the images to decode.
        config: Options for encoding the images and for building an approximate index.
    """
    require_model(model, *list_needs_of_index(db))
    require_image_folder(images)
    use_image_limits(limits)
    use_device(config.device, config.precision)
    from ..search.image_index import ImageIndex

    built = ImageIndex.build(model, images, db, config, report=report)
    report(f'{counted(len(built), "image")} in {db}. Search: llm2clip search {db} "a dog"')
    return 0
