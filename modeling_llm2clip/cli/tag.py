"""`llm2clip tag`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from annotated_types import Interval

from .._extras import list_needs_of_index, require
from .._suggestions import counted
from ..configs.config_fields import ImageLimitsConfig
from ..configs.encoding_config import TagConfig
from ..data.atomic_files import atomic_file, require_new_file
from .command import command
from .options import (
    report,
    require_image_folder,
    require_model,
    use_device,
    use_image_limits,
)

if TYPE_CHECKING:
    from ..search.tag_images import TaggedImage

_SUFFIXES = (".csv", ".jsonl")


@command(
    group="Use",
    examples=(
        'llm2clip tag aligned/model my-images --labels labels.txt --template "a photo of a {}" '
        "--output tags.csv",
    ),
)
def tag(
    model: str,
    image_dir: Path,
    /,
    *,
    labels: Path,
    template: tuple[str, ...] = ("{}",),
    top_k: Annotated[int, Interval(ge=1)] = 3,
    threshold: Annotated[float, Interval(ge=-1, le=1)] | None = None,
    output: Path | None = None,
    limits: ImageLimitsConfig,
    config: TagConfig,
) -> int:
    """Labels the images in a folder and writes CSV or JSON lines.

    Args:
        model: Hub id or folder of an LLM2CLIP model.
        image_dir: Folder of images; subfolders are included.
        labels: Text file with one label per line; *.csv with the column label and optionally
            prompt; *.json with a list of labels or an object that maps labels to prompts. Required.
        template: Prompt templates for labels without prompts of their own, with {} for the label.
            The embeddings of several templates are averaged.
        top_k: Number of labels per image.
        threshold: Minimum cosine similarity between an image and a label; labels below it are left
            out. Default: none.
        output: File to write, *.csv or *.jsonl, which must not exist. Default: CSV on stdout.
        limits: Limits on the images to decode.
        config: Options for encoding the images and storing their embeddings.
    """
    require(*list_needs_of_index(config.index))
    from ..data.labels import read_labels

    _check_output(output)  # before the slow steps
    label_list = read_labels(labels, templates=list(template))
    require_image_folder(image_dir)
    require_model(model)
    use_image_limits(limits)
    use_device(config.device, config.precision)
    from ..search.tag_images import tag_folder

    tagged = tag_folder(
        model, image_dir, label_list, top_k=top_k, threshold=threshold, config=config, report=report
    )
    _write(tagged, output, threshold=threshold)
    return 0


def _check_output(output: Path | None) -> None:
    if output is None:
        return
    if output.suffix not in _SUFFIXES:
        raise ValueError(f"--output {output} must end in {' or '.join(_SUFFIXES)}.")
    require_new_file(output)


def _write(tagged: Iterable[TaggedImage], output: Path | None, *, threshold: float | None) -> None:
    from ..search.tag_images import write_tags

    if output is None:
        num_images, num_untagged = write_tags(tagged, sys.stdout, ".csv")
    else:
        with atomic_file(output) as file:
            text = TextIOWrapper(file, encoding="utf-8", newline="")
            num_images, num_untagged = write_tags(tagged, text, output.suffix)
            text.detach()
        report(f"Wrote the labels of {counted(num_images, 'image')} to {output}.")
    if num_untagged:
        report(
            f"No label reached the threshold {threshold} for {num_untagged:,} of "
            f"{counted(num_images, 'image')}."
        )
