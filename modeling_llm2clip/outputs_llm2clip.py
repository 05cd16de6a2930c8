"""The model's output, with hidden states and attentions of its towers on request.

Uploaded with the weights. Shapes: B images or texts, L tokens, P `projection_dim`.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput

# Arguments of transformers' models, and the fields of an output that they fill.
_STATES = {"output_hidden_states": "hidden_states", "output_attentions": "attentions"}


@dataclass
class LLM2CLIPOutput(ModelOutput):
    """Output of `forward`; a field is None if its input was not given.

    Attributes:
        loss: () float32, with `return_loss=True`.
        logits_per_image: (B images, B texts) float32, cosine times the inverse temperature.
        logits_per_text: (B texts, B images) float32, the transpose.
        text_embeds: (B texts, P) float32, unit length.
        image_embeds: (B images, P) float32, unit length.
        pooler_output: in a call with texts or images alone, their embeddings again.
        text_model_output: output of `get_text_features`, whose features are not normalized.
        vision_model_output: output of `get_image_features`, whose features are not normalized.
    """

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    pooler_output: Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the fields that are not None, with the towers' outputs as tuples, as CLIP does."""
        return tuple(
            value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values()
        )


def find_requested_states(
    config: PreTrainedConfig,
    tower: nn.Module,
    *,
    output_attentions: bool | None,
    output_hidden_states: bool | None,
) -> tuple[str, ...]:
    """Return the names of the arguments that request states from a tower.

    Args:
        config: configuration of the model. It and the tower's own apply where the caller gave None.
        tower: the LLM or the vision tower.
        output_attentions: the caller's argument.
        output_hidden_states: the caller's argument.

    Returns:
        Any of "output_attentions" and "output_hidden_states".

    Raises:
        ValueError: a request selects layers.
    """
    given = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
    requested = []
    for name, value in given.items():
        stated = [getattr(c, name, None) for c in (config, tower.config)]
        values = stated if value is None else [value]
        for one in values:
            # Newer versions of transformers take indices of layers, older ones return all.
            if not (one is None or isinstance(one, bool)):
                raise ValueError(
                    f"{name}={one!r} must be True or False. Request all layers, and select from "
                    f"the {_STATES[name]} that are returned."
                )
        if any(values):
            requested.append(name)
    return tuple(requested)


def name_requests(tower: nn.Module, requested: tuple[str, ...]) -> dict[str, bool]:
    """Return the requests as keyword arguments, if the tower's forward accepts them.

    Args:
        tower: the LLM or the vision tower.
        requested: names of arguments, as `find_requested_states` returns them.
    """
    parameters = inspect.signature(tower.forward).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {name: True for name in requested if takes_any or name in parameters}


def keep_states(
    output: Any, tower: nn.Module, requested: tuple[str, ...], *, pooled: Tensor
) -> BaseModelOutputWithPooling:
    """Return a tower's output with the requested states and the given pooled embedding.

    Args:
        output: what the tower returned.
        tower: the LLM or the vision tower.
        requested: names of arguments, as `find_requested_states` returns them.
        pooled: (B, D) float32, which becomes `pooler_output`.

    Raises:
        ValueError: the tower did not return a requested state, or returned None for some layers.
    """
    states = {}
    for name in requested:
        found = getattr(output, _STATES[name], None)
        if not found or any(state is None for state in found):
            config: Any = tower.config
            raise ValueError(
                f"{name}=True, but this {config.model_type!r} tower does not return its "
                f"{_STATES[name]} with attn_implementation={config._attn_implementation!r}. Load "
                f"the model with attn_implementation='eager', or leave {name} out."
            )
        states[_STATES[name]] = tuple(found)
    return BaseModelOutputWithPooling(
        last_hidden_state=output.last_hidden_state, pooler_output=pooled, **states
    )
