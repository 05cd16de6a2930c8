"""`llm2clip merge-store`."""

from __future__ import annotations

from pathlib import Path

from .command import command
from .options import suggest_align


@command(
    group="Train",
    examples=("llm2clip merge-store captions",),
)
def merge_store(store: Path, /) -> int:
    """Completes a store that llm2clip extract --partition computed in parts.

    Checks that every shard is there. A complete store stays as it is.

    Args:
        store: Folder of the store.
    """
    from ..data.store.store_manifest import StoreManifest
    from ..embedding.extract import describe_extraction
    from ..embedding.extract import merge_store as merge

    merge(store)
    print("\n".join(describe_extraction(store)))
    content = StoreManifest.read(store).content
    print(f"Align a model on it: {suggest_align('MODEL', 'DATA', store, content)}")
    return 0
