"""Steps that several commands share: what they need, check and report, and settings of libraries.

Optional packages that follow from the command line are named before anything else: neither torch
nor transformers is imported. The libraries name those that a model's files need when they load it.

The results of `index`, `search` and `tag` go to stdout, everything else to stderr.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable, MutableMapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from .._extras import GGUF, LORA, Need, require
from .._suggestions import counted, escape_controls
from ..configs.data_config import DataConfig, ImageLimitsConfig
from ..configs.encoding_config import EncodingConfig

if TYPE_CHECKING:
    import torch

    from ..data.records.record_table import RecordTable
    from ..data.records.records import Modality
    from ..data.streams.record_streams import RecordStream

# Options that a modality has no use for.
_FOREIGN = {
    "text": ("skip_invalid", "jpeg_decoding"),
    "image": ("sentence_views",),
}
# A user who has set one of these has chosen. Those of other OpenMPs (KMP_…) mean nothing to GNU's,
# and `accelerate launch --cpu` sets them for every process.
_CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
# Rounds of GNU OpenMP, which PyTorch's wheels for Linux use: a few microseconds. Its default is
# milliseconds, in which a thread that waits takes a core from the one that computes, wherever there
# are fewer free cores than threads. On an idle machine the default, these rounds and threads that
# sleep at once (OMP_WAIT_POLICY=PASSIVE) differ by no more than single runs do; see
# benchmarks/speed/busy_machine.py.
_SPIN_COUNT = 10_000


def require_model(
    source: str | Path, *needs: Need, revision: str | None = None, or_teacher: bool = False
) -> None:
    """Raise an error for packages that are missing, and for what is not an LLM2CLIP model."""
    require(*needs)
    from ..model_folders.model_folder import require_own_model  # imports huggingface_hub

    require_own_model(source, revision=revision, or_teacher=or_teacher)


def require_text_tower(text: str | None, lora: object = None) -> None:
    """Raise MissingExtraError for the packages of a .gguf file and of a LoRA."""
    is_gguf = text is not None and Path(text).suffix == ".gguf"
    require(*([GGUF] if is_gguf else []), *([LORA] if lora else []))


def use_device(name: str, precision: str = "auto") -> torch.device:
    """Find the device, and print it unless there was nothing to choose; refuse a precision that it
    does not have.
    """
    import torch

    from ..encoding.devices import describe_device, find_device, list_devices

    device = find_device(name, precision=precision)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # else kernels of libraries would run on the first GPU
    had_choice = name == "auto" and len(list_devices()) > 1
    if device.type != "cpu" or had_choice:
        print(f"Device: {describe_device(device)} (--device {name}).", file=sys.stderr)
    return device


def require_data(data: str, reading: DataConfig) -> None:
    """Raise ValueError for data that do not exist, before anything is imported."""
    from ..data.remote.remote_files import is_remote

    if not is_remote(data) and not Path(data).exists() and not re.search(r"[*?[{]", data):
        raise ValueError(
            f"{data}: no such data. Give a folder, *.parquet, *.tar, a COCO *.json file, a URL, or "
            "a .txt file that lists shards."
        )
    if reading.image_dir is not None and not reading.image_dir.is_dir():
        raise ValueError(f"image_dir={reading.image_dir}: no such folder.")


def name_data(data: str, *, is_elsewhere: bool) -> str:
    """Name data on a card: a folder by its own name, shards by their URLs without signatures."""
    from ..data.remote.shard_urls import drop_signature

    return drop_signature(data) if is_elsewhere else Path(data).resolve().name


def stream_captioned_images(data: str, reading: DataConfig) -> RecordStream:
    from ..data.streams.record_streams import stream_records

    if reading.image_dir is not None or reading.check_images:
        raise ValueError(
            "A stream brings its images and decodes each once: leave out --image-dir and "
            "--check-images."
        )
    return stream_records(data, ignore_fields=reading.ignore_fields)


def read_captioned_images(
    data: str,
    reading: DataConfig,
    *,
    require_images: bool,
    trains_on_images: bool = False,
    modality: Modality | None = None,
    show_progress: bool = True,
) -> RecordTable:
    """Read all records; of one modality alone, if it is named, so that they need not be pairs.

    With `trains_on_images`, those on this machine are decoded first: steps that were taken before a
    broken one is met cannot be continued with other images.
    """
    from ..data.records.record_loading import read_configured_records
    from ..data.remote.shard_urls import has_remote_shards

    check_images = reading.check_images
    if check_images is None and trains_on_images:
        check_images = not has_remote_shards(data)
    return read_configured_records(
        data,
        reading,
        require_images=require_images,
        check_images=check_images,
        modality=modality,
        show_progress=show_progress,
    )


def require_image_folder(image_dir: Path) -> None:
    if not image_dir.is_dir():
        raise ValueError(f"{image_dir}: no such folder. Give one that holds images.")


def report(text: str) -> None:
    """Print to stderr, so that stdout holds nothing but results."""
    print(escape_controls(text), file=sys.stderr, flush=True)


def report_truncated(count: int, total: int, what: str, *, longest: int) -> None:
    if count:
        report(
            f"Truncated {count:,} of {counted(total, what)} to the {longest} tokens that the model "
            "reads."
        )


def use_image_limits(config: ImageLimitsConfig) -> None:
    """Set the limits for this process and for all that it starts."""
    if not (limits := config.list_limits()):
        return
    from ..image_loading_llm2clip import get_image_limits, set_image_limits

    set_image_limits(get_image_limits(**limits))


def refuse_foreign_options(config: EncodingConfig, modality: str) -> None:
    """Raise ValueError for options that a modality has no use for."""
    if foreign := [name for name in config.list_given() if name in _FOREIGN[modality]]:
        other = "text" if modality == "image" else "image"
        raise ValueError(
            f"{', '.join(foreign)}: only for --modality {other}. Leave it out, or choose that."
        )


def suggest_align(model: str, data: str, store: Path, content: str) -> str:
    """Return the command that aligns a model on a new store and on those of other contents."""
    stores = {"caption_embeds": "captions", "vision_embeds": "images"} | {content: str(store)}
    is_teacher = content == "teacher_text_embeds"
    words = ["llm2clip", "align", "MODEL" if is_teacher else model, data, "aligned"]
    words += ["--caption-store", stores["caption_embeds"], "--image-store", stores["vision_embeds"]]
    return shlex.join([*words, *(["--inherit-from", str(store)] if is_teacher else [])])


def hide_library_bars(run: Callable[[], object]) -> None:
    """Hide the bars of transformers, too, where a command is to show none."""
    configs = run.keywords.values() if isinstance(run, partial) else ()
    if any(getattr(config, "show_progress", True) is False for config in configs):
        from transformers.utils import logging

        logging.disable_progress_bar()


def bound_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Keep waiting threads from spinning for long, unless the user chose, or torch is loaded.

    OpenMP reads its settings when torch loads it. Child processes inherit them.
    """
    if "torch" not in sys.modules and not any(name in environment for name in _CHOICES):
        environment["GOMP_SPINCOUNT"] = str(_SPIN_COUNT)
