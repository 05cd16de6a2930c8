"""The images of an index as a file for FAISS, with the paths that its ids stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from .._extras import FAISS, require
from ..data.atomic_files import require_new_file, write_atomically
from .ann_index import FEWEST_ROWS
from .index_database import IndexDatabase

# Of the partitions, by a query: texts lie far from all images, and need many.
_SHARE_VISITED = 0.125
_TRAINED_ON_PER_PARTITION = 64


def export_faiss(database: IndexDatabase, image_dir: Path, file: Path) -> Path:
    """Write all images of an index for FAISS; the similarity is the inner product.

    Below 20,000 images it is an exact index (`IndexFlatIP`); from there on it has partitions and
    half-precision embeddings (`IVF…,SQfp16`), of which a query visits an eighth.
    """
    names_file = require_new_files(file)
    require(FAISS)
    import faiss

    num_rows = database.count()
    if num_rows == 0:
        raise ValueError(f"{database.location} holds no image. Index a folder into it first.")
    file.parent.mkdir(parents=True, exist_ok=True)
    index = make_faiss_index(database, num_rows)
    paths: list[str] = []
    for names, embeds in database.iterate_embeddings():
        index.add(np.ascontiguousarray(embeds))
        paths += [str(image_dir / name) for name in names]
    unfinished = file.with_name(f".{file.name}.tmp")
    try:
        faiss.write_index(index, str(unfinished))
        content = {"model": database.about.model, "paths": paths}
        write_atomically(names_file, json.dumps(content, ensure_ascii=False).encode())
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)
    return names_file


def require_new_files(file: Path) -> Path:
    """Require that an index and the file of its paths can be written; return the latter."""
    names_file = file.with_name(f"{file.name}.json")
    require_new_file(file)
    require_new_file(names_file)
    return names_file


def make_faiss_index(database: IndexDatabase, num_rows: int) -> Any:
    """Make an empty index of FAISS, trained for these images."""
    import faiss

    width = database.about.width
    if num_rows < FEWEST_ROWS:
        return faiss.IndexFlatIP(width)
    num_partitions = round(num_rows**0.5)
    kind = f"IVF{num_partitions},SQfp16"
    index: Any = faiss.index_factory(width, kind, faiss.METRIC_INNER_PRODUCT)
    # About as many embeddings as it needs, from everywhere in the index.
    step = max(1, num_rows // (num_partitions * _TRAINED_ON_PER_PARTITION))
    parts = [embeds[::step] for _, embeds in database.iterate_embeddings()]
    index.train(np.ascontiguousarray(np.concatenate(parts)))
    index.nprobe = max(1, round(_SHARE_VISITED * num_partitions))
    return index
