"""Runs texts of different lengths through an LLM without wasting time on padding.

A CPU is faster if it splits a batch into small pieces: rows of several texts without padding
("packs"), or batches of texts of similar length for LLMs that cannot run packs. A GPU runs a batch
as one pack if torch has a kernel for packed texts, and padded otherwise. Packing uses transformers'
public attention interface, so no model code is copied. Before a model first runs a pack, a check
verifies that its layers pass all arguments on to the attention function.

Uploaded with the weights. Shapes: B is the batch size, L the number of tokens, T the number of
tokens in a pack, D the width of the LLM.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .attention_llm2clip import (
    PACKED_ATTENTION,
    PackedTexts,
    VarlenKernel,
    is_traced,
    packed_attention,
    recomputes,
)
from .pooling_llm2clip import TEXT_POOLINGS

CPU_TOKEN_BUDGET = 2048
# Reading the weights once costs about as much as this many tokens, so merging two small batches is
# faster if it adds less padding.
PASS_COST_TOKENS = 64
MAX_PADDING_SHARE = 0.1

# Both paths compute the same numbers up to the order of sums; a missing mask would change them by
# more than a tenth. A GPU packs in half precision, which rounds more coarsely.
_MOST_DIFFERENCE = 1e-3
_MOST_STEPS = 8
text_forward_lock = threading.RLock()
# LLM → whether packing computes the same numbers without and with a kernel; checked before use.
_checked: WeakKeyDictionary[nn.Module, dict[bool, bool]] = WeakKeyDictionary()


def splits_batches(text_model: PreTrainedModel, *, packs_in_training: bool) -> bool:
    """Return whether the CPU splits a batch into packs or token batches.

    During training, passes with and without gradients take the same path, because gradient caching
    runs both, and dropout must sample the same masks in both.
    """
    if is_traced():
        return False
    if not (torch.is_grad_enabled() or text_model.training):
        return True
    return packs_in_training and not recomputes(text_model)


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
    """Encode and pool texts in packs, or in token batches if the LLM cannot run packs.

    Ids are (B, L), padded on either side; the real tokens of a row, 1 in the mask, are contiguous.
    `pool_padded` encodes and pools a right-padded batch (ids, mask), for LLMs that cannot run
    packs. Returns `pooler_output` (B, D) float32; with `keep_tokens` also `last_hidden_state`
    (B, L, D) in the LLM's dtype, zero at padding.
    """
    keep_freed_memory()
    starts = attention_mask.long().argmax(dim=1).tolist()
    lengths = attention_mask.long().sum(dim=1).tolist()
    texts = [
        ids[start : start + length]
        for ids, start, length in zip(input_ids, starts, lengths, strict=True)
    ]
    # A single text gains nothing from packing, so skip the check, which takes five passes.
    packs = len(texts) > 1 and runs_packs(text_model, max(lengths), input_ids.device)
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


def runs_packs(
    text_model: PreTrainedModel,
    longest: int,
    device: torch.device,
    kernel: VarlenKernel | None = None,
) -> bool:
    """Return whether the LLM can run texts of up to `longest` tokens in one pack."""
    config = text_model.config
    # Tokens attend to each other only within a window or chunk of this many tokens.
    spans = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    if any(span and longest > span for span in spans):
        return False
    # Packing may replace only SDPA, the default. PACKED_ATTENTION stays if layers are recomputed.
    if config._attn_implementation not in ("sdpa", PACKED_ATTENTION):
        return False
    checked = _checked.setdefault(text_model, {})
    by_kernel = kernel is not None
    if by_kernel not in checked:
        checked[by_kernel] = can_pack(text_model, device, kernel)
    return checked[by_kernel]


def _pool_pack(
    text_model: PreTrainedModel, texts: list[Tensor], num_unpooled: int, pooling: str
) -> tuple[Tensor, Sequence[Tensor]]:
    """Run and pool one pack; return (B, D) and the hidden states of each text, (L_i, D)."""
    states = run_packed(text_model, texts).split([len(text) for text in texts])
    pool = TEXT_POOLINGS[pooling].packed
    return torch.stack([pool(text[num_unpooled:].float()) for text in states]), states


def _pool_token_batch(
    texts: list[Tensor], pool_padded: Callable[[Tensor, Tensor], BaseModelOutputWithPooling]
) -> tuple[Tensor, Sequence[Tensor]]:
    """Return the same values as `_pool_pack`, but computed with padding."""
    input_ids = nn.utils.rnn.pad_sequence(texts, batch_first=True)
    lengths = torch.tensor([len(text) for text in texts])
    attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    output = pool_padded(input_ids, attention_mask)
    assert output.pooler_output is not None and output.last_hidden_state is not None
    states = zip(output.last_hidden_state, texts, strict=True)
    return output.pooler_output, [padded[: len(text)] for padded, text in states]


def plan_packs(lengths: Sequence[int], *, token_budget: int) -> list[list[int]]:
    """Group texts into packs of up to `token_budget` tokens, longest first, equal lengths adjacent.

    Returns packs as lists of indices into `lengths`. A text longer than the budget gets its own
    pack.
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
    """Group texts of similar length into batches of up to `token_budget` tokens with padding.

    Returns batches as lists of indices into `lengths`, longest texts first. A text longer than the
    budget gets its own batch. Padding is at most a tenth of all tokens; in a single batch, it is at
    most a tenth of the tokens, or 64 tokens if that is more.
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


def run_packed(
    text_model: PreTrainedModel, texts: Sequence[Tensor], kernel: VarlenKernel | None = None
) -> Tensor:
    """Run one pack of texts through the LLM, bidirectional or causal as configured.

    The ids of each text are (L_i,) int64. Without a kernel, texts of equal length should be
    adjacent, because each block of such texts is one attention call. Returns the last hidden
    states, (sum of L_i, D).
    """
    lengths = [len(text) for text in texts]
    first = find_first_position(text_model)
    device = texts[0].device
    position_ids = torch.cat([torch.arange(length, device=device) + first for length in lengths])
    return _run_pack(text_model, torch.cat(list(texts)), position_ids, lengths, kernel)


def run_unpadded(
    text_model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    device: torch.device,
    kernel: VarlenKernel,
) -> Tensor:
    """Run a padded batch through the LLM as one pack, without its padding.

    Ids and mask are (B, L), padded on either side, and on the CPU to avoid synchronizing the
    device. Returns the last hidden states on the device, (B, L, D), zero at padding.
    """
    real = attention_mask.bool()
    lengths = real.sum(dim=1)
    places = real.flatten().nonzero().squeeze(1)
    positions = (real.long().cumsum(dim=1) - 1)[real] + find_first_position(text_model)
    pack = torch.stack([input_ids.flatten()[places], positions, places])
    ids, positions, places = copy_to(pack, device)
    states = _run_pack(text_model, ids, positions, lengths.tolist(), kernel)
    padded = states.new_zeros(real.numel(), states.shape[1])
    return padded.index_copy(0, places.to(states.device), states).view(*real.shape, -1)


def copy_to(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device; from the CPU to a GPU asynchronously."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _run_pack(
    text_model: PreTrainedModel,
    ids: Tensor,
    position_ids: Tensor,
    lengths: list[int],
    kernel: VarlenKernel | None,
) -> Tensor:
    """Run a pack of ids and positions, (T,) each, through the LLM; returns (T, D)."""
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
    longest = max(lengths)
    is_causal = getattr(text_model.config, "is_causal", True)  # the default of transformers' masks
    packed_texts = PackedTexts(cu_seqlens, is_causal)
    mask = None
    if kernel is not None:
        on_device = copy_to(cu_seqlens.int(), ids.device)
        packed_texts = PackedTexts(cu_seqlens, is_causal, kernel, on_device, longest)
        # Without a mask, transformers would inspect the positions to detect packs.
        mask = torch.ones_like(ids).unsqueeze(0)
    with text_forward_lock, packed_attention(text_model, longest):
        output = text_model(
            input_ids=ids.unsqueeze(0),
            attention_mask=mask,
            position_ids=position_ids.unsqueeze(0),
            use_cache=False,
            packed_texts=packed_texts,
        )
    return output.last_hidden_state[0]  # type: ignore[no-any-return]


def find_first_position(text_model: nn.Module) -> int:
    """Return the position of a text's first token: 0, or `padding_idx + 1` in RoBERTa's family."""
    table = getattr(getattr(text_model, "embeddings", None), "position_embeddings", None)
    padding: int | None = getattr(table, "padding_idx", None)
    return 0 if padding is None else padding + 1


@torch.no_grad()  # FSDP reuses weights gathered here in passes with gradients
def can_pack(
    text_model: PreTrainedModel, device: torch.device, kernel: VarlenKernel | None = None
) -> bool:
    """Return whether three short texts get the same hidden states in one pack as separately.

    The states differ if the family drops arguments that packing needs, or if its attention computes
    more than plain scaled dot products. `device` is the device of the inputs, which an offloaded
    model does not report.
    """
    # Skip the first ids: the RoBERTa family treats its padding id as padding even without a mask.
    rows = torch.arange(4, 16, device=device) % text_model.config.vocab_size
    texts = [rows[:5], rows[3:8], rows[8:11]]
    plain = torch.autocast(device.type, enabled=False)
    try:
        # Dropout would make any two passes differ. The model's mode is not changed, because other
        # threads may be using it. Any other randomness fails the check.
        with plain, _WithoutDropout(), text_forward_lock:
            packed = run_packed(text_model, texts, kernel)
            alone = [
                text_model(input_ids=text.unsqueeze(0), use_cache=False).last_hidden_state[0]
                for text in texts
            ]
    except (TypeError, ValueError):  # rejected by forward (argument) or attend_packed (model)
        return False
    expected = torch.cat(alone).float()
    difference = (packed.float() - expected).norm() / expected.norm()
    steps = _MOST_STEPS * torch.finfo(packed.dtype).eps if kernel is not None else 0
    return bool(difference < max(_MOST_DIFFERENCE, steps))


@cache
def keep_freed_memory() -> None:
    """Stop glibc from returning memory to the system after every pass; runs once per process.

    Freeing one block just under 32 MiB raises glibc's thresholds to that size (mallopt(3),
    M_MMAP_THRESHOLD: "dynamic"). Otherwise page faults take a tenth of each pass.
    """
    for _ in range(2):
        torch.empty(31 * 2**18).zero_()


class _WithoutDropout(TorchFunctionMode):
    """Disables dropout only in this thread, whatever the modules' mode."""

    def __torch_function__(
        self, func: Any, _types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.dropout:
            return args[0]
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and "dropout_p" in kwargs:
            kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)
