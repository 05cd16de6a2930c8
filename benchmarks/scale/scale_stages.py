"""The starts of `extract` and `align`, and dry runs of recipes, on many records.

Called by `scale.py`; `finetune-llm` is measured by `scale_finetune.py`. Embeddings are random and
narrow, because a start does not depend on their width.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

STAGES = ("extract", "align")
_FEW = 5000
_PAPER = Path(__file__).parents[2] / "examples" / "recipes" / "paper"
_WIDTHS = {"caption_embeds": 64, "vision_embeds": 32}
_BATCH = 4096
_STEPS = 4
_WORKERS = 4


def prepare_stage(
    stage: str, folder: Path, count: int, *, widths: Mapping[str, int] = _WIDTHS
) -> dict[str, Any]:
    """Write what a stage needs beside the records: the model, and for `align` both stores.

    Args:
        stage: one of `STAGES`.
        folder: has the records in a folder named by their number.
        count: number of records.
        widths: of what the stores hold.
    """
    from benchmarks.shared.small_model import write_small_model

    if not (folder / "model").is_dir():
        write_small_model(folder / "model", width=widths["caption_embeds"])
    if stage == "align":
        write_stores(folder, count, widths)
    return {}


def measure_stage(stage: str, folder: Path, count: int) -> dict[str, Any]:
    """Start a stage in this process.

    Args:
        stage: one of `STAGES`.
        folder: as `prepare_stage` left it.
        count: number of records.

    Returns:
        Seconds to the first batch, and the peak of memory until then, in MB, beyond that of a start
        on the fewest records that fill a batch.
    """
    return {"extract": _start_extraction, "align": _start_alignment}[stage](folder, count)


def _load(folder: Path, count: int) -> Any:
    from modeling_llm2clip.data.records.record_loading import load_records

    return load_records(folder / str(count), require_images=False)


def _start_extraction(folder: Path, count: int) -> dict[str, Any]:
    """Plan a store of captions, and tokenize its first shard."""
    import torch

    from modeling_llm2clip.configs.encoding_config import ExtractConfig
    from modeling_llm2clip.data.store.store_manifest import StoreManifest
    from modeling_llm2clip.embedding.extract import index_records, open_rows, plan_store
    from modeling_llm2clip.embedding.shard_encoding import load_shard_encoder
    from modeling_llm2clip.embedding.store_writer import begin_store

    config = ExtractConfig(device="cpu", show_progress=False)
    records = _load(folder, count)

    def start(chosen: Any, output: Path) -> float:
        begin = time.perf_counter()
        model = folder / "model"
        encoder = load_shard_encoder(model, "text", config, torch.device("cpu"))
        planned = plan_store(model, chosen, encoder, config, "text")
        begin_store(output, planned, index_records(chosen, planned))
        begun = StoreManifest.read(output)
        rows = open_rows(output, begun, chosen)
        encoder.prepare(rows.read_inputs(begun.inputs_of_shard(0)))
        return time.perf_counter() - begin

    start(records[:_BATCH], folder / f"few-{count}")
    with PeakMemory() as memory:
        seconds = start(records, folder / f"captions-{count}-of-extract")
    return {"seconds": round(seconds, 2), **memory.describe()}


def _start_alignment(folder: Path, count: int) -> dict[str, Any]:
    """Run the first steps from both stores, in this process alone and with workers."""
    from transformers import TrainerCallback

    from modeling_llm2clip.configs.align_config import AlignConfig
    from modeling_llm2clip.training.alignment.align import align

    records = _load(folder, count)
    noted: dict[str, Any] = {}

    class Watch(TrainerCallback):  # type: ignore[misc]
        """Notes when the first step begins, and what the workers hold at the last one."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            if "begun" not in noted:
                noted.update(begun=time.perf_counter(), **memory.describe())

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            noted["workers"] = [_count_bytes(pid) for pid in _list_children()]

    def start(chosen: Any, name: str, *, workers: int) -> float:
        noted.clear()
        config = AlignConfig(
            max_steps=_STEPS, global_batch_size=min(_BATCH, len(chosen)), num_workers=workers,
            held_out_ratio=0.0, projection_init="model", image_noise=0.0, caption_noise=0.0,
            device="cpu", save_steps=100,
        )  # fmt: skip
        begin = time.perf_counter()
        align(
            folder / "model", chosen, folder / f"aligned-{count}-{name}", config,
            caption_store=folder / f"captions-{count}", image_store=folder / f"images-{count}",
            callbacks=[Watch()],
        )  # fmt: skip
        return float(noted["begun"] - begin)

    with PeakMemory() as memory:
        seconds = start(records, "alone", workers=0)
        alone = {name: noted[name] for name in ("resident_mb", "private_mb")}
    with PeakMemory() as memory:
        start(records, "workers", workers=_WORKERS)
    private = [pair[1] for pair in noted["workers"]]
    return {
        "seconds": round(seconds, 2),
        **alone,
        "worker_private_mb": round(max(private) / 1e6, 1),
        "workers": len(private),
    }


def prepare_recipes(folder: Path, count: int) -> dict[str, Any]:
    """Write records for the recipes of the paper, and index them.

    Args:
        folder: gets a folder named by the number of records.
        count: number of records.
    """
    from benchmarks.scale.scale_records import write_records
    from modeling_llm2clip.recipes.recipe_plan import read_split

    write_records(folder / str(count), count, of_paper=True)
    read_split(_read_recipes(folder, count)[0])
    return {}


def plan_recipes(folder: Path, count: int) -> dict[str, Any]:
    """Make the dry run of every recipe of the paper in this process.

    The towers pass for downloaded, the evaluation datasets are left out, and the records are open.

    Args:
        folder: as `prepare_recipes` left it.
        count: number of records.

    Returns:
        The most CPU seconds and MB of a recipe, the latter beyond those after a dry run on few
        records, and the seconds of each.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    from modeling_llm2clip.recipes.recipe_plan import read_split
    from modeling_llm2clip.recipes.train import plan_train

    constants.HF_HUB_CACHE = str(folder / "hub")
    recipes = _read_recipes(folder, count)
    towers = {tower for each in recipes for tower in (each.vision_model, each.text_model)}
    for tower in towers:
        cached = folder / "hub" / repo_folder_name(repo_id=tower, repo_type="model")
        (cached / "snapshots").mkdir(parents=True, exist_ok=True)
    records, test = read_split(recipes[0])
    plan_train(recipes[0], (records[:_FEW], test))
    seconds, gained = {}, []
    for recipe in recipes:
        with PeakMemory() as memory:
            begin = time.process_time()
            plan_train(recipe, (records, test))
            seconds[recipe.output.name] = round(time.process_time() - begin, 2)
        gained.append(memory.describe())
    return {
        "cpu_seconds": max(seconds.values()),
        **{name: max(row[name] for row in gained) for name in gained[0]},
        "cpu_seconds_of": seconds,
    }


def list_recipes() -> list[Path]:
    """List the recipes of the paper."""
    return sorted(file for file in _PAPER.glob("*.yaml") if file.stem != "base")


def _read_recipes(folder: Path, count: int) -> list[Any]:
    from modeling_llm2clip.configs.config_fields import read_config
    from modeling_llm2clip.configs.train_config import TrainConfig

    files = list_recipes()
    changed = {"data": str(folder / str(count)), "check_images": False, "device": "cpu"}
    recipes = [read_config(file, TrainConfig) for file in files]
    return [
        replace(recipe, eval_datasets=(), output=folder / "runs" / file.stem, **changed)
        for recipe, file in zip(recipes, files, strict=True)
    ]


def write_stores(folder: Path, count: int, widths: Mapping[str, int]) -> None:
    """Write stores of random embeddings that pass for those of the model.

    Args:
        folder: has the records in a folder named by their number, and the model.
        count: number of records.
        widths: of the embeddings, by the content of a store.
    """
    from modeling_llm2clip.data.records.data_hashes import hash_images, hash_texts
    from modeling_llm2clip.data.records.record_loading import load_records
    from modeling_llm2clip.model_folders.fingerprint import fingerprint_text, fingerprint_vision

    records = load_records(folder / str(count))
    data = {"data": hash_texts(records)}
    for name, content, fingerprint, plan in (
        ("captions", "caption_embeds", fingerprint_text, data),
        ("images", "vision_embeds", fingerprint_vision, {**data, "images": hash_images(records)}),
    ):
        _write_store(
            folder / f"{name}-{count}", content, fingerprint(folder / "model"), plan, records,
            widths[content],
        )  # fmt: skip


def _write_store(
    folder: Path,
    content: str,
    fingerprint: dict[str, str],
    plan: dict[str, str],
    records: Any,
    width: int,
) -> None:
    import torch

    from modeling_llm2clip.data.store.store_manifest import StoreManifest
    from modeling_llm2clip.embedding.extract import index_records, open_rows
    from modeling_llm2clip.embedding.store_writer import StoreWriter, begin_store

    planned = StoreManifest(
        content=content, fingerprint=fingerprint, dtype="float16", dim=width,
        rows_per_shard=2**16, plan=plan,
    )  # fmt: skip
    begin_store(folder, planned, index_records(records, planned))
    begun = StoreManifest.read(folder)
    writer, rows = StoreWriter(folder, begun), open_rows(folder, begun, records)
    generator = torch.Generator().manual_seed(0)
    for shard in writer.list_missing():
        inputs = rows.read_inputs(begun.inputs_of_shard(shard))
        writer.write(shard, torch.randn(len(inputs), width, generator=generator))
    writer.finish()


class PeakMemory:
    """The peak of this process's memory while the context runs, sampled every 5 ms."""

    def __enter__(self) -> PeakMemory:
        """Begin."""
        self._before = self._peak = _count_bytes()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        self._ends.set()
        self._thread.join()

    def describe(self) -> dict[str, float]:
        """Return what the process gained, in MB: resident with mapped files, and private."""
        gained = [p - b for p, b in zip(self._peak, self._before, strict=True)]
        return {"resident_mb": round(gained[0] / 1e6, 1), "private_mb": round(gained[1] / 1e6, 1)}

    def _watch(self) -> None:
        while not self._ends.wait(0.005):
            self._peak = tuple(map(max, self._peak, _count_bytes()))  # type: ignore[assignment]


def _count_bytes(pid: int | str = "self") -> tuple[int, int]:
    """Count the bytes of a process: resident, and those that are not of a file."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", status, re.MULTILINE))
    return int(fields["VmRSS"]) * 1024, int(fields["RssAnon"]) * 1024


def _list_children() -> Sequence[int]:
    tasks = Path("/proc/self/task").iterdir()
    return [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
