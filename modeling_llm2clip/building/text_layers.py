"""Keeps the first layers of an LLM and its final norm, without the layers above.

A tower of N layers gives the output of layer N of the whole LLM after its final norm, bit for bit,
as transformers computes for a configuration of N layers. That is measured.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..loading_llm2clip import build_tower
from .tower_checks import MODEL_ERRORS, list_layers, make_texts, run_texts, take_hidden

KEEP_ALL = "Leave text_layers out to keep all, or take another LLM."
# transformers' field of what single layers have other than the rest, by number.
_OVERRIDES = "per_layer_config"


def cut_layers(text_model: PreTrainedModel, num_layers: int) -> None:
    """Remove the layers above the first ones from a loaded LLM, in place."""
    uncut, layers = copy.deepcopy(text_model.config), list_layers(text_model)
    cut_config(text_model.config, num_layers, "The LLM")
    del layers[num_layers:]
    for config in (uncut, text_model.config):  # what it was, and what a saved one loads as
        require_same_states(text_model, config, "The LLM")


def cut_config(config: PreTrainedConfig, num_layers: int, source: str | Path) -> None:
    """Make a configuration one of the first layers, in place: their number, and lists of layers."""
    total = getattr(config, "num_hidden_layers", 0)
    if num_layers > total:
        raise ValueError(
            f"{source} has {total} layers, so it cannot keep {num_layers}. Set text_layers to at "
            f"most {total}, or leave it out to keep all."
        )
    stated = config.to_dict()
    lists = [n for n, v in stated.items() if isinstance(v, list) and len(v) == total]
    lists = [name for name in lists if not name.endswith("_token_id")]
    for name in lists:
        setattr(config, name, stated[name][:num_layers])
    config.num_hidden_layers = num_layers
    if overrides := stated.get(_OVERRIDES):
        kept = {number: value for number, value in overrides.items() if int(number) < num_layers}
        setattr(config, _OVERRIDES, kept)
    loaded = type(config).from_dict(config.to_dict())
    for name in lists:  # some families want the last layer to be of one type
        setattr(config, name, getattr(loaded, name))


@torch.no_grad()
def require_same_states(
    text_model: PreTrainedModel, config: PreTrainedConfig, source: str | Path
) -> None:
    """Refuse an LLM with few layers that gives other states than the one with all of them.

    The same weights run in both: in an LLM that was built with few layers, and in one that was
    built with all of `config`, which are then removed. They differ where layers depend on how many
    there are, as those that share keys and values do. The upper layers take no memory.
    """
    num_layers = text_model.config.num_hidden_layers
    reason = "the states of its layers depend on how many layers there are"
    try:
        other = _build_on(text_model, config)
        ids, _ = make_texts(text_model)
        found, wanted = run_texts(text_model, ids), run_texts(other, ids)
    except MODEL_ERRORS as error:
        reason = " ".join(str(error).split()).rstrip(". ")
    else:
        if torch.equal(found, wanted):
            return
    raise ValueError(f"{source} cannot be cut to {num_layers} layers: {reason}. {KEEP_ALL}")


def _build_on(text_model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """Build the LLM of a configuration on the weights of one with fewer layers."""
    config = copy.deepcopy(config)
    config._attn_implementation = text_model.config._attn_implementation
    with init_empty_weights(include_buffers=False):
        other = build_tower(config)
    del list_layers(other)[text_model.config.num_hidden_layers :]
    other.load_state_dict(text_model.state_dict(), assign=True)
    same = dict(text_model.named_buffers())
    for name, buffer in list(other.named_buffers()):  # those that are not saved, too
        place, _, own_name = name.rpartition(".")
        buffer = same.get(name, buffer).to(text_model.device)
        setattr(other.get_submodule(place), own_name, buffer)
    return other.eval()  # type: ignore[no-any-return]


@contextmanager
def all_layers(text_model: PreTrainedModel) -> Iterator[int]:
    """Let an LLM return what a tower of one layer, two, and so on to all layers would return.

    The states are side by side, (B, L, layers * D). Yields the number of layers.
    """
    layers, states, after = list_layers(text_model), list[Tensor](), list[nn.Module]()
    inside = set(layers.modules())

    def see(module: nn.Module, _inputs: Any, output: Any) -> None:
        if module in inside:
            states.append(take_hidden(output))
            after.clear()
        else:
            after.append(module)

    def join(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        norm = after[-1] if after else nn.Identity()
        normed = [norm(state) for state in states]
        if not normed or not torch.equal(normed[-1], output.last_hidden_state):
            raise ValueError(
                f"The {text_model.config.model_type!r} family computes more than a norm after its "
                "layers, so one pass cannot compare them. Build a model for each number of layers "
                "(llm2clip build --text-layers), and evaluate them (--tasks cra)."
            )
        output.last_hidden_state = torch.cat(normed, dim=-1)
        return output

    leaves = (m for m in text_model.modules() if m not in inside and not any(m.children()))
    handles = [module.register_forward_hook(see) for module in (*layers, *leaves)]
    handles.append(text_model.register_forward_pre_hook(lambda *_: states.clear()))
    handles.append(text_model.register_forward_hook(join))
    try:
        yield len(layers)
    finally:
        for handle in handles:
            handle.remove()
