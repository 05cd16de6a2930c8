"""SigLIP2 NaFlex keeps the shape of an image, and so does whatever encodes images with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from shared_models import ROUNDING, encode
from tiny import draw_noise, tiny_dual_encoder
from tiny_folders import save_tiny_llm
from transformers import AutoModel, AutoProcessor

import modeling_llm2clip as llm2clip
from modeling_llm2clip.configs.encoding_config import IndexConfig
from modeling_llm2clip.data.store.embedding_store import EmbeddingStore
from modeling_llm2clip.encoding.encode import encode_images
from modeling_llm2clip.search.image_index import ImageIndex

# Height, width, and the patches of each: 16 at most.
SHAPES = {"wide": ((24, 96), (2, 8)), "tall": ((96, 24), (8, 2))}


@pytest.mark.slow
def test_a_wide_and_a_tall_image_have_one_embedding_everywhere(tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    whole, image_processor = tiny_dual_encoder("siglip2")
    whole.save_pretrained(tmp_path / "siglip2")
    image_processor.save_pretrained(tmp_path / "siglip2")
    llm, folder = save_tiny_llm(tmp_path / "llm"), tmp_path / "model"
    config = llm2clip.BuildConfig(prompt="llama-3", max_text_length=32, projection_dim=32)
    llm2clip.build_model(tmp_path / "siglip2", llm, folder, config)
    data = tmp_path / "images"
    data.mkdir()
    images = {name: draw_noise(*shape) for name, (shape, _) in SHAPES.items()}
    for name, image in images.items():
        image.save(data / f"{name}.png")
    lines = [json.dumps({"image": f"{name}.png", "captions": ["a dog"]}) for name in images]
    (data / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")

    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    batch = processor(images=list(images.values()))
    assert batch["spatial_shapes"].tolist() == [list(grid) for _, grid in SHAPES.values()]
    wanted = torch.nn.functional.normalize(encode(model, batch), dim=-1)
    # Squares of both would be nearly alike: the first law would show nothing.
    assert (wanted[0] - wanted[1]).abs().max() > 1e-2

    found = {"encode_images": encode_images(model, processor, list(images.values()))}
    encoder = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    found["sentence-transformers"] = encoder.encode(
        list(images.values()), convert_to_tensor=True, normalize_embeddings=True
    )
    records = llm2clip.load_records(data)
    store = EmbeddingStore.open(
        llm2clip.extract(folder, records, tmp_path / "store", modality="image")
    )
    rows = [[record.image.stem for record in records].index(name) for name in images]
    found["extract"] = model.to_image_embeds(store.read(rows)).detach()
    model.config.random_heads = []
    model.save_pretrained(tmp_path / "trained")
    processor.save_pretrained(tmp_path / "trained")
    index = ImageIndex.build(
        tmp_path / "trained", data, tmp_path / "index", IndexConfig(show_progress=False)
    )
    [(paths, embeds)] = index.iterate_embeddings()
    rows = [[path.stem for path in paths].index(name) for name in images]
    found["index"] = torch.from_numpy(embeds[rows])
    for name, embeds in found.items():
        # Sums in another order; the store has half precision.
        tolerance = 1e-3 if name == "extract" else ROUNDING
        assert torch.allclose(embeds, wanted, rtol=ROUNDING, atol=tolerance), name
    assert llm2clip.check_model(folder).failed == []
