"""The official checkpoint families, one file per family; to add a family, add a file.

Each file describes its family in `LAYOUT`. A family's file imports torch and transformers only when
a checkpoint is converted, because `llm2clip convert` generates its flags and help from these
descriptions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from importlib import import_module
from pkgutil import iter_modules

from ...configs.export_config import SourceFormat
from .layout import Layout

_FOUND: tuple[Layout, ...] = tuple(
    import_module(f"{__name__}.{file.name}").LAYOUT
    for file in iter_modules(__path__)
    if file.name != "layout"
)
# By the names of the source formats.
LAYOUTS = {layout.choice: layout for layout in _FOUND}


def find_layout(source_format: SourceFormat) -> Layout:
    """Find the layout of a source format, and refuse options that do not apply to it."""
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
            f"activation={source_format.activation} cannot be used with the source format "
            f"{layout.choice}, which supports only {' or '.join(layout.activations)}. Remove it, "
            "or use the activation that the checkpoint was trained with."
        )
    return layout


def require_options(layout: Layout, options: Iterable[str]) -> None:
    """Refuse options that only other layouts have."""
    for option in options:
        takers = [taker.choice for taker in LAYOUTS.values() if option in taker.options]
        if takers and layout.choice not in takers:
            raise ValueError(
                f"`{option}` only applies to the source formats {', '.join(takers)}, not to "
                f"{layout.choice}. Remove it."
            )
