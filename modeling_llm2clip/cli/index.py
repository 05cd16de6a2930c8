"""`llm2clip index`."""

from __future__ import annotations

from pathlib import Path

from .._extras import FAISS, list_needs_of_index
from .._suggestions import counted
from ..configs.data_config import ImageLimitsConfig
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
    faiss: Path | None = None,
    limits: ImageLimitsConfig,
    config: IndexConfig,
) -> int:
    """Encodes the images of a folder into a search database, or updates it.

    Args:
        model: Hub id or folder of an LLM2CLIP model.
        images: Folder of images; subfolders are included.
        db: Folder of the database, new or from an earlier call, or a URI such as s3://bucket/index.
        faiss: New file for the same embeddings in FAISS, with a JSON file of their paths beside it.
            Default: none.
        limits: Which images are decoded.
        config: How to encode the images, and when to build an approximate index.
    """
    require_model(model, *list_needs_of_index(db), *([FAISS] if faiss is not None else []))
    if faiss is not None:
        from ..search.faiss_export import require_new_files

        require_new_files(faiss)
    require_image_folder(images)
    use_image_limits(limits)
    use_device(config.device)
    from ..search.image_index import ImageIndex

    built = ImageIndex.build(model, images, db, config, report=report)
    report(f'{counted(len(built), "image")} in {db}. Search: llm2clip search {db} "a dog"')
    if faiss is not None:
        paths = built.export_faiss(faiss)
        report(f"Wrote {faiss} for FAISS, and the paths of its ids to {paths}.")
    return 0
