"""Options that several commands share, and what they do; reports to stderr.

The results of `index`, `search` and `tag` go to stdout, everything else to stderr.
"""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..configs.data_config import DataConfig, ImageLimitsConfig, StreamConfig
from ..configs.encoding_config import EncodingConfig

if TYPE_CHECKING:
    import torch

    from ..data.records.record_table import RecordTable
    from ..data.records.records import Modality
    from ..data.streams.record_streams import RecordStream

# Options that a modality has no use for, with their defaults; a command may lack some.
_FOREIGN: dict[str, dict[str, object]] = {
    "text": {"batch_size": None, "num_workers": None, "skip_invalid": False},
    "image": {"token_budget": None},
}


def use_device(name: str) -> torch.device:
    """Find the device, and print it unless there was nothing to choose."""
    import torch

    from ..encoding.devices import describe_device, find_device, list_devices

    device = find_device(name)
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


def is_streamed(data: str, streaming: StreamConfig) -> bool:
    """Tell whether data are streamed: shards elsewhere always, local ones if asked for."""
    from ..data.remote.shard_urls import has_remote_shards

    return streaming.stream or has_remote_shards(data)


def stream_captioned_images(
    data: str, reading: DataConfig, streaming: StreamConfig
) -> RecordStream:
    """Open a stream of shards."""
    from ..data.streams.record_streams import stream_records

    if reading.image_dir is not None or reading.check_images or reading.captions_from is not None:
        raise ValueError(
            "A stream brings its images and captions, and decodes each image once: leave "
            "--image-dir, --check-images and --captions-from out."
        )
    return stream_records(
        data,
        buffer_size=streaming.buffer_size,
        max_lost_share=streaming.max_lost_share,
        ignore_fields=reading.ignore_fields,
    )


def read_captioned_images(
    data: str,
    reading: DataConfig,
    *,
    require_images: bool,
    resume: bool = False,
    modality: Modality | None = None,
    show_progress: bool = True,
) -> RecordTable:
    """Read all records; of one modality alone, if it is named, so that they need not be pairs.

    Images on this machine are checked first where the command decodes them (`require_images`),
    unless the run resumes.
    """
    from ..data.configured_records import read_configured_records
    from ..data.remote.shard_urls import has_remote_shards

    check_images = reading.check_images
    if check_images is None:
        check_images = require_images and not resume and not has_remote_shards(data)
    return read_configured_records(
        data,
        reading,
        require_images=require_images,
        check_images=check_images,
        modality=modality,
        show_progress=show_progress,
    )


def require_image_folder(image_dir: Path) -> None:
    """Raise ValueError where there is no folder of images, before anything is imported."""
    if not image_dir.is_dir():
        raise ValueError(f"{image_dir}: no such folder. Give one that holds images.")


def report(text: str) -> None:
    """Print to stderr, so that stdout holds nothing but results."""
    print(text, file=sys.stderr, flush=True)


def report_truncated(count: int, total: int, what: str, *, longest: int) -> None:
    """Report how many texts are longer than the model reads."""
    if count:
        report(
            f"Truncated {count:,} of {total:,} {what} to the {longest} tokens that the model reads."
        )


def use_image_limits(config: ImageLimitsConfig) -> None:
    """Set the limits for this process and for all that it starts."""
    if not (limits := config.list_limits()):
        return
    from ..image_loading_llm2clip import get_image_limits, set_image_limits

    set_image_limits(replace(get_image_limits(), **limits))  # type: ignore[arg-type]


def refuse_foreign_options(config: EncodingConfig, modality: str) -> None:
    """Raise ValueError for options that a modality has no use for."""
    foreign = _FOREIGN[modality]
    given = [name for name, default in foreign.items() if getattr(config, name, default) != default]
    if given:
        other = "text" if modality == "image" else "image"
        raise ValueError(
            f"{', '.join(given)}: only for --modality {other}. Leave it out, or choose that."
        )


def suggest_align(model: str, data: str, store: Path, *, modality: str) -> str:
    """Return the command that aligns a model on a new store and on that of the other modality."""
    stores = {"text": "captions", "image": "images"} | {modality: str(store)}
    words = ["llm2clip", "align", model, data, "aligned"]
    words += ["--caption-store", stores["text"], "--image-store", stores["image"]]
    return shlex.join(words)
