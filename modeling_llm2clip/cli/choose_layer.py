"""`llm2clip choose-layer`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from ..configs.build_config import DEFAULT_TEXT_LENGTH, ChooseLayerConfig
from ..configs.data_config import DataConfig
from .command import command
from .options import (
    read_captioned_images,
    report,
    report_truncated,
    require_data,
    require_text_tower,
    use_device,
)


@command(
    group="Train",
    examples=(
        "llm2clip choose-layer meta-llama/Llama-3.2-1B-Instruct my-images --prompt llama-3",
        "llm2clip choose-layer llm.gguf my-images --prompt chatml --output layers.json",
    ),
)
def choose_layer(
    text_model: str,
    data: str,
    /,
    *,
    output: Path | None = None,
    reading: DataConfig,
    config: ChooseLayerConfig,
) -> int:
    """Measures which layer of a language model should be the last one of a text tower.

    Two captions of an image, or a caption and its translation, are to find each other (CRA).

    Args:
        text_model: Hub id, folder or .gguf file of a language model.
        data: Captioned images, of which only the captions are read: folder, *.parquet, *.tar, COCO
            *.json, or shards at URLs.
        output: New JSON file for the scores. Default: none.
        reading: How the data are read.
        config: How the model becomes a text tower, and which texts are compared.
    """
    from ..data.atomic_files import atomic_file, require_new_file
    from ..model_folders.model_folder import require_sources

    if output is not None:
        require_new_file(output)
    require_text_tower(text_model)
    config.require_prompt()
    require_sources(text=text_model)
    require_data(data, reading)
    use_device(config.device)
    from ..building.choose_layer import choose_layer as run

    scores = run(text_model, read_captioned_images(data, reading, require_images=False), config)
    longest = config.max_text_length or DEFAULT_TEXT_LENGTH
    report_truncated(scores.num_truncated, scores.num_texts, "text", longest=longest)
    report(f"Images compared, by language: {dict(scores.num_pairs)}.")
    best, alike = scores.best, scores.lowest_alike
    print(scores)
    print(f"The best layer is {best.layer}, of {best.compute:.0%} of the work. The lowest "
          f"that does not differ from it is {alike.layer}, of {alike.compute:.0%}.")  # fmt: skip
    if output is not None:
        content = {"text_model": text_model, **asdict(config), "best": best.layer, **asdict(scores)}
        with atomic_file(output) as file:
            file.write(json.dumps(content, indent=2).encode())
    print(f"Next, with the same options: llm2clip build VISION_MODEL {text_model} OUTPUT "
          f"--text-layers {best.layer}")  # fmt: skip
    return 0
