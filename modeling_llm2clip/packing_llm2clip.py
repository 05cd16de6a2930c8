"""Runs texts of unequal length through an LLM on a CPU without wasting time on padding.

A CPU is faster with small pieces of a batch: rows of several texts without padding ("packs"), or
batches of texts of similar length for LLMs that cannot run packs. Packing uses transformers' public
attention interface, so no model code is copied. Before the first use, a check on the model itself
shows whether its family passes all arguments on to the attention.

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
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .pooling_llm2clip import TEXT_POOLINGS

CPU_TOKEN_BUDGET = 2048
# Reading the weights once costs as much as about this many tokens. Merging two small batches is
# faster if it adds less padding than that.
PASS_COST_TOKENS = 64
MAX_PADDING_SHARE = 0.1

# The package and its copy from the Hub may both be loaded, so each needs its own names.
_MODULE = re.sub(r"\W", "_", __name__)
_NAME = f"{_MODULE}_packed"
# torch before 2.7 has only is_compiling, which is also true while compiling.
_KNOWS_EXPORTS = hasattr(torch.compiler, "is_exporting")
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
_NEEDS_MORE = "needs more than packed attention computes."
# Both paths compute the same numbers and differ by the order of sums; a missing mask would change
# them by more than a tenth.
_MOST_DIFFERENCE = 1e-3
# The attention implementation is a field of the shared configuration, so only one packed pass runs
# at a time. A plain pass of another thread that meets the packed setting computes what SDPA does.
text_forward_lock = threading.RLock()
_pass = threading.local()  # `longest`: tokens of the longest text while this thread runs a pack
# LLM → whether packing gives the same numbers; checked before the first use.
_checked: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def splits_batches(text_model: PreTrainedModel, *, packs_in_training: bool) -> bool:
    """Return whether the CPU splits a batch into packs or token batches.

    While the LLM is trained, passes with and without gradients take the same path: gradient caching
    runs both, and dropout must sample the same masks in both.
    """
    if is_traced():
        return False
    if not (torch.is_grad_enabled() or text_model.training):
        return True
    # When the backward pass recomputes a packed one, the attention is already switched back.
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
    """Encode and pool texts of unequal length in packs, or in token batches if the LLM needs them.

    Ids are (B, L), padded on either side; the real tokens of a row, 1 in the mask, are contiguous.
    `pool_padded` encodes and pools a right-padded batch (ids, mask), for LLMs that cannot run
    packs. Returns `pooler_output` (B, D) float32; with `keep_tokens` also `last_hidden_state`
    (B, L, D) in the LLM's dtype, zeros at padding.
    """
    keep_freed_memory()
    starts = attention_mask.long().argmax(dim=1).tolist()
    lengths = attention_mask.long().sum(dim=1).tolist()
    texts = [
        ids[start : start + length]
        for ids, start, length in zip(input_ids, starts, lengths, strict=True)
    ]
    # One text fills no pack, and is spared the check of packs, which takes five passes.
    packs = len(texts) > 1 and _runs_packs(text_model, max(lengths), input_ids.device)
    plan = plan_packs if packs else plan_token_batches
    pooled = torch.empty(len(texts), width, dtype=torch.float32)
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
            for row, text_states in zip(rows, states, strict=True):
                tokens[row, starts[row] : starts[row] + lengths[row]] = text_states.to(tokens)
    return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=pooled)


def _runs_packs(text_model: PreTrainedModel, longest: int, device: torch.device) -> bool:
    config = text_model.config
    # Tokens within a window, or within a chunk of this many tokens, attend to each other.
    spans = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    if any(span and longest > span for span in spans):
        return False
    # Packing may replace the default alone, SDPA. It is _NAME while another thread runs a pack.
    if config._attn_implementation not in ("sdpa", _NAME):
        return False
    if text_model not in _checked:
        _checked[text_model] = can_pack(text_model, device)
    return _checked[text_model]


def _pool_pack(
    text_model: PreTrainedModel, texts: list[Tensor], num_unpooled: int, pooling: str
) -> tuple[Tensor, Sequence[Tensor]]:
    """Return the pooled texts, (B, D), and the hidden states of each text, (L_i, D)."""
    states = run_packed(text_model, texts).split([len(text) for text in texts])
    pool = TEXT_POOLINGS[pooling].packed
    return torch.stack([pool(text[num_unpooled:].float()) for text in states]), states


def _pool_token_batch(
    texts: list[Tensor], pool_padded: Callable[[Tensor, Tensor], BaseModelOutputWithPooling]
) -> tuple[Tensor, Sequence[Tensor]]:
    """Return the same as `_pool_pack`, computed with padding."""
    input_ids = nn.utils.rnn.pad_sequence(texts, batch_first=True)
    lengths = torch.tensor([len(text) for text in texts])
    attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    output = pool_padded(input_ids, attention_mask)
    assert output.pooler_output is not None and output.last_hidden_state is not None
    states = zip(output.last_hidden_state, texts, strict=True)
    return output.pooler_output, [padded[: len(text)] for padded, text in states]


@dataclass(frozen=True)
class PackedTexts:
    """Positions of the texts in a pack, and the direction of their attention.

    Attributes:
        cu_seqlens: Start of each text and end of the last one, (N + 1,) int64 on the CPU. It is a
            tensor, so that a compiled layer is not compiled again for other lengths.
        is_causal: Whether a token attends only to those before it.
    """

    cu_seqlens: Tensor
    is_causal: bool


def plan_packs(lengths: Sequence[int], *, token_budget: int) -> list[list[int]]:
    """Group texts into packs of `token_budget` tokens, longest first, equal lengths adjacent.

    Returns packs of indices into `lengths`. A text longer than the budget gets its own pack.
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
    """Group texts of similar length into batches of `token_budget` tokens, padding included.

    Returns batches of indices into `lengths`, longest texts first. A text longer than the budget
    gets its own batch. Padding is at most a tenth of all tokens, and within a batch at most a tenth
    of its tokens or 64 tokens.
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
    """Run one pack of texts through the LLM, bidirectional or causal as configured.

    The ids are (L_i,) int64 per text; texts of equal length must be adjacent. Returns the last
    hidden states, (sum of L_i, D).
    """
    lengths = [len(text) for text in texts]
    first = find_first_position(text_model)
    is_causal = getattr(text_model.config, "is_causal", True)  # the default of transformers' masks
    device = texts[0].device
    position_ids = torch.cat([torch.arange(length, device=device) + first for length in lengths])
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
    with _packed_attention(text_model, longest=max(lengths)):
        output = text_model(
            input_ids=torch.cat(list(texts)).unsqueeze(0),
            position_ids=position_ids.unsqueeze(0),
            use_cache=False,
            packed_texts=PackedTexts(cu_seqlens, is_causal),
        )
    return output.last_hidden_state[0]  # type: ignore[no-any-return]


def find_first_position(text_model: nn.Module) -> int:
    """Return the position of a text's first token: 0, or what RoBERTa's relatives begin with."""
    table = getattr(getattr(text_model, "embeddings", None), "position_embeddings", None)
    padding: int | None = getattr(table, "padding_idx", None)
    return 0 if padding is None else padding + 1


@torch.no_grad()  # FSDP reuses weights gathered here in passes with gradients
def can_pack(text_model: PreTrainedModel, device: torch.device) -> bool:
    """Check that three short texts in one pack give the same numbers as each of them alone.

    The numbers differ if the family drops arguments that packing needs, or if its attention
    computes more than plain scaled dot products. `device` is the device of the inputs, which an
    offloaded model does not report.
    """
    # Not the first ids: RoBERTa's relatives take their padding id for padding without a mask too.
    rows = torch.arange(4, 16, device=device) % text_model.config.vocab_size
    texts = [rows[:5], rows[3:8], rows[8:11]]
    plain = torch.autocast(device.type, enabled=False)
    try:
        # Dropout would make any two passes differ. Other threads may use the model, so its mode
        # stays. What is random in another way fails the check.
        with plain, _WithoutDropout(), text_forward_lock:
            packed = run_packed(text_model, texts)
            alone = [
                text_model(input_ids=text.unsqueeze(0), use_cache=False).last_hidden_state[0]
                for text in texts
            ]
    except (TypeError, ValueError):  # forward rejects the argument, or attend_packed the model
        return False
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
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend within each text of a pack, as an implementation of transformers' interface.

    Queries are (1, heads, T, d), keys and values (1, key heads, T, d), where key heads divide
    heads; returns (1, T, heads, d), and None in place of attention weights. ValueError where the
    layer needs a mask, soft capping, sinks or a window that a text exceeds. A plain pass of another
    thread, which meets this implementation in the shared configuration, attends as SDPA does.
    """
    if packed_texts is None and not _runs_a_pack():
        more = {"sliding_window": sliding_window, "softcap": softcap, "s_aux": s_aux, **others}
        plain: tuple[Tensor, None] = ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )
        return plain
    if packed_texts is None or attention_mask is not None or softcap or s_aux is not None:
        raise ValueError(f"{type(module).__name__} {_NEEDS_MORE}")
    # Under autocast, rotary embeddings leave queries and keys in float32.
    query, key = query.to(value.dtype), key.to(value.dtype)
    cu_seqlens, is_causal = packed_texts.cu_seqlens, packed_texts.is_causal
    # The operator has no gradients, and without a compiler it slows down a single short caption.
    in_graph = is_traced() and not torch.is_grad_enabled()
    attend = _attend_in_graph if in_graph else _attend
    mixed: Tensor = attend(
        query, key, value, cu_seqlens, is_causal, scaling, dropout, sliding_window
    )
    return mixed.unsqueeze(0), None


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a trace would be specialized to these lengths
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


# As an operator, it lets a layer compile into one graph for all lengths.
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
    """Stop glibc from returning memory to the system after every pass; runs once per process.

    Freeing one block just under 32 MiB raises glibc's thresholds to that size (mallopt(3),
    M_MMAP_THRESHOLD: "dynamic"). Otherwise page faults take a tenth of a pass's time.
    """
    for _ in range(2):
        torch.empty(31 * 2**18).zero_()


def _split(heads: Tensor, count: int, length: int) -> Tensor:
    """(heads, count * length, d) to (count, heads, length, d)."""
    return heads.view(heads.shape[0], count, length, -1).transpose(0, 1)


def is_traced() -> bool:
    """Tell whether this call is being traced by a compiler or an export.

    `torch.compiler.is_compiling` is also true in other threads of a process that compiles.
    """
    return torch.compiler.is_dynamo_compiling() or _is_exporting()


def is_exported() -> bool:
    """Tell whether this call is being traced by an export."""
    return _is_exporting() and (_KNOWS_EXPORTS or not torch.compiler.is_dynamo_compiling())


@contextmanager
def _packed_attention(text_model: PreTrainedModel, *, longest: int) -> Iterator[None]:
    """Switch the LLM to packed attention for one pass."""
    AttentionInterface.register(_NAME, attend_packed)
    AttentionMaskInterface.register(_NAME, _build_mask)
    with text_forward_lock:
        before = text_model.config._attn_implementation
        _pass.longest = longest
        text_model.config._attn_implementation = _NAME
        try:
            yield
        finally:
            text_model.config._attn_implementation = before
            _pass.longest = 0


def _runs_a_pack() -> bool:
    return getattr(_pass, "longest", 0) > 0


def _build_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Build the mask of a plain pass of another thread, as for SDPA; a pack needs none."""
    if _runs_a_pack():
        span = kwargs.get("local_size")  # of a window or a chunk
        if span is not None and _pass.longest > span:
            raise ValueError(f"A window or chunk of {span} tokens {_NEEDS_MORE}")
        return None
    mask: Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)
    return mask


class _WithoutDropout(TorchFunctionMode):
    """Switches dropout off in this thread alone, whatever the mode of the modules."""

    def __torch_function__(
        self, func: Any, _types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.dropout:
            return args[0]
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and "dropout_p" in kwargs:
            kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)
