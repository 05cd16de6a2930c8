"""The CPU engine: runs texts of unequal length through an LLM without wasting time on padding.

A CPU gains from small pieces: rows of several texts without any padding ("packs"), or, for LLMs
that cannot run those, batches of texts of similar length. Packing goes through transformers' public
attention interface, so no model code is copied. Whether a family passes everything through to its
attention is checked on the model itself before the first use.

Uploaded with the weights. Shapes: B texts, L tokens, T tokens of a pack, D width of the LLM.
"""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

CPU_TOKEN_BUDGET = 2048
# A pass over the weights costs about as much as this many tokens; merging two small batches pays
# as long as it pads less than that.
PASS_COST_TOKENS = 64
MAX_PADDING_SHARE = 0.1

# The package and its copy on the Hub may both be loaded: each has names of its own.
_MODULE = re.sub(r"\W", "_", __name__)
_NAME = f"{_MODULE}_packed"
# Before torch 2.7 only the wider question can be asked.
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
_NEEDS_MORE = "needs more than packed attention computes."
# Two ways to the same numbers, which differ by the order of sums; a mask forgotten differs by more
# than a tenth.
_MOST_DIFFERENCE = 1e-3
# The implementation is a setting of the shared configuration, so one pass at a time, of any kind:
# a plain pass that met the packed setting midway would attend without its mask.
_switch = threading.RLock()
# LLM → whether packing gives its own numbers, checked when it first matters.
_checked: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def splits_batches(text_model: PreTrainedModel, *, packs_in_training: bool) -> bool:
    """Return whether the CPU runs texts in packs or token batches, not as one padded batch.

    While the LLM is trained, a pass without gradients takes the same path as one with them:
    gradient caching runs both, and dropout must draw the same masks for both.

    Args:
        text_model: the LLM.
        packs_in_training: whether a training on a CPU asked for packs.
    """
    if is_traced():
        return False
    if not (torch.is_grad_enabled() or text_model.training):
        return True
    # Recomputing a packed pass in the backward one would find the attention switched back.
    return packs_in_training and not any(
        getattr(module, "gradient_checkpointing", False) for module in text_model.modules()
    )


def pool_on_cpu(
    text_model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    num_unpooled: int,
    pooling: str,
    width: int,
    pool_padded: Callable[[Tensor, Tensor], BaseModelOutputWithPooling],
    keep_tokens: bool = False,
) -> BaseModelOutputWithPooling:
    """Pool texts of unequal length in small pieces, in packs where the LLM can run them.

    Args:
        text_model: the LLM.
        input_ids: (B, L) int64, padded on either side.
        attention_mask: (B, L), 1 at real tokens, which are contiguous.
        num_unpooled: tokens of prompt and instruction in front of each caption.
        pooling: `"mean"` or `"last_token"`.
        width: of the last hidden states.
        pool_padded: encodes a right-padded batch (ids, mask) for LLMs that cannot run packs.
        keep_tokens: whether to return the last hidden states too.

    Returns:
        `pooler_output` (B, D) float32, and with `keep_tokens` `last_hidden_state` (B, L, D) of the
        LLM's dtype, zeros at padding.
    """
    keep_freed_memory()
    starts = attention_mask.long().argmax(dim=1).tolist()
    lengths = attention_mask.long().sum(dim=1).tolist()
    texts = [
        ids[start : start + length]
        for ids, start, length in zip(input_ids, starts, lengths, strict=True)
    ]
    packs = _runs_packs(text_model, max(lengths), input_ids.device)
    plan = plan_packs if packs else plan_token_batches
    pooled = torch.empty(len(texts), width)
    tokens = None
    if keep_tokens:
        tokens = torch.zeros(*input_ids.shape, width, dtype=text_model.dtype)
    for rows in plan(lengths, token_budget=CPU_TOKEN_BUDGET):
        batch = [texts[row] for row in rows]
        if packs:
            embeds, states = _pool_pack(text_model, batch, num_unpooled, pooling)
        else:
            embeds, states = _pool_token_batch(batch, pool_padded)
        pooled[rows] = embeds.to(pooled.device)
        if tokens is not None:
            for row, of_text in zip(rows, states, strict=True):
                tokens[row, starts[row] : starts[row] + lengths[row]] = of_text.to(tokens)
    return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=pooled)


def _runs_packs(text_model: PreTrainedModel, longest: int, device: torch.device) -> bool:
    window = getattr(text_model.config, "sliding_window", None)
    if (window is not None and longest > window) or not packing_allowed(text_model):
        return False
    if text_model not in _checked:
        _checked[text_model] = can_pack(text_model, device)
    return _checked[text_model]


def _pool_pack(
    text_model: PreTrainedModel, texts: list[Tensor], num_unpooled: int, pooling: str
) -> tuple[Tensor, Sequence[Tensor]]:
    """Return the pooled texts, (B, D), and the hidden states of each, (L_i, D)."""
    of_texts = run_packed(text_model, texts).split([len(text) for text in texts])
    if pooling == "mean":
        pooled = [states[num_unpooled:].float().mean(dim=0) for states in of_texts]
    else:
        pooled = [states[-1].float() for states in of_texts]
    return torch.stack(pooled), of_texts


def _pool_token_batch(
    texts: list[Tensor], pool_padded: Callable[[Tensor, Tensor], BaseModelOutputWithPooling]
) -> tuple[Tensor, Sequence[Tensor]]:
    """Do the same with padding."""
    input_ids = nn.utils.rnn.pad_sequence(texts, batch_first=True)
    lengths = torch.tensor([len(text) for text in texts])
    attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    output = pool_padded(input_ids, attention_mask)
    assert output.pooler_output is not None and output.last_hidden_state is not None
    states = zip(output.last_hidden_state, texts, strict=True)
    return output.pooler_output, [of_text[: len(text)] for of_text, text in states]


@dataclass(frozen=True)
class PackedTexts:
    """How the texts lie in the row.

    Attributes:
        cu_seqlens: where each text begins, and where the last one ends, (N + 1,) int64 on the
            CPU. A tensor, so that a compiled layer takes other lengths without being compiled anew.
        is_causal: whether a token sees only those before it.
    """

    cu_seqlens: Tensor
    is_causal: bool


def plan_packs(lengths: Sequence[int], *, token_budget: int) -> list[list[int]]:
    """Fill rows up to a budget of tokens, longest texts first; equal lengths lie together.

    Returns:
        rows of indices into `lengths`, each index once; a longer text than the budget goes alone.
    """
    packs: list[list[int]] = []
    filled = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        filled += lengths[index]
        if packs and filled <= token_budget:
            packs[-1].append(index)
        else:
            packs.append([index])
            filled = lengths[index]
    return packs


def plan_token_batches(lengths: Sequence[int], *, token_budget: int) -> list[list[int]]:
    """Group texts of similar length into batches that fit a budget of tokens, padding included.

    Args:
        lengths: tokens per text.
        token_budget: most tokens a batch may hold, padding included; a longer text goes alone.

    Returns:
        Batches of indices into `lengths`, longest texts first, each index once. Padding is at most
        a tenth of all tokens, and of a batch's tokens at most a tenth, or 64.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches: list[list[int]] = []
    num_tokens = all_padding = padding = 0
    for index in order:
        longest = lengths[batches[-1][0]] if batches else 0
        padded_size = longest * (len(batches[-1]) + 1) if batches else 0
        more = longest - lengths[index]
        allowed = max(MAX_PADDING_SHARE * padded_size, PASS_COST_TOKENS)
        if (
            batches
            and padded_size <= token_budget
            and padding + more <= allowed
            and all_padding + more <= MAX_PADDING_SHARE * (num_tokens + longest)
        ):
            batches[-1].append(index)
            padding += more
            all_padding += more
            num_tokens += longest
        else:
            batches.append([index])
            padding = 0
            num_tokens += lengths[index]
    return batches


def run_packed(text_model: PreTrainedModel, texts: Sequence[Tensor]) -> Tensor:
    """Run one row of texts through the LLM, in the direction that its configuration states.

    Args:
        texts: token ids of each text, (L_i,) int64, equal lengths together.

    Returns:
        last hidden states, (sum of L_i, D).

    Raises:
        ValueError: the attention of this family asks for more than packing offers.
    """
    lengths = [len(text) for text in texts]
    is_causal = getattr(text_model.config, "is_causal", True)  # as transformers' masks read it
    position_ids = torch.cat([torch.arange(length, device=texts[0].device) for length in lengths])
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
    with _packed_attention(text_model):
        output = text_model(
            input_ids=torch.cat(list(texts)).unsqueeze(0),
            position_ids=position_ids.unsqueeze(0),
            use_cache=False,
            packed_texts=PackedTexts(cu_seqlens, is_causal),
        )
    return output.last_hidden_state[0]  # type: ignore[no-any-return]


def packing_allowed(text_model: PreTrainedModel) -> bool:
    """Whether packing stands in for what was chosen: for the default, not for another wish."""
    # Another thread's pass may be under way.
    return text_model.config._attn_implementation in ("sdpa", _NAME)


@torch.no_grad()  # FSDP keeps what it gathers here, for passes with gradients
def can_pack(text_model: PreTrainedModel, device: torch.device) -> bool:
    """Compare three short texts in one row with each of them alone.

    Args:
        device: where inputs go; the model's own says nothing when it is offloaded.

    Returns:
        False where this family drops what packing needs, or its attention does more than plain
        scaled dot products; such a family is run with padding.
    """
    rows = torch.arange(12, device=device) % text_model.config.vocab_size
    texts = [rows[:5], rows[3:8], rows[8:11]]
    was_training = text_model.training
    text_model.eval()  # dropout would make any two passes differ
    try:
        with torch.autocast(device.type, enabled=False), acquire_text_forward_lock():
            packed = run_packed(text_model, texts)
            alone = [
                text_model(input_ids=text.unsqueeze(0), use_cache=False).last_hidden_state[0]
                for text in texts
            ]
    except (TypeError, ValueError):  # a forward that takes no such argument, or our refusal
        return False
    finally:
        text_model.train(was_training)
    expected = torch.cat(alone).float()
    difference = (packed.float() - expected).norm() / expected.norm()
    return bool(difference < _MOST_DIFFERENCE)


def attend_packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed_texts: PackedTexts | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention within each text of the row; query (1, heads, T, d), key and value alike.

    Returns:
        (1, T, heads, d) and no weights, as transformers' attention interface wants it.

    Raises:
        ValueError: what it does not compute: soft caps, sinks, windows, a mask.
    """
    if packed_texts is None or attention_mask is not None or softcap or s_aux is not None:
        raise ValueError(f"{type(module).__name__} {_NEEDS_MORE}")
    # Autocast leaves queries and keys in float32 behind their rotation by position.
    query, key = query.to(value.dtype), key.to(value.dtype)
    cu_seqlens, is_causal = packed_texts.cu_seqlens, packed_texts.is_causal
    # The operator knows no gradients, and costs a single short caption some time uncompiled.
    in_graph = is_traced() and not torch.is_grad_enabled()
    attend = _attend_in_graph if in_graph else _attend
    mixed: Tensor = attend(
        query, key, value, cu_seqlens, is_causal, scaling, dropout, sliding_window
    )
    return mixed.unsqueeze(0), None


@torch.compiler.disable  # type: ignore[untyped-decorator]  # it would be traced for these lengths
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    is_causal: bool,
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
) -> Tensor:
    """Mix the values of each text: (1, heads, T, d) to (T, heads, d)."""
    mixed = _empty_mixed(query, value)
    start = 0
    for length, equal in itertools.groupby(cu_seqlens.diff().tolist()):
        if sliding_window is not None and length > sliding_window:
            raise ValueError(f"A window of {sliding_window} tokens {_NEEDS_MORE}")
        count = len(list(equal))
        stop = start + count * length
        q, k, v = (_split(t[0, :, start:stop], count, length) for t in (query, key, value))
        attended = F.scaled_dot_product_attention(
            q,
            k,
            v,
            scale=scaling,
            dropout_p=dropout,
            is_causal=is_causal,
            enable_gqa=key.shape[1] != query.shape[1],
        )  # (count, heads, length, d)
        mixed[start:stop] = attended.transpose(1, 2).flatten(0, 1)
        start = stop
    return mixed


# An operator, so that a layer compiles into one graph whatever the lengths are.
_attend_in_graph = torch.library.custom_op(
    f"{_MODULE}::attend",
    _attend,
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens, bool is_causal, "
    "float? scaling, float dropout, int? sliding_window) -> Tensor",
)
_attend_in_graph.register_fake(lambda query, _, value, *__: _empty_mixed(query, value))


def _empty_mixed(query: Tensor, value: Tensor) -> Tensor:
    return query.new_empty(query.shape[2], query.shape[1], value.shape[3])


@cache
def keep_freed_memory() -> None:
    """Stop glibc from giving memory back to the system after every pass; works once a process.

    Freeing one block just under 32 MiB raises its thresholds to that size (mallopt(3),
    M_MMAP_THRESHOLD: "dynamic"). Page faults cost a tenth of the time of a pass without it.
    """
    for _ in range(2):
        torch.empty(31 * 2**18).zero_()


def _split(heads: Tensor, count: int, length: int) -> Tensor:
    """(heads, count * length, d) to (count, heads, length, d)."""
    return heads.view(heads.shape[0], count, length, -1).transpose(0, 1)


def is_traced() -> bool:
    """Whether a compiler or an export runs this very call.

    `torch.compiler.is_compiling` also says so to other threads of a process that compiles.
    """
    return torch.compiler.is_dynamo_compiling() or _is_exporting()


@contextmanager
def acquire_text_forward_lock() -> Iterator[None]:
    """Let the passes of other threads wait, packed and plain ones, while the LLM is set for one."""
    with _switch:
        yield


@contextmanager
def _packed_attention(text_model: PreTrainedModel) -> Iterator[None]:
    """Let the LLM use packed attention for one pass."""
    AttentionInterface.register(_NAME, attend_packed)
    with _switch:
        before = text_model.config._attn_implementation
        text_model.config._attn_implementation = _NAME
        try:
            yield
        finally:
            text_model.config._attn_implementation = before
