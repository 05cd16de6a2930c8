"""The baseline of the recorded table: trained on stored features, evaluated as any other model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from tiny_encoders import TEXTS, save_tiny_images

from benchmarks.accuracy.ordinary_clip import (
    OrdinaryClipConfig,
    build_ordinary_clip,
    encode_tower,
    save_ordinary_clip,
    train_ordinary_clip,
)
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.evaluation.encoders.auto import load_encoder

# Other sizes of batches, through twenty layers of convolutions in float32.
ROUNDING = 1e-4


@pytest.mark.slow
def test_the_baseline_learns_and_is_evaluated_as_it_was_trained(tmp_path: Path) -> None:
    lines = [
        {"image": path.name, "captions": [text]}
        for path, text in zip(save_tiny_images(tmp_path / "data", 8), TEXTS, strict=True)
    ]
    (tmp_path / "data" / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    records = load_records(tmp_path / "data")
    tower = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    arguments = OrdinaryClipConfig(steps=40, batch_size=8, width=64, layers=2, embed_dim=32)
    model = build_ordinary_clip(tower, arguments)
    features = encode_tower(model, records)
    losses = train_ordinary_clip(model, records, features, arguments)
    assert losses[-1] < math.log(8) / 2  # eight pairs are soon known by heart
    trunk = model.visual.trunk.state_dict()
    assert all(torch.equal(trunk[name], value) for name, value in tower.state_dict().items())
    encoder = load_encoder(save_ordinary_clip(model, tmp_path / "model", arguments))
    found = encoder.encode_images([r.image for r in records], names=[r.name for r in records])
    with torch.no_grad():
        wanted = model.visual.head(features)
    torch.testing.assert_close(
        F.normalize(found, dim=-1), F.normalize(wanted, dim=-1), rtol=0, atol=ROUNDING
    )
