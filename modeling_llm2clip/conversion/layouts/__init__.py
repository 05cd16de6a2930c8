"""The official families of checkpoints: one file each, which is all that a new one needs.

A file describes its family as `LAYOUT`, without importing torch or transformers before it is used:
the flags and help of `llm2clip convert` are made of these descriptions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from importlib import import_module
from pkgutil import iter_modules

from ...configs.source_format import SourceFormat
from .layout import Layout

_FOUND: tuple[Layout, ...] = tuple(
    import_module(f"{__name__}.{file.name}").LAYOUT
    for file in iter_modules(__path__)
    if file.name != "layout"
)
# By the names that users choose.
LAYOUTS = {layout.choice: layout for layout in _FOUND}


def find_layout(source_format: SourceFormat) -> Layout:
    """Find the layout of a source format, and refuse what that layout has no use for."""
    by_name = {layout.name: layout for layout in LAYOUTS.values()}
    layout = by_name.get(source_format.layout)
    if layout is None:
        raise ValueError(f"layout={source_format.layout!r} must be one of {list(by_name)}.")
    changed = (
        field.name
        for field in fields(source_format)
        if getattr(source_format, field.name) != field.default
    )
    require_options(layout, changed)
    if source_format.activation not in layout.activations:
        raise ValueError(
            f"activation={source_format.activation} does not go with the source format "
            f"{layout.choice}, but {' or '.join(layout.activations)} does. Leave it out, or give "
            "the one that the checkpoint was trained with."
        )
    return layout


def require_options(layout: Layout, options: Iterable[str]) -> None:
    """Refuse options of a source format that only other layouts have."""
    for option in options:
        takers = [taker.choice for taker in LAYOUTS.values() if option in taker.options]
        if takers and layout.choice not in takers:
            raise ValueError(
                f"`{option}` goes with the source formats {', '.join(takers)}; {layout.choice} has "
                "no use for it. Leave it out."
            )
