"""From tokens to logits: pooling of captions, text adapter, temperature and contrastive loss.

Uploaded with the weights. Shapes: B is the batch size, L the number of tokens, D the width of a
tower.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .pooling_llm2clip import TEXT_POOLINGS

# The package and its copy from the Hub may both be loaded, so each needs its own name.
_MODULE = re.sub(r"\W", "_", __name__)
_UNSAFE = getattr(torch.Tag, "cudagraph_unsafe", None)  # None in older versions of torch
_TAKES_TAGS = "tags" in inspect.signature(torch.library.custom_op).parameters
_TAGS: dict[str, Any] = {"tags": (_UNSAFE,)} if _UNSAFE and _TAKES_TAGS else {}


def build_position_ids(attention_mask: Tensor, *, first: int = 0) -> Tensor:
    """Build positions that start at each text's first real token, so left padding has no effect.

    `first` is the position of the first real token. Returns (B, L) int64. Padding never has a
    larger position than the last real token, because some LLMs choose their rotary frequencies
    based on the largest position.
    """
    real = attention_mask.long()
    first_real = real.argmax(dim=1, keepdim=True)  # (B, 1)
    last = real.sum(dim=1, keepdim=True) - 1
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (positions - first_real).minimum(last).clamp(min=0) + first


def check_rotary_positions(text_config: Any, *, max_length: int) -> None:
    """Check that an LLM's rotary frequencies do not depend on the other texts in a batch.

    Some LLMs switch frequencies for a whole batch if its longest text exceeds their pretraining
    length.
    """
    parameters = getattr(text_config, "rope_parameters", None) or {}
    # Some LLMs have separate frequencies per type of layer.
    for rope in [parameters, *parameters.values()]:
        kind = rope.get("rope_type") if isinstance(rope, dict) else None
        if kind not in ("dynamic", "longrope"):
            continue
        limit = text_config.max_position_embeddings
        if kind == "longrope":
            name = "original_max_position_embeddings"
            limit = rope.get(name) or getattr(text_config, name, None) or limit
        if max_length > limit:
            raise ValueError(
                f"max_text_length={max_length}, but from {limit + 1} tokens on, the rotary "
                f"positions of this LLM (rope_type={kind!r}) depend on the longest text in a "
                "batch, so embeddings would depend on the other texts. Set max_text_length to at "
                f"most {limit} (llm2clip build --max-text-length, or config.json and "
                "processor_config.json)."
            )


def count_unpooled(
    prompt_length: int | Tensor | None,
    *,
    num_prefix: int,
    pools_prompt: bool,
    num_suffix: int,
    suffix_ends_special: bool,
) -> int:
    """Count the tokens before each caption that are not pooled: prompt prefix and instruction.

    With `pools_prompt`, every token is pooled. `prompt_length` is the number of tokens in the
    instruction, tokenized with the model's prompt but without a special token at the end, as in
    sentence-transformers; None or 0 without an instruction.
    """
    if pools_prompt:
        return 0
    if isinstance(prompt_length, Tensor):  # sentence-transformers also allows one value per text
        prompt_length, *others = prompt_length.unique().tolist()
        if others:
            raise ValueError(
                f"prompt_length is both {prompt_length} and {others[0]} in one batch. Encode the "
                "texts of each instruction in a separate batch."
            )
    if not prompt_length:
        return num_prefix
    num_instruction = int(prompt_length) - num_prefix - num_suffix + bool(suffix_ends_special)
    if num_instruction < 0:
        raise ValueError(
            f"prompt_length={prompt_length} is shorter than the model's own prompt "
            f"({num_prefix + num_suffix} tokens): it must be the length of the tokenized "
            "instruction, prefix and suffix included."
        )
    return num_prefix + num_instruction


def build_pooling_mask(attention_mask: Tensor, *, num_unpooled: int) -> Tensor:
    """Mark the tokens to pool, (B, L) bool: all real tokens except the first `num_unpooled`."""
    real = attention_mask.bool()
    return real & (real.long().cumsum(dim=1) > num_unpooled)


def pool_tokens(hidden_states: Tensor, pooling_mask: Tensor, *, pooling: str) -> Tensor:
    """Pool the marked tokens, (B, L, D) to (B, D) float32; see `text_pooling`."""
    with torch.autocast(hidden_states.device.type, enabled=False):
        return TEXT_POOLINGS[pooling].padded(hidden_states, pooling_mask)


def mask_unpadded(
    input_ids: Tensor, *, pad_token_id: int | None, prefix_ids: list[int], suffix_ids: list[int]
) -> Tensor:
    """Build a mask for ids that were passed without a mask: every token must be real.

    The pad id may be part of the prompt, so a row counts as padded if it begins or ends with more
    pad ids than the prompt.
    """
    if pad_token_id is not None and input_ids.ndim == 2:
        is_pad = input_ids == pad_token_id
        num_first = _count_first(prefix_ids, pad_token_id)
        num_last = _count_first(suffix_ids[::-1], pad_token_id)
        begins = is_pad[:, : num_first + 1].sum(dim=1) == num_first + 1
        ends = is_pad[:, -num_last - 1 :].sum(dim=1) == num_last + 1
        _refuse(begins | ends, input_ids, f"have padding (id {pad_token_id}) and no "
                "attention_mask; pass the attention_mask that the tokenizer returned")  # fmt: skip
    return torch.ones_like(input_ids)


def _count_first(ids: list[int], token_id: int) -> int:
    """Count how many times an id repeats at the start of a list."""
    return next((count for count, i in enumerate(ids) if i != token_id), len(ids))


def mask_checked(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    pad_token_id: int | None,
    prefix_ids: list[int],
    suffix_ids: list[int],
    max_length: int,
    vocabulary_size: int,
    num_unpooled: int,
) -> Tensor:
    """Check that token ids could come from the model's own tokenizer, and return their mask.

    Ids and mask are (B, L), padded on either side; without a mask, every token must be real. Every
    text must begin with `prefix_ids`, end with `suffix_ids`, and have a token of its own after the
    `num_unpooled` tokens of prompt and instruction. Otherwise, a ValueError shows the first invalid
    row. The result is always a new tensor, because a custom operator may not return its input.
    """
    mask = attention_mask
    if mask is None:
        mask = mask_unpadded(
            input_ids, pad_token_id=pad_token_id, prefix_ids=prefix_ids, suffix_ids=suffix_ids
        )
    if input_ids.ndim != 2 or input_ids.shape != mask.shape:
        raise ValueError(
            f"input_ids {tuple(input_ids.shape)} and attention_mask "
            f"{tuple(mask.shape)} must both have shape (texts, tokens)."
        )
    if 0 in input_ids.shape:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}. Pass at least one text.")
    if input_ids.is_floating_point():
        raise ValueError(
            f"input_ids must be integers, not {input_ids.dtype}. Pass precomputed embeddings "
            "to project_caption_embeds instead."
        )
    lengths = mask.long().sum(dim=1)  # (B,)
    first_real = mask.long().argmax(dim=1)  # (B,)
    last_real = mask.shape[1] - 1 - mask.flip(1).long().argmax(dim=1)
    _refuse((last_real - first_real + 1 != lengths) & (lengths > 0), mask,
            "have a gap in their attention_mask: real tokens must be contiguous")  # fmt: skip
    _refuse(lengths > max_length, lengths, f"have more than max_text_length={max_length} tokens; "
            f"tokenize with truncation=True and max_length={max_length} at most, or raise "
            "max_text_length in the config")  # fmt: skip
    least = len(prefix_ids) + len(suffix_ids) - bool(suffix_ids)
    _refuse(lengths <= least, lengths, "have no token to pool: the text is empty")
    if num_unpooled > len(prefix_ids):
        _refuse(lengths <= num_unpooled + len(suffix_ids), lengths, "have nothing after their "
                f"instruction: the text is blank, or the {num_unpooled} tokens of prompt and "
                "instruction leave no room for it. Shorten the instruction, or raise the maximum "
                "length (max_text_length, sentence-transformers' max_seq_length)")  # fmt: skip
    _refuse((input_ids < 0).any(dim=1) | (input_ids >= vocabulary_size).any(dim=1), input_ids,
            f"have ids outside the vocabulary of {vocabulary_size}; use the tokenizer or "
            "processor saved with the model")  # fmt: skip
    _check_piece(input_ids, first_real, prefix_ids, where="begin with the model's prompt")
    _check_piece(input_ids, first_real + lengths - len(suffix_ids), suffix_ids,
                 where="end with the prompt's suffix")  # fmt: skip
    return mask if attention_mask is None else mask.clone()


# As an operator, it also checks the ids in a compiled model: it is one node of the graph, whose
# result the pooling reads. It must not be recorded in a CUDA graph, because it inspects the ids.
mask_checked_in_graph = torch.library.custom_op(
    f"{_MODULE}::mask_checked",
    mask_checked,
    mutates_args=(),
    schema="(Tensor input_ids, Tensor? attention_mask, int? pad_token_id, int[] prefix_ids, "
    "int[] suffix_ids, SymInt max_length, SymInt vocabulary_size, SymInt num_unpooled) -> Tensor",
    **_TAGS,
)
mask_checked_in_graph.register_fake(
    lambda input_ids, attention_mask, *_: torch.empty_like(
        input_ids if attention_mask is None else attention_mask
    )
)


def _check_piece(input_ids: Tensor, starts: Tensor, piece: list[int], *, where: str) -> None:
    if not piece:
        return
    expected = torch.tensor(piece, device=input_ids.device)
    columns = starts.unsqueeze(1) + torch.arange(len(piece), device=input_ids.device)
    ids = input_ids.gather(1, columns.clamp(0, input_ids.shape[1] - 1))  # (B, len(piece))
    _refuse((ids != expected).any(dim=1), ids, f"do not {where} {piece}; use the tokenizer or "
            "processor saved with the model")  # fmt: skip


def _refuse(is_bad: Tensor, rows: Tensor, complaint: str) -> None:
    if is_bad.any():
        row = int(is_bad.long().argmax())
        raise ValueError(
            f"{int(is_bad.sum())} of {len(is_bad)} texts {complaint}. "
            f"First invalid row: {row} ({rows[row].tolist()})."
        )


MAX_LOG_SCALE = math.log(100)  # arXiv:2103.00020, section 2.5


class LogitRule(NamedTuple):
    """Turns unit-length embeddings into logits.

    Attributes:
        scale: Inverse temperature, float32 of shape (1,), or () in a rule from `plain_rule`.
    """

    scale: Tensor

    def __call__(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """Compare every image with every text, (images, texts) float32."""
        # An enclosing autocast would round logits of up to 100 to 8 bits.
        with torch.autocast(image_embeds.device.type, enabled=False):
            return (self.scale * image_embeds.float()) @ text_embeds.float().T

    def to(self, device: torch.device) -> LogitRule:
        """Move the rule to a device."""
        return LogitRule(*(part.to(device) for part in self))

    def from_cosines(self, cosines: Tensor) -> Tensor:
        """Turn cosines into logits."""
        return self.scale * cosines


class LogitHead(nn.Module):
    """Learned inverse temperature, stored as its logarithm and clamped to [0, ln 100].

    The parameter has shape (1,) because FSDP2 rejects 0-dimensional parameters. The parameter is in
    its own module because a float32 parameter directly on the model would change the saved dtype.
    `half()` and similar calls keep the parameter in float32, because one float16 step at ln 100
    changes every logit by 0.5%.

    Args:
        initial_value: Logarithm of the initial inverse temperature.
    """

    def __init__(self, initial_value: float) -> None:
        super().__init__()
        self.initial_value = initial_value
        self.log_scale = nn.Parameter(torch.full((1,), initial_value, dtype=torch.float32))

    def forward(self) -> Tensor:
        """Return the inverse temperature, (1,) float32."""
        return self.log_scale.float().clamp(0.0, MAX_LOG_SCALE).exp()

    def exp(self) -> Tensor:
        """Return the inverse temperature, for code written for CLIP: `logit_scale.exp()`."""
        return self()  # type: ignore[no-any-return]

    def rule(self) -> LogitRule:
        """Return the rule for the current weights, with gradients."""
        return LogitRule(self())  # hooks of the call fetch offloaded or sharded weights

    def plain_rule(self) -> LogitRule:
        """Return the rule without gradients, for embeddings on any device."""
        return LogitRule(*(part.detach().cpu().squeeze() for part in self.rule()))

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep the stored logarithm within its bounds, in place."""
        self.log_scale.clamp_(0.0, MAX_LOG_SCALE)

    def reset(self) -> None:
        """Reset to the initial value, unless the weights were loaded."""
        init.constant_(self.log_scale, self.initial_value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LogitHead:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        applied: LogitHead = super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return applied


class AdapterBlock(nn.Module):
    """`x + Linear(GELU(Linear(LayerNorm(x))))` (LinearBlock in upstream's `eva_clip/model.py`).

    Args:
        width: D.
        expansion: Width of the inner layer, as a multiple of D.
    """

    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, expansion * width)
        self.down = nn.Linear(expansion * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply the block, (B, D) to (B, D)."""
        return hidden + self.down(F.gelu(self.up(self.norm(hidden))))  # type: ignore[no-any-return]


class PooledDense(nn.Linear):
    """Linear map that an embedder applies after pooling, (B, D) to (B, D') float32."""

    def forward(self, pooled: Tensor) -> Tensor:
        """Apply the map in the weights' dtype."""
        return super().forward(pooled.to(self.weight.dtype)).float()


class TextAdapter(nn.Module):
    """Residual blocks and a final LayerNorm over a caption embedding.

    Args:
        width: D.
        num_layers: Number of blocks; None for an adapter without blocks or final norm.
        expansion: Width of the blocks' inner layers, as a multiple of D.
        normalize: Scale caption embeddings to unit length first.
    """

    def __init__(
        self, width: int, *, num_layers: int | None, expansion: int, normalize: bool
    ) -> None:
        super().__init__()
        self.normalize = normalize
        self.blocks = nn.ModuleList(AdapterBlock(width, expansion) for _ in range(num_layers or 0))
        self.norm = nn.Identity() if num_layers is None else nn.LayerNorm(width)

    def forward(self, caption_embeds: Tensor) -> Tensor:
        """Apply the adapter to (B, D) of any float dtype; the result has the weights' dtype."""
        if self.normalize:
            caption_embeds = F.normalize(caption_embeds.float(), dim=-1)
        # The norm is never quantized, so compute in its dtype.
        hidden = caption_embeds.to(getattr(self.norm, "weight", caption_embeds).dtype)
        for block in self.blocks:
            hidden = block(hidden)
        return self.norm(hidden)  # type: ignore[no-any-return]


def contrastive_loss(logits_per_image: Tensor) -> Tensor:
    """Compute the symmetric cross-entropy over all pairs; ln(B) if all logits are equal.

    The logits are (B, B); image i matches text i (arXiv:2103.00020, figure 3).
    """
    num_images, num_texts = logits_per_image.shape
    if num_images != num_texts:
        raise ValueError(
            f"The loss pairs image i with text i, but got {num_images} images and {num_texts} "
            "texts. Pass as many images as texts, or remove return_loss."
        )
    labels = torch.arange(num_images, device=logits_per_image.device)
    per_image = F.cross_entropy(logits_per_image, labels)
    return (per_image + F.cross_entropy(logits_per_image.T, labels)) / 2


def check_width(embeds: Tensor, width: int, *, name: str) -> None:
    """Raise ValueError unless the input of a projection is floating point, (B, `width`)."""
    if embeds.ndim != 2 or embeds.shape[1] != width or not embeds.is_floating_point():
        raise ValueError(
            f"{name} must be floating point of shape (B, {width}), not {embeds.dtype} "
            f"{tuple(embeds.shape)}. Pass token ids to get_text_features and pixels to "
            "get_image_features. Embeddings from another tower do not work with this model."
        )


TOWERS = ("text_model.", "vision_model.")
_SAMPLED = 1024  # numbers per weight; a training step changes some of them
_CASTS = (torch.float32, torch.bfloat16, torch.float16)


def sample_heads(weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Copy the first values of each weight outside the towers, none of a weight on `meta`."""
    return {name: _sample(weight) for name, weight in weights if not name.startswith(TOWERS)}


def _sample(weight: Tensor) -> Tensor:
    if weight.is_meta:
        return torch.empty(0)
    whole: Tensor = weight.full_tensor() if hasattr(weight, "full_tensor") else weight  # FSDP
    return whole.detach().flatten()[:_SAMPLED].float().cpu().clone()


def list_random(
    heads: Sequence[str], before: Mapping[str, Tensor], now: Mapping[str, Tensor]
) -> list[str]:
    """List the random heads whose weights have not changed, given samples of all heads.

    A weight that was only cast, at most twice, counts as unchanged. Heads without weights are
    skipped.
    """
    known = {name.partition(".")[0] for name in before}
    changed = {
        name.partition(".")[0]
        for name, start in before.items()
        if name in now
        and start.shape == now[name].shape
        and not any(
            torch.equal(start.to(first).to(second).float(), now[name])
            for first in _CASTS
            for second in _CASTS
        )
    }
    return [head for head in heads if head in known - changed]
