"""Records OneIG-Bench's scores of images and texts in golden/pair_scores.safetensors.

    python conversion/record_pair_scores.py LLM2CLIP ONEIG

LLM2CLIP is a checkout of microsoft/LLM2CLIP, ONEIG one of OneIG-Bench/OneIG-Benchmark. Their code
runs unchanged on the recorded checkpoint `openai` and its language model, in its own environment
(golden/README.md has the versions). This package is not imported.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).parent / "golden"
NUM_PAIRS = 8
SIDE = 40  # of the checkpoint's images
# Columns and rows of a grid, width and height of a part, number of the black part, caption.
GRIDS = (((2, 2), (40, 40), None, 6), ((3, 1), (40, 40), 1, 9), ((1, 2), (75, 60), None, 18))


def paint(width: int, height: int, *, seed: int) -> np.ndarray:
    """Add up colored waves, which makes an image as smooth as a photograph."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    total = np.zeros((height, width, 3))
    for _ in range(6):
        along, across, phase = random.uniform(-0.5, 0.5, 3)
        wave = np.sin(along * x + across * y + 12 * phase)
        total += wave[..., None] * random.uniform(-1, 1, 3)
    return np.clip(128 + 60 * total, 0, 255).round().astype(np.uint8)


def paint_grid(grid: tuple[int, int], part: tuple[int, int], black: int | None) -> np.ndarray:
    """Join images row by row, one of them black."""
    parts = [paint(*part, seed=100 + number) for number in range(grid[0] * grid[1])]
    if black is not None:
        parts[black] = np.zeros_like(parts[black])
    rows = [parts[row * grid[0] : (row + 1) * grid[0]] for row in range(grid[1])]
    return np.concatenate([np.concatenate(row, axis=1) for row in rows])


class HubModel(torch.nn.Module):
    """The official training code's model with the two methods of the Hub's model."""

    def __init__(self, checkpoint: dict[str, torch.Tensor]) -> None:
        super().__init__()
        from eva_clip.model import CLIPTextCfg, CLIPVisionCfg, CustomCLIP

        vision = CLIPVisionCfg(
            layers=2, width=24, head_width=12, mlp_ratio=3, patch_size=8, image_size=SIDE
        )
        text = CLIPTextCfg(use_embedding=True, llm_embedding_dim=32)
        self.clip = CustomCLIP(20, vision, text, quick_gelu=True)
        self.clip.load_state_dict(checkpoint)

    # CUDA's autocast lets layer norms mix float32 with bfloat16, but the CPU's does not.
    def get_image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.clip.encode_image(pixels.to(self.clip.visual.proj.dtype))

    def get_text_features(self, caption_embeds: torch.Tensor) -> torch.Tensor:
        return self.clip.encode_text(caption_embeds.to(self.clip.visual.proj.dtype))


def load_scorer(dtype: torch.dtype) -> Any:
    """Make OneIG-Bench's `LLM2CLIP` from the small checkpoint instead of the Hub's."""
    from llm2vec.models import LlamaBiModel
    from scripts.utils.inference import LLM2CLIP
    from scripts.utils.llm2clip.llm2vec import LLM2Vec
    from transformers import AutoTokenizer, CLIPImageProcessor

    recorded = load_file(GOLDEN / "openai.safetensors")
    start = "checkpoint."
    checkpoint = {k.removeprefix(start): v for k, v in recorded.items() if k.startswith(start)}
    folder = GOLDEN / "llm2vec" / "llama"
    llm = LlamaBiModel.from_pretrained(folder, attn_implementation="sdpa", torch_dtype=dtype)
    llm.config._name_or_path = "meta-llama/Meta-Llama-3-8B-Instruct"  # as OneIG-Bench sets it
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    scorer = object.__new__(LLM2CLIP)
    scorer.model = HubModel(checkpoint).to(dtype).eval()
    scorer.l2v = LLM2Vec(llm, tokenizer, pooling_mode="mean", max_length=512, doc_max_length=512)
    size = {"shortest_edge": SIDE}
    scorer.processor = CLIPImageProcessor(size=size, crop_size={"height": SIDE, "width": SIDE})
    scorer.device = "cpu"
    return scorer


def record(captions: list[str]) -> dict[str, torch.Tensor]:
    """Score pairs in float32 and in bfloat16, and grids in float32."""
    from scripts.utils.utils import split_mxn_grid

    images = np.stack([paint(SIDE, SIDE, seed=number) for number in range(NUM_PAIRS)])
    recorded = {"images": torch.from_numpy(images)}
    autocast, scorers = torch.amp.autocast, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, dtype in (("scores_bfloat16", torch.bfloat16), ("scores", torch.float32)):
            scorers[name] = load_scorer(dtype)
            if dtype == torch.float32:  # autocast would make it bfloat16
                torch.amp.autocast = lambda _: contextlib.nullcontext()
            scores = []
            for image, caption in zip(images, captions, strict=False):
                path = f"{folder}/image.png"
                Image.fromarray(image).save(path)
                scores += scorers[name].text_img_similarity_score([path], caption)
            recorded[name] = torch.tensor(scores, dtype=torch.float64)
        for number, (grid, part, black, caption) in enumerate(GRIDS):
            pixels = paint_grid(grid, part, black)
            Image.fromarray(pixels).save(f"{folder}/grid.png")
            parts = split_mxn_grid(f"{folder}/grid.png", grid, folder)
            scores = scorers["scores"].text_img_similarity_score(parts, captions[caption])
            recorded[f"grid.{number}.pixels"] = torch.from_numpy(pixels)
            recorded[f"grid.{number}.size"] = torch.tensor(grid)
            recorded[f"grid.{number}.caption"] = torch.tensor(caption)
            recorded[f"grid.{number}.score"] = torch.tensor(sum(scores) / len(scores))
    torch.amp.autocast = autocast
    return recorded


def main() -> None:
    """Run both repositories' code, and save the scores."""
    official, oneig = map(Path, sys.argv[1:])
    sys.path[:0] = [str(official / "llm2clip"), str(oneig)]
    # OneIG-Bench imports these for other scores and for object storage.
    sys.modules["qwen_vl_utils"] = types.SimpleNamespace(process_vision_info=None)
    sys.modules["megfile"] = types.SimpleNamespace(smart_open=open)
    captions = json.loads((GOLDEN / "llm2vec/captions.json").read_text("utf-8"))["captions"]
    with torch.inference_mode():
        save_file(record(captions), GOLDEN / "pair_scores.safetensors")


if __name__ == "__main__":
    main()
