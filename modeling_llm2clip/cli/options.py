"""Steps that commands share: requirements, checks, reports and library settings.

Optional packages implied by the command line are checked first, before torch or transformers is
imported. Packages that a model's files need are checked when the model is loaded.

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
from ..configs.config_fields import DataConfig, ImageLimitsConfig
from ..configs.encoding_config import EncodingConfig

if TYPE_CHECKING:
    import torch

    from ..data.records.record_table import RecordTable
    from ..data.records.records import Modality
    from ..data.streams.record_streams import RecordStream

# Options that do not apply to a modality.
_INAPPLICABLE = {
    "text": ("skip_invalid", "jpeg_decoding"),
    "image": ("sentence_views",),
}
# If the user set one of these, it is respected. GNU OpenMP ignores the variables of other runtimes
# (KMP_…), and `accelerate launch --cpu` sets them for every process.
_CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
# Spin iterations of GNU OpenMP, which PyTorch's Linux wheels use: a few microseconds. By default, a
# waiting thread spins for milliseconds and takes a core from a computing one if there are fewer
# free cores than threads. On an idle machine, the default, this count and no spinning at all
# (OMP_WAIT_POLICY=PASSIVE) differ by no more than repeated runs do; see
# benchmarks/speed/busy_machine.py.
_SPIN_COUNT = 10_000


def require_model(
    source: str | Path, *needs: Need, revision: str | None = None, or_teacher: bool = False
) -> None:
    """Raise an error if packages are missing or the source is not an LLM2CLIP model."""
    require(*needs)
    from ..model_folders.model_folder import require_own_model  # imports huggingface_hub

    require_own_model(source, revision=revision, or_teacher=or_teacher)


def require_text_tower(text: str | None, lora: object = None) -> None:
    is_gguf = text is not None and Path(text).suffix == ".gguf"
    require(*([GGUF] if is_gguf else []), *([LORA] if lora else []))


def use_device(name: str, precision: str = "auto") -> torch.device:
    """Select a device that supports the precision, and print it unless there was no choice."""
    import torch

    from ..encoding.devices import describe_device, find_device, list_devices

    device = find_device(name, precision=precision)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # otherwise, libraries launch kernels on the first GPU
    if device.type != "cpu" or (name == "auto" and len(list_devices()) > 1):
        print(f"Device: {describe_device(device)} (--device {name}).", file=sys.stderr)
    return device


def require_data(data: str, reading: DataConfig) -> None:
    from ..data.remote.remote_files import is_remote

    if not is_remote(data) and not Path(data).exists() and not re.search(r"[*?[{]", data):
        raise ValueError(
            f"{data}: no such data. Pass a folder, *.parquet, *.tar, a COCO *.json file, a URL, or "
            "a .txt file that lists shards."
        )
    if reading.image_dir is not None and not reading.image_dir.is_dir():
        raise ValueError(f"image_dir={reading.image_dir}: no such folder.")


def name_data(data: str, *, is_elsewhere: bool) -> str:
    """Return the data's name for the card: the folder's name, or shard URLs without signatures."""
    from ..data.remote.shard_urls import drop_signature

    return drop_signature(data) if is_elsewhere else Path(data).resolve().name


def stream_captioned_images(data: str, reading: DataConfig) -> RecordStream:
    from ..data.streams.record_streams import stream_records

    if reading.image_dir is not None or reading.check_images:
        raise ValueError(
            "--image-dir and --check-images cannot be used with a stream: its shards contain the "
            "images, and each is decoded once. Remove them."
        )
    return stream_records(
        data, ignore_fields=reading.ignore_fields, caption_fields=reading.caption_fields
    )


def read_captioned_images(
    data: str,
    reading: DataConfig,
    *,
    require_images: bool,
    trains_on_images: bool = False,
    modality: Modality | None = None,
    show_progress: bool = True,
) -> RecordTable:
    """Read all records. With a `modality`, only texts or images are read, which need not be pairs.

    With `trains_on_images`, local images are decoded first: if training failed at a broken image,
    the run could not be resumed with other images.
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
        raise ValueError(f"{image_dir}: no such folder. Pass a folder of images.")


def report(text: str) -> None:
    """Print to stderr, because stdout is for results."""
    print(escape_controls(text), file=sys.stderr, flush=True)


def report_truncated(count: int, total: int, what: str, *, longest: int) -> None:
    if count:
        report(
            f"Truncated {count:,} of {counted(total, what)} to the model's limit of {longest} "
            "tokens."
        )


def use_image_limits(config: ImageLimitsConfig) -> None:
    if not (limits := config.list_limits()):
        return
    from ..image_loading_llm2clip import get_image_limits, set_image_limits

    set_image_limits(get_image_limits(**limits))


def require_applicable_options(config: EncodingConfig, modality: str) -> None:
    if names := [name for name in config.list_given() if name in _INAPPLICABLE[modality]]:
        other = "text" if modality == "image" else "image"
        raise ValueError(
            f"{', '.join(names)}: only for --modality {other}. Remove it, or use that modality."
        )


def suggest_align(model: str, data: str, store: Path, content: str) -> str:
    """Return an align command that uses a new store and the other stores it needs."""
    stores = {"caption_embeds": "captions", "vision_embeds": "images"} | {content: str(store)}
    is_teacher = content == "teacher_text_embeds"
    words = ["llm2clip", "align", "MODEL" if is_teacher else model, data, "aligned"]
    words += ["--caption-store", stores["caption_embeds"], "--image-store", stores["vision_embeds"]]
    return shlex.join([*words, *(["--inherit-from", str(store)] if is_teacher else [])])


def hide_library_bars(run: Callable[[], object]) -> None:
    """Hide transformers' progress bars if the command is to show none."""
    configs = run.keywords.values() if isinstance(run, partial) else ()
    if any(getattr(config, "show_progress", True) is False for config in configs):
        from transformers.utils import logging

        logging.disable_progress_bar()


def bound_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Limit how long waiting threads spin, unless the user did or torch is already loaded.

    OpenMP reads the limit when torch loads it. Child processes inherit the limit.
    """
    if "torch" not in sys.modules and not any(name in environment for name in _CHOICES):
        environment["GOMP_SPINCOUNT"] = str(_SPIN_COUNT)
