"""Interpolates two models, which often keeps most of both (arXiv:2109.01903, WiSE-FT).

    python examples/scripts/mix_models.py aligned/model tuned/model mixed --share 0.5
    llm2clip evaluate mixed --datasets my-images

Try a few shares, evaluate each, and keep the best one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from modeling_llm2clip.model_folders.model_writing import save_trained_model
from modeling_llm2clip.model_folders.weights import open_model_weights


def main() -> None:
    """Interpolate the weights that differ, and write the second model with them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("before", type=Path, help="model folder before training")
    parser.add_argument("after", type=Path, help="folder of the same model after training")
    parser.add_argument("output", type=Path, help="new folder")
    parser.add_argument("--share", type=float, default=0.5, help="0 is before, 1 is after")
    arguments = parser.parse_args()
    before, after = (open_model_weights(f) for f in (arguments.before, arguments.after))
    if {n: w.shape for n, w in before.items()} != {n: w.shape for n, w in after.items()}:
        raise SystemExit("The models have different weight names or shapes: they cannot be mixed.")
    mixed = {}
    for name, weight in after.items():
        first, last = before[name].read(), weight.read()
        if not torch.equal(first, last):
            mixed[name] = torch.lerp(first.float(), last.float(), arguments.share)
    save_trained_model(arguments.after, mixed, arguments.output)
    # It summarizes the training images with the vision tower that is replaced here.
    (arguments.output / "training_images.safetensors").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
