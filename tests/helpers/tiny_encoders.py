"""Tiny random models of every type that is evaluated, as folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tiny import IMAGE_SIZE, tiny_dual_encoder, tiny_tokenizer, tiny_vision
from tiny_folders import export_tiny_model
from tokenizers import processors
from torch import Tensor
from transformers import (
    AltCLIPProcessor,
    BertConfig,
    BertModel,
    ChineseCLIPProcessor,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    Siglip2Processor,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipProcessor,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
)

from modeling_llm2clip.data.named_embeddings import side_file
from modeling_llm2clip.evaluation.encoders.encoder import EvaluationEncoder

MODEL_TYPES = ("llm2clip", "clip", "siglip", "siglip2", "open_clip", "sentence-transformers")
TEXTS = (
    "a dog",
    "two red apples on a wooden table by the window",
    "A Cat sleeps",
    "the sky over the sea at night, with a photo of a red car",
    "x",
    "a photo of a mat and a dog that sits on it by the window",
    "a wooden table",
    "night",
)
LONG_TEXT = "a dog and a cat " * 60  # longer than any of the models reads
_SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
# Wider than usual, so that unlike inputs give visibly unlike embeddings.
_WIDE = {"initializer_range": 0.2, "initializer_factor": 10.0}


def save_tiny_encoder(model_type: str, folder: Path) -> Path:
    """Save a model of a type, as its publishers do."""
    if model_type == "llm2clip":
        return export_tiny_model(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _SAVERS[model_type](folder)
    return folder


def save_tiny_images(folder: Path, count: int) -> list[Path]:
    """Images of random blocks, all different and of two sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    paths = []
    for number in range(count):
        blocks = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8)
        size = (48, 48) if number % 2 else (40, 56)
        path = folder / f"{number}.png"
        Image.fromarray(blocks.numpy()).resize(size, Image.Resampling.NEAREST).save(path)
        paths.append(path)
    return paths


def _tokenizer(template: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer(begins=False)
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|begin|>", "<|end|>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[pair for pair in ids if pair[0] in template]
    )
    return tokenizer


def _save_clip(folder: Path) -> None:
    tokenizer = _tokenizer("<|begin|> $A <|end|>")
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = CLIPConfig(
        text_config={**_SIZE, **_WIDE, **special, "vocab_size": len(tokenizer)},
        vision_config={**_SIZE, **_WIDE, "image_size": IMAGE_SIZE, "patch_size": 8},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    )
    CLIPProcessor(image_processor, tokenizer).save_pretrained(folder)


def _save_siglip(folder: Path) -> None:
    tokenizer = _tokenizer("$A <|end|>")
    config = SiglipConfig(
        text_config={**_SIZE, "vocab_size": len(tokenizer), "max_position_embeddings": 64},
        vision_config={**_SIZE, "image_size": IMAGE_SIZE, "patch_size": 8},
    )
    _widen(SiglipModel(config)).save_pretrained(folder)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    SiglipProcessor(SiglipImageProcessorPil(size=size), tokenizer).save_pretrained(folder)


def _save_siglip2(folder: Path) -> None:
    pieces = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{b:02X}>" for b in range(256)))
    letters = ("▁", *(chr(code) for code in range(ord("a"), ord("z") + 1)))
    tokenizer = Siglip2Tokenizer(
        vocab={token: number for number, token in enumerate((*pieces, *letters))},
        padding_side="right",
    )
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    config = Siglip2Config(
        text_config={**_SIZE, "vocab_size": len(tokenizer), "max_position_embeddings": 64},
        vision_config={**_SIZE, "patch_size": 8, "num_patches": 16},
    )
    _widen(Siglip2Model(config)).save_pretrained(folder)
    image_processor = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)
    Siglip2Processor(image_processor, tokenizer).save_pretrained(folder)


def _save_open_clip(folder: Path) -> None:
    from open_clip.model import CustomTextCLIP

    # The shape of EVA02-CLIP: a timm tower, an own text transformer, CLIP's vocabulary.
    config: dict[str, Any] = {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 160,
            "timm_model_name": "test_vit",
            "timm_model_pretrained": False,
            "timm_pool": "token",
            "timm_proj": "linear",
        },
        "text_cfg": {
            "context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2,
        },
    }  # fmt: skip
    model = _widen(CustomTextCLIP(**config))
    folder.mkdir(parents=True)
    written = {
        "model_cfg": {**config, "custom_text": True},
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(written), encoding="utf-8")
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")


def _save_sentence_transformers(folder: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from tiny_folders import save_tiny_llm

    llm = save_tiny_llm(folder.with_name(f"{folder.name}-llm"))
    transformer = Transformer(str(llm), max_seq_length=24)
    pooling = Pooling(32, pooling_mode="mean")
    SentenceTransformer(modules=[transformer, pooling], device="cpu").save(str(folder))


def write_named_embeddings(
    file: Path, names: Sequence[str], embeddings: torch.Tensor, **notes: str
) -> None:
    """Write embeddings and their names as others do, valid or not."""
    metadata = {**notes, "names": json.dumps(list(names))}
    file.parent.mkdir(exist_ok=True)
    save_file({"embeddings": embeddings.contiguous()}, file, metadata=metadata)


def save_named_embeddings(folder: Path, texts: dict[str, Any], images: dict[str, Any]) -> Path:
    """Save embeddings of texts and images by name."""
    for side, embeddings in (("texts", texts), ("images", images)):
        if embeddings:
            stacked = torch.stack([torch.as_tensor(v).float() for v in embeddings.values()])
            write_named_embeddings(side_file(folder, side), list(embeddings), stacked)
    return folder


def _widen(model: torch.nn.Module) -> Any:
    """Random weights in which unlike inputs give visibly unlike embeddings."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def _save_dual_encoder(family: str, processor_class: type, folder: Path) -> None:
    tokenizer = _tokenizer("<|begin|> $A <|end|>")
    model, image_processor = tiny_dual_encoder(
        family, vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, pad_token_id=0,
        max_position_embeddings=64,
    )  # fmt: skip
    _widen(model).save_pretrained(folder)
    processor_class(image_processor, tokenizer).save_pretrained(folder)


def _save_tipsv2(folder: Path) -> None:
    model, _ = tiny_dual_encoder("tipsv2", vocab_size=512, pad_token_id=0)
    from transformers import Tipsv2ImageProcessor, Tipsv2Processor, Tipsv2Tokenizer

    pieces = ("<pad>", "<unk>", *(f"<0x{b:02X}>" for b in range(256)))
    letters = ("▁", *(chr(code) for code in range(ord("a"), ord("z") + 1)))
    tokenizer = Tipsv2Tokenizer(vocab={t: number for number, t in enumerate((*pieces, *letters))})
    image_processor = Tipsv2ImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    _widen(model).save_pretrained(folder)
    Tipsv2Processor(image_processor, tokenizer).save_pretrained(folder)


def _save_joined(folder: Path) -> None:
    tokenizer, (tower, image_processor) = _tokenizer("<|begin|> $A <|end|>"), tiny_vision("vit")
    text = BertConfig(**_SIZE, vocab_size=len(tokenizer), max_position_embeddings=64)
    model = VisionTextDualEncoderModel(vision_model=tower, text_model=BertModel(text))
    _widen(model).save_pretrained(folder)
    VisionTextDualEncoderProcessor(image_processor, tokenizer).save_pretrained(folder)


_SAVERS: dict[str, Callable[[Path], None]] = {
    "metaclip_2": partial(_save_dual_encoder, "metaclip_2", CLIPProcessor),
    "aimv2": partial(_save_dual_encoder, "aimv2", CLIPProcessor),
    "chinese_clip": partial(_save_dual_encoder, "chinese_clip", ChineseCLIPProcessor),
    "altclip": partial(_save_dual_encoder, "altclip", AltCLIPProcessor),
    "vision-text-dual-encoder": _save_joined,
    "tipsv2": _save_tipsv2,
    "clip": _save_clip,
    "siglip": _save_siglip,
    "siglip2": _save_siglip2,
    "open_clip": _save_open_clip,
    "sentence-transformers": _save_sentence_transformers,
}


def encode(encoder: EvaluationEncoder, images: Sequence[Path]) -> tuple[Tensor, Tensor]:
    """Embeddings of the texts and of as many images."""
    names = [image.name for image in images]
    return encoder.encode_texts(TEXTS).embeds, encoder.encode_images(images, names=names)


def unit(embeddings: Any) -> Tensor:
    return F.normalize(torch.as_tensor(embeddings).float(), dim=-1)
