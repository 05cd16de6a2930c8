"""An ordinary CLIP to compare with: a small text transformer, trained from scratch.

Its vision tower is given and frozen, its tokenizer is CLIP's, its text tower a CLIP
text transformer of a few layers. Text tower, projections and temperature are trained together on
stored features of the tower, with the package's loss and schedule. The result is a folder of
open_clip's layout.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.heads_llm2clip import LogitRule
from modeling_llm2clip.image_loading_llm2clip import load_images
from modeling_llm2clip.training.alignment.alignment_trainer import warm_up_then_cosine
from modeling_llm2clip.training.losses.loss import LossInputs
from modeling_llm2clip.training.losses.pairs import ContrastiveLoss

_LARGEST_SCALE = 100.0
_TEXTS_AT_A_TIME = 64
_ROUNDING = 1e-4  # sums of float32 in another order, over a few layers


@dataclass(frozen=True)
class OrdinaryClipConfig:
    """Sizes and training of the baseline.

    Attributes:
        width, layers, heads: of the text transformer.
        embed_dim: of the shared space.
        steps, batch_size, seed: as in the demo.
        lr: peak; higher than the demo's, because nothing starts from a closed form.
    """

    steps: int
    batch_size: int = 512
    lr: float = 1e-3
    weight_decay: float = 0.1
    width: int = 256
    layers: int = 4
    heads: int = 4
    embed_dim: int = 512
    seed: int = 0


def build_ordinary_clip(vision_tower: nn.Module, arguments: OrdinaryClipConfig) -> Any:
    """Join a frozen EfficientNet-Lite0 and an untrained text transformer."""
    torch.manual_seed(arguments.seed)
    model = open_clip.model.CustomTextCLIP(**_configure(arguments))
    model.visual.trunk.load_state_dict(vision_tower.state_dict(), strict=True)
    model.visual.trunk.requires_grad_(False)
    return model.eval()  # no dropout anywhere, and the tower's statistics stay


@torch.inference_mode()
def encode_tower(model: Any, records: Sequence[CaptionedImage], *, batch_size: int = 8) -> Tensor:
    """Features of the frozen tower, (N, D) float32, with the preprocessing of the saved folder."""
    transform = image_transform_v2(PreprocessCfg(**_PREPROCESSING), is_train=False)
    features = []
    for start in tqdm(range(0, len(records), batch_size), unit=" batches"):
        paths = [str(record.path) for record in records[start : start + batch_size]]
        pixels = torch.stack([transform(image) for image in load_images(paths)])
        features.append(model.visual.trunk(pixels.contiguous(memory_format=torch.channels_last)))
    return torch.cat(features)


def train_ordinary_clip(
    model: Any,
    records: Sequence[CaptionedImage],
    features: Tensor,
    arguments: OrdinaryClipConfig,
) -> list[float]:
    """Train text tower, projections and temperature in place; returns the loss of every step."""
    _center(model, features)
    parameters = [p for p in model.parameters() if p.requires_grad]
    numbers = {
        group_id: number
        for number, group_id in enumerate(dict.fromkeys(r.group_id for r in records))
    }
    group_ids = torch.tensor([numbers[record.group_id] for record in records])
    tokenizer = open_clip.SimpleTokenizer()
    texts = [tokenizer(list(record.captions)) for record in records]
    _require_same_embeddings(model, torch.cat(texts[:16]))
    losses = (
        _compute_loss(model, features[rows], torch.stack(ids), group_ids[rows])
        for rows, ids in _sample_batches(texts, arguments)
    )
    return _descend(losses, parameters, arguments)


def _sample_batches(
    texts: Sequence[Tensor], arguments: OrdinaryClipConfig
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Yield rows of images, each image once an epoch, and the ids of one text of each."""
    generator = torch.Generator().manual_seed(arguments.seed)
    order = torch.empty(0, dtype=torch.long)
    size = min(arguments.batch_size, len(texts))
    for _ in range(arguments.steps):
        if len(order) < size:
            order = torch.cat([order, torch.randperm(len(texts), generator=generator)])
        rows, order = order[:size], order[size:]
        draws = torch.rand(size, generator=generator).tolist()
        theirs = [texts[row] for row in rows.tolist()]
        yield rows, [ids[int(draw * len(ids))] for ids, draw in zip(theirs, draws, strict=True)]


def _descend(
    losses: Iterable[Tensor], parameters: Sequence[nn.Parameter], arguments: OrdinaryClipConfig
) -> list[float]:
    """Take a step of AdamW down each loss; return them."""
    groups = [  # as `align` does: matrices decay, and nothing else
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": arguments.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=arguments.lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, warm_up_then_cosine(arguments.steps, warmup_steps=0.1)
    )
    done: list[float] = []
    for loss in tqdm(losses, total=arguments.steps, unit=" steps"):
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
        optimizer.step()
        schedule.step()
        done.append(loss.item())
    return done


def _compute_loss(model: Any, features: Tensor, ids: Tensor, group_ids: Tensor) -> Tensor:
    image_embeds = F.normalize(model.visual.head(features), dim=-1)
    text_embeds = F.normalize(_encode_trimmed(model, ids), dim=-1)
    scale = model.logit_scale.exp().clamp(max=_LARGEST_SCALE).reshape(1)
    return ContrastiveLoss()(LossInputs(image_embeds, text_embeds, LogitRule(scale), group_ids))


def save_ordinary_clip(model: Any, folder: Path, arguments: OrdinaryClipConfig) -> Path:
    """Save it as open_clip's Hub repositories lie."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {
        "model_cfg": {**_configure(arguments), "custom_text": True},
        "preprocess_cfg": {k: v for k, v in _PREPROCESSING.items() if k != "size"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(written, indent=2), encoding="utf-8")
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


# Those of EfficientNet-Lite0 in the demo.
_PREPROCESSING = {
    "size": 224,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "interpolation": "bicubic",
    "resize_mode": "squash",
}


def _configure(arguments: OrdinaryClipConfig) -> dict[str, Any]:
    return {
        "embed_dim": arguments.embed_dim,
        "vision_cfg": {
            "image_size": 224,
            "timm_model_name": "tf_efficientnet_lite0",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
            "timm_proj_bias": True,
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": arguments.width,
            "heads": arguments.heads,
            "layers": arguments.layers,
        },
    }


def _encode_trimmed(model: Any, ids: Tensor) -> Tensor:
    """Encode texts by length, without the padding behind them: the same embeddings, sooner.

    Attention looks back only, and the end of the text is pooled, so nothing sees the padding.
    """
    lengths = (ids != 0).sum(dim=1)
    order = lengths.argsort()
    pieces = [
        _encode_texts(model.text, ids[rows, : int(lengths[rows].max())])
        for rows in order.split(_TEXTS_AT_A_TIME)
    ]
    return torch.cat(pieces)[order.argsort()]


def _encode_texts(text: Any, ids: Tensor) -> Tensor:
    """Compute the output of open_clip's text tower for fewer positions than it has."""
    length = ids.shape[1]
    hidden = text.token_embedding(ids) + text.positional_embedding[:length]
    hidden = text.transformer(hidden, attn_mask=text.attn_mask[:length, :length])
    ends = ids.argmax(dim=1)  # the end has the largest id
    return text.ln_final(hidden)[torch.arange(len(ids)), ends] @ text.text_projection


@torch.no_grad()
def _require_same_embeddings(model: Any, ids: Tensor) -> None:
    difference = float((_encode_trimmed(model, ids) - model.encode_text(ids)).abs().max())
    if difference > _ROUNDING:
        raise RuntimeError(f"Texts without padding are encoded otherwise, by {difference:.1e}.")


@torch.no_grad()
def _center(model: Any, features: Tensor) -> None:
    """Let the projection take the mean away, as the demo's start does."""
    projection = model.visual.head.proj
    projection.bias.copy_(-(projection.weight @ features.mean(0)))
