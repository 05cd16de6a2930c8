"""`llm2clip score`."""

from __future__ import annotations

from pathlib import Path

from .._suggestions import counted
from ..configs.config_fields import ImageLimitsConfig
from ..configs.encoding_config import EncodingConfig
from .command import command
from .options import report, report_truncated, require_model, use_device, use_image_limits


@command(group="Use", examples=("llm2clip score aligned/model pairs.jsonl scores.csv",))
def score(
    model: str, pairs: Path, output: Path, /, *, limits: ImageLimitsConfig, config: EncodingConfig
) -> int:
    """Scores how well each text describes its image, and writes CSV.

    The score is the cosine similarity of image and text.

    Args:
        model: Hub id or folder of an LLM2CLIP model.
        pairs: JSON lines with text and image; image is an absolute path, or a path relative to this
            file's folder.
        output: CSV file to write, which must not exist.
        limits: Limits on the images to decode.
        config: Options for running the model.
    """
    require_model(model)
    from ..data.atomic_files import require_new_file

    require_new_file(output)
    use_image_limits(limits)
    use_device(config.device, config.precision)
    from ..embedding.score_file import score_file

    summary = score_file(model, pairs, output, config)
    report_truncated(
        summary.num_truncated, summary.num_pairs, "text", longest=summary.max_text_length
    )
    report(f"Wrote the scores of {counted(summary.num_pairs, 'pair')} to {output}.")
    print(f"mean {summary.mean:.4f}")
    return 0
