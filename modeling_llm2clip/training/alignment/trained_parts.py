"""What of the towers is trained, and how fast: LoRA, or everything with slower lower layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...encoding.compilation import find_layers
from ..checkpoints import find_trained
from .align_arguments import AlignArguments
from .alignment_model import AlignmentModel
from .optimization import recompute_activations

_ATTENTION_NAMES = {"attention", "attn", "self_attention", "self_attn"}


def choose_trained_parts(model: AlignmentModel, arguments: AlignArguments) -> dict[str, Any]:
    """Freeze and thaw the model's parts, and put LoRAs into its towers, in place.

    Returns: peft's wrapper of each tower that got a LoRA, by the tower's name; see `merge_loras`.
    Raises: ValueError when the vision tower has no layers that the wish can be met with.
    """
    model.train_heads_only()
    adapted: dict[str, Any] = {}
    if arguments.vision_training == "full":
        model.vision_model.float().requires_grad_(True)
        if arguments.layer_decay < 1:
            find_layers(model.vision_model)
    elif arguments.vision_training == "lora":
        adapted["vision_model"] = _add_lora(
            model.vision_model,
            find_attention_linears(model.vision_model),
            rank=arguments.vision_rank,
            alpha=arguments.vision_alpha,
        )
    if arguments.text_training == "lora":
        adapted["text_model"] = _add_lora(
            model.text_model, "all-linear", rank=arguments.text_rank, alpha=arguments.text_alpha
        )
    model.trains_vision = arguments.vision_training != "frozen"
    model.trains_text = arguments.text_training == "lora"
    if arguments.gradient_checkpointing:
        for tower, trains in (
            (model.vision_model, model.trains_vision),
            (model.text_model, model.trains_text),
        ):
            if trains:
                recompute_activations(tower)
    return adapted


def merge_loras(model: AlignmentModel, adapted: dict[str, Any]) -> dict[str, Tensor]:
    """Merge the LoRAs into their towers, in place.

    Returns: everything that differs from the model's folder now, by its name in the model.
    """
    names = {name for name in find_trained(model) if ".lora_" not in name}
    for tower, wrapper in adapted.items():
        setattr(model, tower, wrapper.merge_and_unload())
        names |= {f"{tower}.{name}" for name in getattr(model, tower).state_dict()}
    return {name: value for name, value in model.state_dict().items() if name in names}


def find_attention_linears(tower: nn.Module) -> list[str]:
    """Names of the linear layers in a vision transformer's attention.

    Raises: ValueError for a tower that has none.
    """
    modules = dict(tower.named_modules())
    # torch's own attention reads the weights itself, so that a layer in their place is not run.
    fused = tuple(f"{n}." for n, m in modules.items() if isinstance(m, nn.MultiheadAttention))
    names = [
        name
        for name, module in modules.items()
        if isinstance(module, nn.Linear)
        and _ATTENTION_NAMES & set(name.split(".")[:-1])
        and not (fused and name.startswith(fused))
    ]
    if not names:
        raise ValueError(
            f"{type(tower).__name__} has no linear layers in an attention, which a LoRA needs. "
            "Choose vision_training 'frozen' or 'full'."
        )
    return names


def scale_by_layer(tower: nn.Module, decay: float) -> dict[str, float]:
    """Factor of the learning rate of each parameter of a tower, by name.

    What stands before the layers (patches, positions) learns slowest, what stands behind them
    at the full rate; of L layers, layer i (from 0) at `decay ** (L - i)`.
    """
    names = [name for name, _ in tower.named_parameters()]
    if decay == 1:
        return dict.fromkeys(names, 1.0)
    prefix, layers = find_layers(tower)
    num_layers = sum(1 for _ in layers.children())
    numbers = {name: number for number, (name, _) in enumerate(layers.named_children())}
    depths, depth = {}, 0
    for name in names:
        if name.startswith(f"{prefix}."):
            depth = numbers[name[len(prefix) + 1 :].split(".")[0]] + 1
        elif depth:  # behind the layers: parameters are listed in the order they were built
            depth = num_layers + 1
        depths[name] = depth
    return {name: decay ** (num_layers + 1 - depth) for name, depth in depths.items()}


def _add_lora(tower: nn.Module, targets: str | list[str], *, rank: int, alpha: int) -> Any:
    from peft import LoraConfig, get_peft_model  # a dependency of few

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
    return get_peft_model(tower, config)
