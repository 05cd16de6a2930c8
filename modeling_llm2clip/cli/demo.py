"""`llm2clip demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from .._extras import DEMO, require
from ..configs.config_fields import DeviceConfig, Range
from .chosen_device import choose_device
from .command import command

_AFTER_DEMO = """
Use it in Python:

    from sentence_transformers import SentenceTransformer
    import modeling_llm2clip  # lets AutoModel and sentence-transformers know the model

    model = SentenceTransformer("{folder}")
    texts, images = model.encode(["a red apple"]), model.encode(["{image}"])
    print(model.similarity(texts, images))
"""


@command(group="Other", examples=("llm2clip demo --output llm2clip-demo",))
def demo(
    *,
    output: Path = Path("llm2clip-demo"),
    max_steps: Annotated[int, Range(min=1)] = 100,
    seed: int = 0,
    config: DeviceConfig,
) -> int:
    """Runs the whole method on embedded towers and images, in minutes.

    Args:
        output: Folder to write.
        max_steps: Steps of the alignment.
        seed: Seed of the split and of the alignment.
        config: Where the model runs.
    """
    require(*DEMO)
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty. Remove it, or name another --output.")
    device = str(choose_device(config.device))

    from ..demo.run_demo import DemoArguments, run_demo

    report = run_demo(DemoArguments(output=output, steps=max_steps, seed=seed, device=device))
    output = output.resolve()
    print(_describe(report))
    for name in ("model", "search.png", "search.html", "report.json"):
        print(f"{name:12} {output / name}")
    print(_AFTER_DEMO.format(folder=output / "model", image=output / "search.png"))
    return 0


def _describe(report: dict[str, Any]) -> str:
    """The scores in a few lines; `report.json` has every number."""
    largest = max(report["largest_difference_after_loading"].values())
    return (
        f"{report['num_held_out']} things of {report['num_images']:,} images were held out of "
        "the alignment:\n"
        f"  text to image  R@1 {report['unseen_t2i_r1']:.1%}, "
        f"R@10 {report['unseen_t2i_r10']:.1%}\n"
        f"  image to text  R@1 {report['unseen_i2t_r1']:.1%}\n"
        f"  chance         R@1 {report['chance_r1']:.1%}\n"
        f"Loaded again in a clean process: embeddings differ by at most {largest:.1e}.\n"
        f"{report['seconds_after_download']:.0f} s after the download, peak memory "
        f"{report['peak_rss_gb']} GB, last loss {report['final_loss']}."
    )
