"""A vision tower and an LLM joined in transformers' LLaVA classes, and the trained parts."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from llava_conversations import PLACEHOLDER
from tokenizers import AddedToken
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from visual_tokens import LLAVA_LAYER, VisualTokens, find_visual_tokens

from modeling_llm2clip.building.vision_towers import load_vision_tower

_CHECKED_TEXT = "What does the image show? A red car in front of a house."
_FAMILIES = "Take Llama, Mistral, Qwen2, Qwen3, OLMo 2, or another whose logits are its head's own."
_KEYS_SHOWN = 8


def build_llava(
    tower: str | Path,
    llm: str | Path,
    *,
    layer: int = LLAVA_LAYER,
    chat_template: str | None = None,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Join a tower and an LLM (Hub ids or folders), float32; the projector between is random.

    Args:
        layer: of the tower's hidden states, whose patches the LLM sees.
        chat_template: for a tokenizer that has none, or instead of its own.
    Raises: ValueError when a weight is missing or has no place, the tower has no tokens to give, or
        the LLM is bidirectional, or would be another one inside these classes.
    """
    vision_tower, image_processor, _ = load_vision_tower(tower, allow_missing_pooler=True)
    tokens = find_visual_tokens(vision_tower, image_processor, layer=layer)
    causal_lm, tokenizer = _load_llm(llm)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    image_token_id = _add_image_token(causal_lm, tokenizer)
    config = LlavaConfig(
        vision_config=vision_tower.config,
        text_config=causal_lm.config,
        image_token_index=image_token_id,
        image_seq_length=tokens.num_tokens,
        vision_feature_layer=layer,
        vision_feature_select_strategy=tokens.select_strategy,
    )
    with torch.device("meta"):  # no memory: every part but the projector is at hand
        model = LlavaForConditionalGeneration(config)
    places = model.state_dict().keys()
    model.model.vision_tower = vision_tower
    model.model.language_model = causal_lm.model
    model.lm_head = causal_lm.lm_head
    model.model.multi_modal_projector = type(model.model.multi_modal_projector)(config)
    model.generation_config = causal_lm.generation_config
    _refuse_homeless(llm, model.state_dict().keys() - places)
    _refuse_another_llm(llm, causal_lm, model, tokenizer)
    processor = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=tokens.patch_size,
        vision_feature_select_strategy=tokens.select_strategy,
        chat_template=tokenizer.chat_template,
        image_token=PLACEHOLDER,
        num_additional_image_tokens=tokens.num_prefix_tokens,
    )
    return model, processor


def load_llava(folder: str | Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load the model that a step wrote, in float32.

    Raises: ValueError when a weight is missing, or has no place.
    """
    model, info = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    _require_all_weights(folder, info)
    return model, AutoProcessor.from_pretrained(folder)


def find_tokens_of(model: Any, processor: LlavaProcessor) -> VisualTokens:
    """Compute the image tokens of a LLaVA, or of peft's wrapper around it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return find_visual_tokens(
        base.model.vision_tower, processor.image_processor, layer=base.config.vision_feature_layer
    )


def train_projector_only(model: LlavaForConditionalGeneration) -> None:
    """Freeze the tower and the LLM, in place."""
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    _keep_evaluating(model.model.vision_tower)


def train_projector_and_llm(
    model: LlavaForConditionalGeneration, *, rank: int | None = None, alpha: int = 256
) -> Any:
    """Freeze the tower; train the projector, and the LLM wholly or by a LoRA of this rank.

    Returns: the model, or peft's wrapper around it.
    Raises: ValueError for a rank or alpha below 1.
    """
    require_possible_lora(rank, alpha)
    model.requires_grad_(False)
    wrapped: Any = model
    if rank is None:
        model.model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)
    else:
        from peft import LoraConfig, get_peft_model

        layers = model.model.language_model.named_modules(prefix="model.language_model")
        linear = [name for name, module in layers if isinstance(module, nn.Linear)]
        wrapped = get_peft_model(
            model, LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.05, target_modules=linear)
        )
    model.model.multi_modal_projector.requires_grad_(True)
    _keep_evaluating(model.model.vision_tower)
    return wrapped


def require_possible_lora(rank: int | None, alpha: int) -> None:
    """Raise ValueError unless rank and alpha are at least 1; without a rank there is no LoRA."""
    options = {} if rank is None else {"rank": rank, "alpha": alpha}
    errors = [f"{name}={number}" for name, number in options.items() if number < 1]
    if errors:
        raise ValueError(
            f"A LoRA of {' and '.join(errors)}, wanted at least 1. Set --lora-rank and "
            "--lora-alpha higher, or leave both out to train the whole LLM."
        )


def _keep_evaluating(tower: nn.Module) -> None:
    """However often a Trainer says `train()`, a frozen tower drops nothing out."""

    def evaluate(module: nn.Module, _: Any) -> None:
        module.eval()

    tower.register_forward_pre_hook(evaluate)


def _load_llm(source: str | Path) -> tuple[Any, Any]:
    tokenizer = AutoTokenizer.from_pretrained(source)
    model, info = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, output_loading_info=True
    )
    _require_all_weights(source, info)
    absent = [name for name in ("model", "lm_head") if not hasattr(model, name)]
    if absent:
        raise ValueError(
            f"{source}, of the family {model.config.model_type!r}, has no "
            f"{' and no '.join(absent)} to put into transformers' LLaVA classes. {_FAMILIES}"
        )
    if getattr(model.config, "is_causal", True) is False:
        raise ValueError(
            f"{source} is a bidirectional LLM, an encoder of captions. Give the causal LLM that it "
            "was made from: LLaVA generates text."
        )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model, tokenizer


def _add_image_token(causal_lm: Any, tokenizer: Any) -> int:
    """Give the image a token of its own; returns its id.

    Its embedding is never read, but it is one of the words that the LLM chooses from, so it gets
    the mean of all others instead of a random one.
    """
    tokenizer.add_tokens([AddedToken(PLACEHOLDER, special=True, normalized=False)])
    old = causal_lm.get_input_embeddings().num_embeddings
    if len(tokenizer) > old:
        causal_lm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            for table in (causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()):
                table.weight[old:] = table.weight[:old].mean(dim=0)
    return int(tokenizer.convert_tokens_to_ids(PLACEHOLDER))


def _require_all_weights(source: str | Path, info: dict[str, Any]) -> None:
    if info["missing_keys"]:
        raise ValueError(
            f"{source} lacks {sorted(info['missing_keys'])[:_KEYS_SHOWN]}, which would stay "
            "random. Give the whole model, with the head that predicts tokens."
        )
    _refuse_homeless(source, info["unexpected_keys"])


def _refuse_homeless(source: str | Path, keys: Collection[str]) -> None:
    """Refuse weights that loading would leave behind, such as the bias of a head."""
    if keys:
        raise ValueError(
            f"{source} has {sorted(keys)[:_KEYS_SHOWN]}, for which its class in transformers, or "
            f"LLaVA's, has no place: without them it is another model. {_FAMILIES}"
        )


@torch.inference_mode()
def _refuse_another_llm(
    source: str | Path, causal_lm: Any, model: LlavaForConditionalGeneration, tokenizer: Any
) -> None:
    """Refuse an LLM that does more behind its head, which LLaVA's classes do not know of."""
    ids = tokenizer(_CHECKED_TEXT, return_tensors="pt")["input_ids"]
    expected = causal_lm(input_ids=ids).logits
    joined = model(input_ids=ids).logits
    difference, largest = (expected - joined).abs().max().item(), expected.abs().max().item()
    # The same modules in float32, whose sums may be in another order from call to call.
    if not difference <= 1e-4 * largest:
        raise ValueError(
            f"{source}, of the family {causal_lm.config.model_type!r}, would be another LLM: its "
            f"logits differ by up to {difference:.3g} (the largest is {largest:.3g}) from those "
            "inside transformers' LLaVA classes, which do nothing behind the head, such as scaling "
            f"or capping. {_FAMILIES}"
        )
