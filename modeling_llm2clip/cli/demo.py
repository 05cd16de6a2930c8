"""`llm2clip demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from annotated_types import Interval

from .._extras import DEMO, require
from .._suggestions import counted
from ..configs.config_fields import DeviceConfig, Seed
from ..data.atomic_files import require_new_folder
from .command import command
from .options import use_device

_AFTER_DEMO = """
Use it in Python:

    from sentence_transformers import SentenceTransformer
    import modeling_llm2clip  # registers the model with AutoModel and sentence-transformers

    model = SentenceTransformer("{folder}")
    texts, images = model.encode(["a red apple"]), model.encode(["{image}"])
    print(model.similarity(texts, images))
"""


@command(group="Other", examples=("llm2clip demo --output llm2clip-demo",))
def demo(
    *,
    output: Path = Path("llm2clip-demo"),
    max_steps: Annotated[int, Interval(ge=1)] | None = None,
    seed: Seed = 0,
    config: DeviceConfig,
) -> int:
    """Runs the whole method on small towers and included images in a few minutes.

    Args:
        output: Output folder.
        max_steps: Number of alignment steps. Default: 10 passes over the data, but at least 300
            steps.
        seed: Seed for the data split and for all stages.
        config: Device to run on.
    """
    require(*DEMO)
    if (output / "model").is_dir():
        raise FileExistsError(
            f"{output} has the model of an earlier demo, {output / 'model'}. Use that model, or "
            "run the demo again with --output NEW_FOLDER."
        )
    require_new_folder(output, is_renamed=False)
    device = str(use_device(config.device))

    from ..demo.run_demo import make_demo_config, run_demo

    report = run_demo(make_demo_config(output, max_steps=max_steps, seed=seed, device=device))
    output = output.resolve()
    for name in ("search.png", "search.html", "report.json"):
        print(f"{name:<12} {output / name}")
    print(_AFTER_DEMO.format(folder=output / "model", image=output / "search.png"))
    print(_describe(report))
    return 0


def _describe(report: dict[str, Any]) -> str:
    t2i, i2t, chance = (
        f"{report[name]:.1%}" for name in ("unseen_t2i_r1", "unseen_i2t_r1", "chance_r1")
    )
    return (
        f"Trained on {counted(report['num_images'], 'emoji image')}. R@1 on "
        f"{report['num_held_out']} held-out images: text to image {t2i}, image to text {i2t}, "
        f"chance {chance}.\n"
        f"{report['seconds_after_download']:.0f} s after the download, peak memory "
        f"{report['peak_rss_gb']} GB."
    )
