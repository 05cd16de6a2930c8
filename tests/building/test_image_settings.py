"""Another image size at build, in networks whose windows depend on it: loaded equals built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_timm
from transformers import AutoModel

from modeling_llm2clip.building.vision_towers import set_image_size

LARGER = 96
_WINDOWS = {"img_size": 64, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4]}
_TOKENS = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2}
# Architecture, settings. In the first three, attention is within windows.
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "swin": ("swin_tiny_patch4_window7_224", {**_WINDOWS, "window_size": 4}),
    "swinv2": ("swinv2_tiny_window8_256", {**_WINDOWS, "window_size": 4}),
    "swinv2_cr": ("swinv2_cr_tiny_224", {**_WINDOWS, "window_size": 4}),
    "swin, window of the architecture": ("swin_tiny_patch4_window7_224", _WINDOWS),
    "beit": ("beit_base_patch16_224", _TOKENS),
    "relative positions": ("vit_relpos_small_patch16_224", _TOKENS),
    "rotary": ("vit_small_patch16_rope_224", _TOKENS),
}


def make_tower(name: str) -> tuple[Any, Any]:
    pytest.importorskip("timm")
    architecture, settings = NETWORKS[name]
    tower, image_processor = tiny_timm(architecture, settings)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for parameter in tower.parameters():  # tables of positions begin near 0
            parameter += torch.randn_like(parameter) * 0.1
    return tower, image_processor


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_built_for_larger_images_loads_as_the_same_network(
    name: str, tmp_path: Path
) -> None:
    tower, _ = set_image_size(*make_tower(name), LARGER)
    tower.save_pretrained(tmp_path)
    pixels = torch.rand(2, 3, LARGER, LARGER, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = AutoModel.from_pretrained(tmp_path)(pixels).pooler_output
        wanted = tower(pixels).pooler_output
    # Equal weights at other addresses, whose alignment selects other kernels.
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
