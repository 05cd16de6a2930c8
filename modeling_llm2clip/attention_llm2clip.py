"""Attention for packed texts, registered with transformers as another implementation.

The LLM's configuration selects this attention while a pack runs, and each layer receives the texts'
positions as an argument. Without packing, the results are the same as with SDPA.

Uploaded with the weights. Shapes: N is the number of texts, T their total number of tokens, d the
head dimension.
"""

from __future__ import annotations

import inspect
import itertools
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import TransformersKwargs

# The package and its copy from the Hub may both be loaded, so each needs its own names.
_MODULE = re.sub(r"\W", "_", __name__)
PACKED_ATTENTION = f"{_MODULE}_packed"
# torch before 2.7 has only is_compiling, which is also true while compiling without an export.
_KNOWS_EXPORTS = hasattr(torch.compiler, "is_exporting")
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
_NEEDS_MORE = "needs more than packed attention computes."
_pass = threading.local()  # `longest`: tokens of the longest text while this thread runs a pack
_BACKENDS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
)


def is_traced() -> bool:
    """Return whether this call is being traced by a compiler or an export.

    `torch.compiler.is_compiling` is also true in other threads of a process that is compiling.
    """
    return torch.compiler.is_dynamo_compiling() or _is_exporting()


def is_exported() -> bool:
    """Return whether this call is being traced by an export."""
    return _is_exporting() and (_KNOWS_EXPORTS or not torch.compiler.is_dynamo_compiling())


def check_options(tower: PreTrainedModel, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the options to call a tower with, after refusing any that it cannot fulfill.

    Raises TypeError for an unknown option, and ValueError for attention weights that the tower's
    implementation does not compute.
    """
    if options:
        known = (
            # Joined towers have no tokens in common, so they return no hidden states.
            {
                name
                for name in TransformersKwargs.__annotations__
                if options.get(name) is None or options[name] is False  # a tensor has no truth
            }
            if hasattr(tower, "towers")
            else {*inspect.signature(tower.forward).parameters, *TransformersKwargs.__annotations__}
        )
        if unknown := sorted({*options} - known):
            raise TypeError(f"{type(tower).__name__} has no arguments {unknown}. Remove them.")
        if options.get("output_attentions") and tower.config._attn_implementation != "eager":
            raise ValueError(
                f"output_attentions: {type(tower).__name__} uses the attention implementation "
                f"{tower.config._attn_implementation}, which returns no attention weights. Load "
                'the model with attn_implementation="eager".'
            )
    return {} if hasattr(tower, "towers") else options


def copy_details(output: Any, pooled: BaseModelOutputWithPooling) -> BaseModelOutputWithPooling:
    """Copy the hidden states and attentions from a tower's output, if it has any."""
    pooled.hidden_states = getattr(output, "hidden_states", None)
    pooled.attentions = getattr(output, "attentions", None)
    return pooled


class VarlenKernel(NamedTuple):
    """Attention over packed texts on a GPU.

    Attributes:
        attend: Function with the arguments of torch's `varlen_attn`.
        max_head_dim: Maximum head dimension that the kernel supports, also for gradients.
        dtypes: Supported dtypes of queries, keys and values.
    """

    attend: Callable[..., Any]
    max_head_dim: int
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)


@cache
def find_varlen_kernel(device: torch.device) -> VarlenKernel | None:
    """Find torch's attention over packed texts; None if torch or the device lacks it."""
    if device.type != "cuda" or torch.version.hip:
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return choose_kernel(varlen_attn, torch.cuda.get_device_capability(device))


def choose_kernel(attend: Callable[..., Any], capability: tuple[int, int]) -> VarlenKernel | None:
    """Build the kernel for a GPU of a given compute capability; None if it is not supported.

    FlashAttention needs compute capability 8.0, and only data-center GPUs compute gradients of
    head dimensions above 192. None is also returned if torch's function lacks an argument, as in
    older versions.
    """
    parameters = inspect.signature(attend).parameters
    if not {"window_size", "enable_gqa", "num_splits"} <= parameters.keys() or capability < (8, 0):
        return None
    return VarlenKernel(attend, 256 if capability in ((8, 0), (9, 0)) else 192)


def takes_dtype(kernel: VarlenKernel, text_model: PreTrainedModel, device: torch.device) -> bool:
    """Return whether the LLM computes in a dtype that the kernel supports."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type) in kernel.dtypes
    return text_model.dtype in kernel.dtypes


def recomputes(text_model: nn.Module) -> bool:
    """Return whether a backward pass recomputes layers of the LLM."""
    return any(getattr(module, "gradient_checkpointing", False) for module in text_model.modules())


def order_backends(device_type: str, text_model: nn.Module) -> AbstractContextManager[Any]:
    """Return a context in which a GPU prefers FlashAttention for padded texts.

    cuDNN, the default on recent GPUs, builds a new plan for each batch shape. The order is not
    changed if the program has disabled a backend, or if a backward pass recomputes layers, because
    that happens outside the context and must use the same backend.
    """
    cuda = torch.backends.cuda
    if (
        device_type == "cuda"
        and cuda.flash_sdp_enabled()
        and cuda.mem_efficient_sdp_enabled()
        and cuda.cudnn_sdp_enabled()
        and cuda.math_sdp_enabled()
        and not (text_model.training and recomputes(text_model))
    ):
        return sdpa_kernel(list(_BACKENDS), set_priority=True)
    return nullcontext()


@dataclass(frozen=True)
class PackedTexts:
    """Positions of the texts in a pack, and the direction of their attention.

    Attributes:
        cu_seqlens: Start of each text and end of the last one, (N + 1,) int64 on the CPU. This is a
            tensor so that a compiled layer is not recompiled for other lengths.
        is_causal: Whether a token attends only to earlier tokens.
        kernel: Kernel for the attention; None to use SDPA on blocks of texts of equal length.
        on_device: `cu_seqlens` for the kernel, (N + 1,) int32 on the LLM's device.
        longest: Number of tokens in the longest text, for the kernel.
    """

    cu_seqlens: Tensor
    is_causal: bool
    kernel: VarlenKernel | None = None
    on_device: Tensor | None = None
    longest: int = 0


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
    """Attend within each text of a pack; implements transformers' attention interface.

    Queries are (1, heads, T, d), keys and values (1, key heads, T, d); the number of heads is a
    multiple of the number of key heads. Returns (1, T, heads, d), and None in place of attention
    weights. Raises ValueError if the layer needs a mask, soft capping, sinks, a window that a text
    exceeds, or a larger head dimension than the kernel supports. Without `packed_texts`, attends
    like SDPA.
    """
    if packed_texts is None:
        more = {"sliding_window": sliding_window, "softcap": softcap, "s_aux": s_aux, **others}
        plain: tuple[Tensor, None] = ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )
        return plain
    if attention_mask is not None or softcap or s_aux is not None:
        raise ValueError(f"{type(module).__name__} {_NEEDS_MORE}")
    # Under autocast, rotary embeddings leave queries and keys in float32.
    query, key = query.to(value.dtype), key.to(value.dtype)
    kernel, is_causal = packed_texts.kernel, packed_texts.is_causal
    if kernel is not None and not _fits(kernel, query, value):
        raise ValueError(
            f"An attention with head dimensions {query.shape[3]} and {value.shape[3]} {_NEEDS_MORE}"
        )
    if kernel is not None and value.dtype in kernel.dtypes and not dropout:
        return _attend_by_kernel(query, key, value, packed_texts, scaling).unsqueeze(0), None
    # The operator has no gradients, and outside a graph it slows down a single short caption.
    attend = _attend_in_graph if is_traced() and not torch.is_grad_enabled() else _attend
    mixed: Tensor = attend(
        query, key, value, packed_texts.cu_seqlens, is_causal, scaling, dropout, sliding_window
    )
    return mixed.unsqueeze(0), None


def _fits(kernel: VarlenKernel, query: Tensor, value: Tensor) -> bool:
    head_dim = query.shape[3]
    return head_dim == value.shape[3] and head_dim <= kernel.max_head_dim and head_dim % 8 == 0


def _attend_by_kernel(
    query: Tensor, key: Tensor, value: Tensor, packed_texts: PackedTexts, scaling: float | None
) -> Tensor:
    """Attend within each text with the kernel: (1, heads, T, d) to (T, heads, d)."""
    kernel, on_device = packed_texts.kernel, packed_texts.on_device
    assert kernel is not None and on_device is not None
    on_device = on_device.to(query.device)  # layers of one LLM may be on several GPUs
    mixed: Tensor = kernel.attend(
        *(heads[0].transpose(0, 1) for heads in (query, key, value)),
        on_device,
        on_device,
        packed_texts.longest,
        packed_texts.longest,
        scale=scaling,
        window_size=(-1, 0) if packed_texts.is_causal else (-1, -1),
        enable_gqa=key.shape[1] != query.shape[1],
        num_splits=1,  # keeps embeddings independent of the other texts in the batch
    )
    return mixed


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
    """Attend within each text with SDPA: (1, heads, T, d) to (T, heads, d)."""
    mixed = _empty_mixed(query, value)
    start = 0
    for length, equal in itertools.groupby(cu_seqlens.diff().tolist()):
        if sliding_window is not None and length > sliding_window:
            raise ValueError(f"A sliding window of {sliding_window} tokens {_NEEDS_MORE}")
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


# As a custom operator, it lets a layer compile into a single graph for all lengths.
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


def _split(heads: Tensor, count: int, length: int) -> Tensor:
    """Split heads by text: (heads, count * length, d) to (count, heads, length, d)."""
    return heads.view(heads.shape[0], count, length, -1).transpose(0, 1)


@contextmanager
def packed_attention(text_model: PreTrainedModel, longest: int) -> Iterator[None]:
    """Make this thread's forward pass attend only within each text, without a mask.

    Afterwards, the LLM's configuration is restored, unless a backward pass will recompute layers,
    which must use the same attention as in the forward pass.
    """
    config = text_model.config
    before = config._attn_implementation
    config._attn_implementation = PACKED_ATTENTION
    _pass.longest = longest
    try:
        yield
    finally:
        _pass.longest = 0
        if not (torch.is_grad_enabled() and text_model.training and recomputes(text_model)):
            config._attn_implementation = before


def _build_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Build the same mask as SDPA; return None for a pack, which needs no mask."""
    longest = 0 if is_traced() else getattr(_pass, "longest", 0)
    if longest:
        span = kwargs.get("local_size")  # size of a window or chunk
        if span is not None and longest > span:
            raise ValueError(f"An attention window or chunk of {span} tokens {_NEEDS_MORE}")
        return None
    mask: Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)
    return mask


# A pass without packing gets the same results as from SDPA, so other threads may run meanwhile.
AttentionInterface.register(PACKED_ATTENTION, attend_packed)
AttentionMaskInterface.register(PACKED_ATTENTION, _build_mask)
