"""Tables of `docs/benchmarks/gpu.md`, for `render_tables.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.tables.markdown_tables import draw_table, percent

_WIDE = "megabytes_in_at_full_width"


def _render_gpu_proxies(report: dict[str, Any]) -> str:
    before, after = report["before"], report["after"]
    rows = [
        (label, _show(read, before), _show(read, after))
        for label, read in _list_figures(before | after)
    ]
    note = (
        f"Commits {before['commit']} and {after['commit']}; CPU times of one thread at loads of "
        f"{before['load']} and {after['load']}. {report['hardware']}."
    )
    return f"{draw_table(('', 'before', 'after'), rows)}\n{note}\n"


def _show(read: Callable[[Any], str], figures: Any) -> str:
    try:
        return read(figures)
    except KeyError:  # measured in one of both alone
        return "–"


def _list_figures(parts: Any) -> list[tuple[str, Callable[[Any], str]]]:
    """List what is shown: a label, and how it is read."""
    rows: list[tuple[str, Callable[[Any], str]]] = []
    for name, figures in parts["full_width"].items():
        unit = next(key for key in figures if key.startswith("gflop")).removeprefix("gflop_per_")
        rows.append((
            f"{name}: GFLOP per {unit}, kernels",
            lambda r, n=name, u=unit: _show_kernels(r["full_width"][n], u),
        ))  # fmt: skip
    for name in parts["shapes"]:
        rows.append((
            f"{name} captions: real tokens, shapes",
            lambda r, n=name: "{real}, {shapes}".format(
                real=percent(r["shapes"][n]["real_tokens"]), shapes=r["shapes"][n]["shapes"]
            ),
        ))  # fmt: skip
    for name in parts["transfers"]:
        rows.append((
            f"{name}: reads, copies that wait, others, copies back",
            lambda r, n=name: ", ".join(
                f"{r['transfers'][n][key]:g}"
                for key in ("reads", "copies_in", "copies_ahead", "copies_out")
            ),
        ))  # fmt: skip
    rows.append((
        "align, a step of 4,096 × 5,120: megabytes to the GPU",
        lambda r: f"{r['transfers']['align, a step'][_WIDE]:.0f}",
    ))  # fmt: skip
    rows += [
        (f"{name}: CPU ms", lambda r, n=name: f"{r['cpu_ms'][n]:.0f}") for name in parts["cpu_ms"]
    ]
    return rows


def _show_kernels(figures: dict[str, Any], unit: str) -> str:
    optimizer = figures.get("optimizer_kernels")
    more = "" if optimizer is None else f" + {optimizer} of the optimizer"
    return f"{figures[f'gflop_per_{unit}']:,.4g}, {figures['kernels']}{more}"


GPU_TABLES: dict[str, Callable[[Any], str]] = {"gpu_proxies": _render_gpu_proxies}
