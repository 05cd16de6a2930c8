"""Text Embeddings Inference 1.9 on a CPU: which files it reads, and how it calls their graph.

Written after its `router/src/lib.rs` and `backends/ort/src/lib.rs`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime import InferenceSession
from tokenizers import Tokenizer


class TextEmbeddingsInference:
    """Starts like the server, which refuses a folder without one of the fields read here."""

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        assert isinstance(config["model_type"], str)
        assert not any(name.endswith("Classification") for name in config["architectures"])
        assert all(isinstance(config[name], int) for name in ("hidden_size", "num_hidden_layers"))
        for name in ("pad_token_id", "eos_token_id"):
            assert isinstance(config.get(name, 0), int)
        self.pad_token_id = config.get("pad_token_id", config.get("eos_token_id", 0))
        pooling = json.loads((folder / "1_Pooling" / "config.json").read_text("utf-8"))
        assert pooling["pooling_mode_cls_token"] or pooling["pooling_mode_mean_tokens"]
        if (about := folder / "sentence_bert_config.json").is_file():
            self.max_input_length = json.loads(about.read_text("utf-8"))["max_seq_length"]
        else:
            self.max_input_length = config["max_position_embeddings"]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        self.padding_side = settings.get("padding_side", "right")
        file = folder / "model.onnx"
        self.session = InferenceSession(str(file if file.is_file() else folder / "onnx/model.onnx"))
        wanted = {value.name for value in self.session.get_inputs()}
        assert wanted <= {"input_ids", "attention_mask", "token_type_ids", "position_ids"}
        self.run([[0]])  # its check of the backend, then its warm-up
        self.run([[0] * self.max_input_length])

    def tokenize(self, text: str) -> list[int]:
        self.tokenizer.enable_truncation(self.max_input_length)
        return self.tokenizer.encode(text).ids

    def embed(self, texts: list[str]) -> Any:
        return self.run([self.tokenize(text) for text in texts])

    def run(self, rows: list[list[int]]) -> Any:
        longest = max(map(len, rows))
        inputs = np.full((2, len(rows), longest), 0, np.int64)
        inputs[0] = self.pad_token_id
        for number, ids in enumerate(rows):
            start = longest - len(ids) if self.padding_side == "left" else 0
            inputs[:, number, start : start + len(ids)] = [ids, [1] * len(ids)]
        given = dict(zip(("input_ids", "attention_mask"), inputs, strict=True))
        names = [value.name for value in self.session.get_outputs()]
        outputs = dict(zip(names, self.session.run(None, given), strict=True))
        embeds = outputs["sentence_embedding"]
        assert embeds.dtype == np.float32
        return embeds
