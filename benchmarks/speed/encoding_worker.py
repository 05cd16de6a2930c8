"""One encoder in one process: loads, says `ready`, then encodes once for every line it is sent.

Imports nothing of the package unless that encoder is asked for, so that it also runs in an
environment with an older transformers. Started by `encoding_speed.py`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.shared.provenance import read_peak_bytes

_KEPT = ExitStack()  # what holds for the life of this process


def build_ours(llm: str) -> Callable[[list[str]], Any]:
    """Build the package's own path for many captions."""
    from modeling_llm2clip.encoding.encode import encode_texts

    model, processor = build_model(llm)
    return lambda captions: encode_texts(model, processor, captions, project=False).numpy()


def build_ours_compiled(llm: str) -> Callable[[list[str]], Any]:
    """Build the same with the LLM's layers compiled."""
    from benchmarks.speed.compiled_layers import compiled_layers
    from modeling_llm2clip.encoding.encode import encode_texts

    model, processor = build_model(llm)
    _KEPT.enter_context(compiled_layers(model))
    return lambda captions: encode_texts(model, processor, captions, project=False).numpy()


def build_ours_sentence_transformers(llm: str) -> Callable[[list[str]], Any]:
    """Build sentence-transformers on an exported folder of ours; returns projected embeddings."""
    import tempfile

    from sentence_transformers import SentenceTransformer

    from modeling_llm2clip.model_folders.model_writing import save_model

    model, processor = build_model(llm)
    folder = save_model(model, processor, Path(tempfile.mkdtemp()) / "model")
    return SentenceTransformer(str(folder), device="cpu").encode


def build_sentence_transformers(llm: str, **settings: Any) -> Callable[[list[str]], Any]:
    """Build plain sentence-transformers on the bare LLM, made bidirectional, defaults elsewhere.

    Its default wraps a plain string in the tokenizer's chat template, where there is one.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    transformer = Transformer(llm, max_seq_length=512, **settings)
    for module in transformer.modules():
        if hasattr(module, "config") and hasattr(module, "embed_tokens"):
            module.config.is_causal = False
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="mean")
    return SentenceTransformer(modules=[transformer, pooling], device="cpu").encode


def build_sentence_transformers_without_template(llm: str) -> Callable[[list[str]], Any]:
    """Build the same without the chat template, so that its ids are those of the others."""
    text = {"method": "forward", "method_output_name": "last_hidden_state"}
    return build_sentence_transformers(
        llm, modality_config={"text": text}, module_output_name="token_embeddings"
    )


def build_llm2vec(llm: str) -> Callable[[list[str]], Any]:
    """Build the LLM2Vec package with mean pooling and its default batch size."""
    import torch
    from llm2vec import LLM2Vec

    model = LLM2Vec.from_pretrained(
        llm, torch_dtype=torch.float32, pooling_mode="mean", max_length=512, doc_max_length=512
    )
    return lambda captions: model.encode(
        captions, batch_size=32, show_progress_bar=False, convert_to_numpy=True
    )


BUILDERS: dict[str, Callable[[str], Any]] = {
    "ours": build_ours,
    "ours, compiled": build_ours_compiled,
    "ours through sentence-transformers": build_ours_sentence_transformers,
    "sentence-transformers": build_sentence_transformers,
    "sentence-transformers, same ids": build_sentence_transformers_without_template,
    "LLM2Vec": build_llm2vec,
}


COMPILED = ("ours, compiled",)


def build_model(llm: str, *, prompt: str = "none") -> tuple[Any, Any]:
    """Build a model whose vision tower is tiny: only its text side is measured."""
    import torch
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    from modeling_llm2clip.building.build_model import join_towers
    from modeling_llm2clip.configs.build_config import BuildConfig

    # The vision tower takes no part; a tiny one keeps the memory figure the LLM's.
    torch.manual_seed(0)
    vision = CLIPVisionModel(
        CLIPVisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, image_size=32, patch_size=16)
    )  # fmt: skip
    size = {"height": 32, "width": 32}
    return join_towers(
        (vision, CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)),
        llm,
        BuildConfig(prompt=prompt, projection_dim=576),
    )


def main() -> None:
    """Serve: `encoding_worker.py NAME LLM CAPTIONS EMBEDDINGS THREADS`."""
    name, llm, captions_file, embeddings_file, threads = sys.argv[1:6]
    os.environ["HF_HUB_OFFLINE"] = "1"
    import numpy as np
    import torch

    torch.set_num_threads(int(threads))
    captions = json.loads(Path(captions_file).read_text(encoding="utf-8"))
    encode = BUILDERS[name](llm)
    encode(captions[:64])  # warm-up: compiles and autotunes where the encoder does so
    if name in COMPILED:
        from torch._dynamo.utils import counters

        if not counters["stats"]["unique_graphs"]:
            raise SystemExit(f"{name}: nothing was compiled.")
    print("ready", flush=True)
    for _ in sys.stdin:
        used = time.process_time()
        started = time.perf_counter()
        embeddings = encode(captions)
        seconds = time.perf_counter() - started
        np.save(embeddings_file, np.asarray(embeddings))
        peak = read_peak_bytes() / 1e9
        figures: dict[str, Any] = {"seconds": seconds, "cpu_seconds": time.process_time() - used}
        figures |= {"peak_rss_gb": round(peak, 2)}
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
