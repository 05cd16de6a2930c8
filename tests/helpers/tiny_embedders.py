"""Tiny random text embedders, saved as sentence-transformers models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import tiny_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModel, PreTrainedModel, PreTrainedTokenizerFast

# Family → model type, fields of its configuration, pooling, ids around a text, and Dense modules.
_SIZE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 1000, "initializer_range": 0.2,
}  # fmt: skip
_GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
_GEMMA = {"sliding_window": 16, "query_pre_attn_scalar": 8, **_GROUPED}
EMBEDDERS: dict[str, tuple[str, dict[str, Any], str, str, tuple[int, ...]]] = {
    "MiniLM": ("bert", {}, "mean", "<|begin|> $A <|end|>", ()),
    "gte-ModernBERT": ("modernbert", {"local_attention": 16}, "cls", "<|begin|> $A <|end|>", ()),
    "Qwen3-Embedding": ("qwen3", _GROUPED, "lasttoken", "$A <|end|>", ()),
    "EmbeddingGemma": (
        "gemma3_text", {**_GEMMA, "use_bidirectional_attention": True}, "mean",
        "<|begin|> $A <|end|>", (48, 24),
    ),
    "EmbeddingGemma 2": (
        "embedding_gemma2_text",
        {"head_dim": 8, "global_head_dim": 16, "hidden_size_per_layer_input": 16,
         "embedding_dim": 48, "num_key_value_heads": 2},
        "mean", "<|begin|> $A <|end|>", (),
    ),
    "RoBERTa": ("roberta", {}, "mean", "<|begin|> $A <|end|>", (24,)),
    "SGPT": ("llama", {"num_key_value_heads": 2}, "weightedmean", "<|begin|> $A <|end|>", ()),
}  # fmt: skip


def tiny_embedder(
    folder: Path, family: str = "MiniLM", *, last: list[Any] | None = None,
    pooling: Any = None, include_prompt: bool = True, **settings: Any,
) -> Path:  # fmt: skip
    """Write an embedder of a shape in `EMBEDDERS`.

    Args:
        last: modules in place of Normalize.
        pooling: another than the family's.
        settings: of `SentenceTransformer`.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    model_type, extras, own_pooling, template, widths = EMBEDDERS[family]
    pooling = pooling or own_pooling
    tokenizer = make_word_pieces() if family == "MiniLM" else tiny_tokenizer()
    begin, end = ("[CLS]", "[SEP]") if family == "MiniLM" else ("<|begin|>", "<|end|>")
    template = template.replace("<|begin|>", begin).replace("<|end|>", end)
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(t, backend.token_to_id(t)) for t in (begin, end)]
    )
    tokenizer.padding_side = "left" if family == "Qwen3-Embedding" else "right"
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": backend.token_to_id(begin),
        "eos_token_id": backend.token_to_id(end),
        "cls_token_id": None,
        "sep_token_id": None,
    }
    config = AutoConfig.for_model(
        model_type, vocab_size=len(tokenizer), **{**_SIZE, **extras}, **ids
    )
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder / "network")
    tokenizer.save_pretrained(folder / "network")
    parts: list[Any] = [modules.Transformer(str(folder / "network"), max_seq_length=24)]
    width = extras.get("embedding_dim", 32)
    parts.append(modules.Pooling(width, pooling_mode=pooling, include_prompt=include_prompt))
    for narrow, wide in zip((width, *widths), widths, strict=False):
        parts.append(
            modules.Dense(narrow, wide, bias=family == "RoBERTa", activation_function=None)
        )
    parts += [modules.Normalize()] if last is None else last
    SentenceTransformer(modules=parts, device="cpu", **settings).save(str(folder / "embedder"))
    return folder / "embedder"


def tiny_network(family: str) -> PreTrainedModel:
    """Build the network of an embedder of a shape in `EMBEDDERS`, without its tokenizer."""
    model_type, extras, *_ = EMBEDDERS[family]
    ids = dict(zip(("pad", "bos", "eos", "cls", "sep"), (0, 1, 2, None, None), strict=True))
    ids = {f"{name}_token_id": number for name, number in ids.items()}
    config = AutoConfig.for_model(model_type, vocab_size=100, **{**_SIZE, **extras}, **ids)
    torch.manual_seed(0)
    return AutoModel.from_config(config).eval()


def make_word_pieces() -> PreTrainedTokenizerFast:
    """Train BERT's kind of tokenizer: lowercase pieces of words."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    texts = ("a dog sits on a mat", "two red apples on a wooden table", "query: find the image")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(
        texts,
        trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip
