"""Tables of a model in use: stores and indexes at scale, embeddings, a server, graphs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from benchmarks.tables.markdown_tables import draw_table, list_versions, percent


def _render_embed_speed(report: dict[str, Any]) -> str:
    heads = (
        "rows",
        "embed, rows per second",
        "sentence-transformers and pandas",
        "times",
        "cosine",
    )
    rows = [
        [
            f"{row['count']:,} {row['modality']}s",
            f"{row['rows_per_second']:.1f}",
            f"{row['sentence_transformers_rows_per_second']:.1f}",
            f"{row['times_sentence_transformers']:.2f}",
            f"{row['min_cosine']:.4f}",
        ]
        for row in report["rows"]
    ]
    note = f"Machine: {report['hardware']}."
    return f"{draw_table(heads, rows)}\n{note}\n"


def _render_onnx(report: dict[str, Any]) -> str:
    heads = ("text tower", "MB", "captions per second", "times torch", "smallest cosine", "R@1")
    names = {"torch": "torch, float32", "float32": "ONNX Runtime, float32",
             "int8": "8-bit weights", "int4": "4-bit weights"}  # fmt: skip
    rows = [
        (
            names[row["name"]],
            f"{row['size_mb']:.0f}",
            f"{row['captions_per_second']:.1f}",
            f"{row['times_torch']:.2f}",
            f"{row['min_cosine']:.5f}",
            percent(row["recall_at_1"]),
        )
        for row in report["rows"]
    ]
    note = (
        f"Captions: {report['captions']}. R@1: text to image, {report['recall_on']}, images in "
        f"float32. Opset {report['opset']}, IR {report['ir_version']}. {report['hardware']}. "
        f"{list_versions(report['versions'], 'torch', 'onnxruntime')}."
    )
    return f"{draw_table(heads, rows)}\n{note}\n"


def _render_training_data_distance(report: dict[str, Any]) -> str:
    kinds = report["one_kind"]
    heads = ("trained on", *kinds, "most similar of its own kind", "half of another kind")
    rows = []
    for name, of_kind in kinds.items():
        judged = {**of_kind["others"], name: of_kind["own"]}
        rows.append(
            [
                f"{name} ({of_kind['num_images']:,})",
                *(f"{judged[n]['distance']:.2f}, {percent(judged[n]['sets_far'])}" for n in kinds),
                percent(of_kind["own"]["nearest_far"]),
                ", ".join(f"{n} {percent(o['half_far'])}" for n, o in of_kind["others"].items()),
            ]
        )
    noticed = ", ".join(
        f"{n} by {' and '.join(pair['kinds'])}"
        for pair in report["two_kinds"]
        for n, o in pair["others"].items()
        if o["is_far"]
    )
    thresholds = dict.fromkeys(f"{of_kind['threshold']:.2f}" for of_kind in kinds.values())
    note = (
        f"Distances above {' or '.join(thresholds)} are far. Most similar: each image with its 19 "
        f"nearest. Half: 20 of its own kind and 20 of another. Far from models of two "
        f"kinds: {noticed or 'none'}. {report['hardware']}."
    )
    return f"{draw_table(heads, rows)}\n{note}\n"


def _render_search(report: dict[str, Any]) -> str:
    ann = report["ann"]
    visited = f"{ann['nprobes']} of {ann['num_partitions']} partitions"
    rows = [
        (f"the index, {visited}", *_search_cells(report, ""), f"{report['build_s']:.0f}"),
        (f"FAISS, {report['faiss']}", *_search_cells(report, "faiss_"),
         f"{report['faiss_build_s']:.0f}"),
        ("comparison with every image", f"{report['exact_query_ms']:.0f}", "1.000", "–", "–"),
    ]  # fmt: skip
    heads = ("search", "ms per query", "recall@10", "memory, GB", "seconds to build")
    cosines = report["cosines"]
    notes = (
        f"{report['rows']:,} embeddings of {report['width']} numbers, {report['queries']} texts. "
        f"Mean cosines: {cosines['text_with_its_image']} between a text and its image, "
        f"{cosines['text_with_any_image']} with any image, {cosines['image_with_any_image']} "
        f"between two images. {report['processor']}, {report['cores']} cores; commit "
        f"{report['commit']}."
    )
    return f"{draw_table(heads, rows)}\n{notes}\n{_draw_photographs(report.get('photographs'))}"


def _search_cells(report: dict[str, Any], prefix: str) -> tuple[str, str, str]:
    return (
        f"{report[f'{prefix}query_ms']:.0f}",
        f"{report[f'{prefix}recall_at_10']:.3f}",
        f"{report[f'{prefix}rss_gb']:.1f}",
    )


def _draw_photographs(photographs: dict[str, Any] | None) -> str:
    if photographs is None:
        return ""
    names = {
        "decode_s": "decode every image once",
        "model_start_s": "load the model",
        "index_s": "`llm2clip index`",
        "index_unchanged_s": "`llm2clip index` again",
        "second_search_s": "`llm2clip search`, the second time",
        "second_search_graphs_s": "the same with `--model` and ONNX graphs",
    }
    rows = [
        (label, f"{photographs[name]:.1f}") for name, label in names.items() if name in photographs
    ]
    heads = (f"{photographs['images']:,} photographs", "seconds")
    return f"\n{draw_table(heads, rows)}"


def _render_scale(report: dict[str, Any]) -> str:
    draw = {
        "records": _draw_records,
        "stages": _draw_stages,
        "recipes": _draw_recipes,
        "finetune": _draw_finetuning,
        "store": _draw_store,
        "streams": _draw_streams,
        "engines": _draw_engines,
    }
    parts = {name: report[name] for name in draw if name in report}
    tables = [draw[name](part) for name, part in parts.items()]
    names = [part["processor"].partition(" (")[0] for part in parts.values()]
    machines = (f"{n}, {p['cores']} cores" for n, p in zip(names, parts.values(), strict=True))
    if "plan" in report:
        tables.append(_draw_plan(report["plan"]))
    hardware = " and ".join(dict.fromkeys(machines))
    commits = ", ".join(f"{name} {part['commit']}" for name, part in parts.items())
    return "\n".join([*tables, f"{hardware}; commits: {commits}.\n"])


def _draw_records(part: dict[str, Any]) -> str:
    heads = ("records", "seconds to index", "seconds to open", "MB opened")
    rows = [
        (
            f"{row['records']:,}",
            f"{row['index_seconds']:.1f}",
            f"{row['open_seconds']:.3f}",
            f"{row['open_resident_mb']:.0f}",
        )
        for row in part["counts"]
    ]
    return draw_table(heads, rows)


_MEMORY = ("private MB gained", "with mapped pages")


def _show_memory(row: dict[str, Any]) -> tuple[str, str]:
    return f"{row['private_mb']:.0f}", f"{row['resident_mb']:.0f}"


def _draw_stages(part: dict[str, Any]) -> str:
    heads = (
        "stage",
        "records",
        "seconds to the first batch",
        *_MEMORY,
    )
    rows = [
        (
            row["stage"],
            f"{row['records']:,}",
            f"{row['seconds']:.1f}",
            *_show_memory(row),
        )
        for row in sorted(part["counts"], key=lambda row: (row["stage"], row["records"]))
    ]
    return draw_table(heads, rows)


def _draw_recipes(part: dict[str, Any]) -> str:
    heads = (
        "dry run of a paper's recipe",
        "records",
        "CPU seconds",
        *_MEMORY,
    )
    rows = [
        (
            f"slowest of {len(row['cpu_seconds_of'])}",
            f"{row['records']:,}",
            f"{row['cpu_seconds']:.2f}",
            *_show_memory(row),
        )
        for row in part["counts"]
    ]
    return draw_table(heads, rows)


def _draw_finetuning(part: dict[str, Any]) -> str:
    starts = [
        (
            "finetune-llm",
            f"{int(records):,}",
            f"{row['seconds_planned'] + row['seconds_counted']:.1f}",
            f"{row['peak_bytes'] / 1e6:.0f}",
        )
        for records, row in part["records"].items()
    ]
    heads = ("groups", "seconds for hard negatives", "exact search, by a sample", "recall")
    groups = [
        (
            f"{int(number):,}",
            f"{row['seconds']:.0f}",
            f"{row['seconds_exact']:,.0f}",
            f"{row['recall']:.3f}",
        )
        for number, row in part["nearest_groups"].items()
    ]
    of_starts = ("stage", "records", "seconds to plan", "private MB gained")
    return f"{draw_table(of_starts, starts)}\n{draw_table(heads, groups)}"


def _draw_streams(part: dict[str, Any]) -> str:
    heads = ("images per second", "files at random", "200 tar shards over HTTP")
    rows = [
        (name, f"{part[f'files_{name}_per_s']:,.0f}", f"{part[f'stream_{name}_per_s']:,.0f}")
        for name in ("bytes", "decoded")
    ]
    return draw_table(heads, rows)


def _draw_plan(plan: dict[str, Any]) -> str:
    heads = (f"{plan['images'] / 1e6:.0f} million images, on paper, derived", "hours", "GPU hours")
    rows = [
        (name, f"{stage['hours']:g}", str(stage.get("gpu_hours", "–")))
        for name, stage in plan["stages"].items()
    ]
    total = f"total, with a trained tower: {plan['dollars']:,} dollars"
    rows.append((total, f"{plan['hours']:g}", str(plan["gpu_hours"])))
    disk = [(name.replace("_", " "), f"{size:,}") for name, size in plan["disk_gb"].items()]
    memory = [(name, f"{size:g}") for name, size in plan["private_gb_per_machine"].items()]
    tables = (
        draw_table(heads, rows),
        draw_table(("on disk", "GB"), disk),
        draw_table(("in memory per machine, without the towers", "GB"), memory),
    )
    return "\n".join(tables)


def _render_scale_paper(report: dict[str, Any]) -> str:
    stages = ("finetune", "extract", "align")
    heads = ("recipe", "images", *(f"{stage}, GPU hours" for stage in stages),
             f"hours on {report['gpus']} GPUs", "stored captions, GB")  # fmt: skip
    rows = [
        (
            f"`{name}.yaml`",
            f"{run['images'] / 1e6:.1f}M",
            *(f"{run['gpu_hours'][stage]:g}" for stage in stages),
            f"{run['hours']:g}",
            f"{run['caption_store_gb']:,}",
        )
        for name, run in report["rows"].items()
    ]
    return f"{draw_table(heads, rows)}\nComputed for H100s from the recipes, not measured.\n"


def _draw_engines(part: dict[str, Any]) -> str:
    labels = {"one": "one process", "partitions": "two partitions", "ray": "two actors of Ray"}
    heads = (f"extract {part['captions']:,} captions", "seconds", "relative to one process")
    seconds = part["seconds"]
    rows = [
        (label, f"{seconds[name]:.0f}", f"{seconds[name] / seconds['one']:.2f}")
        for name, label in labels.items()
    ]
    return draw_table(heads, rows)


def _draw_store(part: dict[str, Any]) -> str:
    names = list(part["random"]["rows_per_second"])
    heads = ("rows per second", *names, "store relative to numpy")
    rows = [
        (
            kind,
            *(f"{part[kind]['rows_per_second'][name]:,}" for name in names),
            f"{part[kind]['rows_vs_numpy']:.2f}",
        )
        for kind in ("random", "sequential")
    ]
    checked = f"{part['rows_per_second_while_checking']:,}"
    rows.append(("random, rows read for the first time", checked, *["–"] * len(names)))
    return draw_table(heads, rows)


def _render_serving(report: dict[str, Any]) -> str:
    heads = ("clients", "texts per second", "of the bare model", "p50, ms", "p95, ms", "p99, ms")
    bare = report["bare_texts_per_second"]
    rows = [
        (
            clients,
            f"{row['texts_per_second']:.1f}",
            percent(row["texts_per_second"] / bare),
            *(f"{row[name]:.0f}" for name in ("p50_ms", "p95_ms", "p99_ms")),
        )
        for clients, row in report["by_clients"].items()
    ]
    note = (
        f"Bare model: {bare:.1f} texts per second; {report['texts']}. The server grew by "
        f"{report['rss_growth_mb']:.0f} MB over {report['memory']['num_requests']:,} requests. "
        f"{report['hardware']}; commit {report['commit']}."
    )
    return f"{draw_table(heads, rows)}\n{note}\n"


def _render_readme_image(report: dict[str, Any]) -> str:
    heads = ("sentence", "photographs found", "license", "by")
    rows = [
        (
            "" if rank else result["query"],
            hit["image"].replace("_", " "),
            hit["license"],
            re.sub(r"(.+?),? (https?://\S+)", r"[\1](\2)", hit["source"]),
        )
        for result in report["results"]
        for rank, hit in enumerate(result["hits"])
    ]
    held_out = report["held_out"]
    note = (
        f"{report['num_photographs']} photographs were searched. Trained on: "
        f"{report['trained_on']}, of which {held_out['num_images']} were held out: R@1 "
        f"{percent(held_out['t2i_r1'])} text to image, {percent(held_out['i2t_r1'])} image to "
        f"text, chance {percent(held_out['chance_t2i_r1'])}. Commit {report['commit']}."
    )
    return f"{draw_table(heads, rows)}\n{note}\n"


def _render_busy_machine(report: dict[str, Any]) -> str:
    labels = {
        "of the command": "as set by the commands",
        "of OpenMP": "OpenMP's default",
        "passive": "`OMP_WAIT_POLICY=PASSIVE`",
    }
    seconds = report["median_seconds"]
    heads = ("waiting threads", "idle machine, seconds", f"with {report['busy_loops']} busy loops")
    rows = [
        (label, *(f"{seconds[state][name]:.1f}" for state in ("idle", "busy")))
        for name, label in labels.items()
    ]
    others = report["other_processes"]
    note = (
        f"`llm2clip embed` on {report['count']} captions, start included; medians of "
        f"{len(report['seconds']['idle']['passive'])} runs each, interleaved. Other running "
        f"processes: {others['idle']:g} and {others['busy']:g}. {report['hardware']}, "
        f"{report['busy_loops']} cores; commit {report['commit']}."
    )
    return f"{draw_table(heads, rows)}\n{note}\n"


def _render_command_pairs(report: dict[str, Any]) -> str:
    heads = ("", "CPU time, after / before", "seconds", "peak MB")
    rows = [
        [
            name,
            f"{task['cpu_share']:.2f}",
            "{:.2f} → {:.2f}".format(*(task[when]["seconds"] for when in ("before", "after"))),
            "{:.0f} → {:.0f}".format(*(task[when]["peak_mb"] for when in ("before", "after"))),
        ]
        for name, task in report["tasks"].items()
    ]
    note = (
        f"{report['images']:,} images, {report['captions']:,} captions. Commits {report['before']} "
        f"and {report['commit']}; medians of {report['rounds']} rounds, in turns. "
        f"{report['hardware']}."
    )
    return f"{draw_table(heads, rows)}\n{note}\n"


def _render_start_up(report: dict[str, Any]) -> str:
    commands = report["commands"]
    imports, phases = (next(iter(commands.values()))[part] for part in ("imports", "phases"))
    heads = ("", "seconds", "CPU seconds", *(f"import of {name}" for name in imports), *phases)
    rows = [
        [
            name,
            *(
                f"{seconds:.1f}"
                for seconds in (
                    times["seconds"],
                    times["cpu_s"],
                    *times["imports"].values(),
                    *times["phases"].values(),
                )
            ),
        ]
        for name, times in commands.items()
    ]
    note = (
        f"Medians of {report['rounds']} runs; parts from one run each, with Python's import timer "
        f"and its profiler. Commit {report['commit']}. {report['hardware']}. "
        f"{list_versions(report['versions'], 'torch', 'transformers')}."
    )
    return f"{draw_table(heads, rows)}\n{note}\n"


def _render_losses(report: dict[str, Any]) -> str:
    sizes = list(next(iter(report["seconds"].values())))
    heads = ("loss", *(f"batch of {int(size):,}, ms" for size in sizes))
    rows = [
        [name, *(f"{1000 * seconds[size]:,.0f}" for size in sizes)]
        for name, seconds in report["seconds"].items()
    ]
    dims = report["dims"]
    note = (
        f"Forward and backward of embeddings of {dims['image']} dimensions, before the projections "
        f"{dims['vision']} and {dims['caption']}. {report['hardware']}; commit {report['commit']}."
    )
    return f"{draw_table(heads, rows)}\n{note}\n"


PRODUCT_TABLES: dict[str, Callable[[Any], str]] = {
    "busy_machine": _render_busy_machine,
    "command_pairs": _render_command_pairs,
    "losses": _render_losses,
    "start_up": _render_start_up,
    "embed_speed": _render_embed_speed,
    "onnx": _render_onnx,
    "readme_image": _render_readme_image,
    "scale": _render_scale,
    "scale_paper": _render_scale_paper,
    "search": _render_search,
    "serving": _render_serving,
    "training_data_distance": _render_training_data_distance,
}
