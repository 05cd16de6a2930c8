"""Base class of all LLM2CLIP models: strict loading, complete saving, initialization.

A saved folder contains its own code and the three JSON files that sentence-transformers reads.
These files refer only to sentence-transformers' own modules, because a custom module would need
`trust_remote_code`.

Uploaded with the weights.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Collection, Mapping
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase
from transformers import initialization as init

from .configuration_llm2clip import HEADS, LLM2CLIPConfig
from .heads_llm2clip import LogitHead, PooledDense, TextAdapter, list_random, sample_heads
from .loading_llm2clip import (
    WEIGHT_FILE,
    bounded_by_weights,
    build_tower,
    list_loaded_files,
    naming_damage,
    naming_fields,
    quantize_llm_only,
    read_file_state,
    refuse_unaccounted_keys,
    remove_old_layout,
    require_own_names,
    require_savable,
)
from .vision_llm2clip import (
    build_vision_tower,
    find_width,
    has_class_token,
    list_towers,
    require_restored_buffers,
)

SETTINGS_FILE = "config_sentence_transformers.json"
_NORMALIZE_FOLDER = "1_Normalize"
_OF_LIBRARY = "sentence_transformers.sentence_transformer.modules"  # since version 5.4
_MODULES = [
    {"idx": number, "name": str(number), "path": path, "type": f"{_OF_LIBRARY}.{kind}"}
    for number, (path, kind) in enumerate((("", "Transformer"), (_NORMALIZE_FOLDER, "Normalize")))
]
_MODALITIES = {
    "text": {"method": "get_text_features", "method_output_name": "pooler_output"},
    "image": {"method": "get_image_features", "method_output_name": "pooler_output"},
}
# sentence-transformers falls back to these for queries and documents.
_NO_INSTRUCTIONS = {"query": "", "document": ""}


def write_sentence_transformers_files(
    folder: Path, *, instructions: Mapping[str, str], modalities: Collection[str]
) -> None:
    """Write `modules.json`, `sentence_bert_config.json`, `config_sentence_transformers.json`.

    `instructions` maps a name to the text that precedes a caption. The instruction's tokens are
    pooled if the prompt prefix is. If `config_sentence_transformers.json` already has these
    instructions, it is not rewritten, because sentence-transformers or a user may have added other
    fields. `modalities` are `"text"`, `"image"`, or both.
    """
    _write(folder / "modules.json", _MODULES)
    _write(
        folder / "sentence_bert_config.json",
        {
            "transformer_task": "feature-extraction",
            "module_output_name": "sentence_embedding",
            "modality_config": {
                name: methods for name, methods in _MODALITIES.items() if name in modalities
            },
            # A max_length here would override the max_seq_length that a user sets.
            "processing_kwargs": {"text": {"truncation": True, "padding": True}},
        },
    )
    if read_instructions(folder) != _without_defaults(instructions):
        _write(
            folder / SETTINGS_FILE,
            {
                "model_type": "SentenceTransformer",
                "prompts": {**_NO_INSTRUCTIONS, **instructions},
                "default_prompt_name": None,
                "similarity_fn_name": "cosine",
            },
        )
    (folder / _NORMALIZE_FOLDER).mkdir(exist_ok=True)


def read_instructions(folder: Path) -> dict[str, str] | None:
    """Read the instructions, name → text, from a folder's `config_sentence_transformers.json`.

    Empty texts for queries and documents are left out. Returns None if there is no such file.
    """
    settings = _read(folder / SETTINGS_FILE)
    return None if settings is None else _without_defaults(settings.get("prompts") or {})


def find_instructions(folder: Path, instructions: Mapping[str, str]) -> dict[str, str]:
    """Choose the instructions to save, name → text: the model's, or newer ones in the folder.

    sentence-transformers writes its configuration, with a user's instructions, just before it saves
    the model to the same folder. So the folder's instructions are newer than the model's if they
    differ from those in the folder's `config.json`, or if there is no `config.json` yet.
    """
    written, config = read_instructions(folder), _read(folder / "config.json")
    if written is None:
        return dict(instructions)
    before = None if config is None else _without_defaults(config.get("instructions") or {})
    return dict(instructions) if written == before else written


def check_instructions(
    tokenizer: PreTrainedTokenizerBase,
    instructions: Mapping[str, str],
    *,
    num_suffix: int,
    max_text_length: int,
) -> None:
    """Check that sentence-transformers counts the tokens of each instruction correctly.

    sentence-transformers tokenizes the instruction by itself and excludes that many tokens from
    pooling. If the caption changes how the instruction is tokenized, the wrong tokens are pooled.
    `num_suffix` is the number of tokens in the prompt's suffix.
    """
    errors = []
    for name, instruction in instructions.items():
        if not isinstance(instruction, str):
            raise ValueError(f"The instruction {name!r} must be a string, not {instruction!r}.")
        if not instruction.strip():
            continue
        ids = tokenizer(instruction, verbose=False)["input_ids"]
        alone = ids[: len(ids) - num_suffix]
        if len(alone) + num_suffix >= max_text_length:
            raise ValueError(
                f"The instruction {name!r} leaves no room for a caption: with the prompt, it takes "
                f"{len(alone) + num_suffix} of {max_text_length} tokens. Shorten it."
            )
        for caption in ("A cat.", "two cats", "7 cats"):
            ids = tokenizer(instruction + caption, verbose=False)["input_ids"]
            with_caption = ids[: len(ids) - num_suffix]
            pooled = str(tokenizer.decode(with_caption[len(alone) :])).strip(" ")
            if with_caption[: len(alone)] != alone or pooled != caption:
                errors.append(f"{name!r}: {instruction!r} before {caption!r} pools {pooled!r}")
                break
    if errors:
        raise ValueError(
            "The tokens of these instructions change when a caption follows: "
            f"{'; '.join(errors)}. End each with ': ' (colon and space)."
        )


def _without_defaults(instructions: Mapping[str, str]) -> dict[str, str]:
    return {name: text for name, text in instructions.items() if text != _NO_INSTRUCTIONS.get(name)}


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}). Restore it, or delete it.") from error
    return content if isinstance(content, dict) else {}


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


_CODE_OF_EVERY_FOLDER = {
    "AutoConfig": "configuration_llm2clip.LLM2CLIPConfig",
    "AutoProcessor": "processing_llm2clip.LLM2CLIPProcessor",
}
# Arguments of `save_pretrained` that are passed on to `push_to_hub`.
_UPLOAD_OPTIONS = (
    "commit_message", "commit_description", "private", "revision", "create_pr", "tags",
)  # fmt: skip


class LLM2CLIPPreTrainedModel(PreTrainedModel):
    """Load, save and initialize: the base of every LLM2CLIP model class."""

    config: LLM2CLIPConfig
    config_class = LLM2CLIPConfig
    base_model_prefix = "llm2clip"
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules: set[str] | list[str] | None = ["AdapterBlock"]  # noqa: RUF012
    _auto_class = "AutoModel"  # makes save_pretrained copy the code
    _auto_classes: dict[str, str] = {}  # noqa: RUF012
    _start: dict[str, Tensor]  # samples of the heads' weights when built or loaded
    num_switches_to_training = 0
    accepts_loss_kwargs = False  # `forward` averages over its batch: Trainer divides the loss
    text_model: Any
    vision_model: Any
    text_adapter: Any
    text_projection: Any
    visual_projection: Any

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, LogitHead):
            module.reset()
        elif isinstance(module, nn.Linear):
            # Keeps the scale of the input, whatever the width.
            init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)  # type: ignore[no-untyped-call]

    @classmethod
    def is_backend_compatible(cls) -> bool:
        """Return False: vLLM would run the LLM causally and pool the wrong tokens."""
        return False

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does, but require every weight to fit.

        transformers would only warn about a missing weight and leave it random.

        Args:
            args: Positional arguments of transformers, starting with the folder or repository.
            kwargs: Keyword arguments of transformers. A bitsandbytes `quantization_config` applies
                only to the LLM; `ignore_mismatched_sizes=True` accepts weights whose shapes differ
                from the model's; `use_kernels=True` runs layers with kernels from the Hub, which is
                otherwise off.

        Returns:
            The model, in evaluation mode; with `output_loading_info=True` a tuple of the model and
            transformers' loading info.

        Raises:
            ValueError: A weight is missing, unexpected or has the wrong shape, a weight file is
                truncated, the folder has both a single weight file and shards, the configuration
                describes a much larger model than the weights, quantization is requested for a
                class without an LLM, or the installed timm cannot load the vision tower.
        """
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = quantize_llm_only(
                kwargs["quantization_config"],
                class_name=cls.__name__,
                has_llm="text" in cls.input_modalities,
            )
        if getattr(kwargs.get("config"), "model_type", None) == LLM2CLIPConfig.model_type:
            # Otherwise, auto classes reuse the class of the first folder with this name.
            module = sys.modules[f"{__name__.rpartition('.')[0]}.modeling_llm2clip"]
            classes = (module.LLM2CLIPModel, module.LLM2CLIPTextModel, module.LLM2CLIPVisionModel)
            AutoModel.register(type(kwargs["config"]), classes, exist_ok=True)
        wants_info = kwargs.pop("output_loading_info", False)
        allow_misshapen = kwargs.pop("ignore_mismatched_sizes", False)
        source = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        # From transformers 5.25 on, the default on a GPU is to download kernels. Embeddings would
        # depend on whether the Hub was reachable.
        use_kernels: bool = kwargs.pop("use_kernels", None) or False
        with (
            naming_damage(source),
            naming_fields(source, sorted(kwargs)),
            bounded_by_weights(lambda: list_loaded_files(source, kwargs)),
        ):
            loaded: Any = super().from_pretrained(
                *args,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                use_kernels=use_kernels,
                **kwargs,
            )
        model, info = loaded
        model._start = sample_heads(model.named_parameters())
        if hasattr(model, "vision_model"):
            for tower in list_towers(model.vision_model):
                require_restored_buffers(tower)
        refuse_unaccounted_keys(cls, info, allow_misshapen=allow_misshapen)
        renewed = {
            *model.config.random_heads,
            *(k[0].split(".")[0] for k in info["mismatched_keys"]),
        }
        model.config.random_heads = [head for head in HEADS if head in renewed]
        quantized: Any = getattr(model.config, "quantization_config", None)
        if getattr(quantized, "load_in_8bit", False) and quantized.llm_int8_threshold > 0:
            warnings.warn(
                f"llm_int8_threshold={quantized.llm_int8_threshold}: bitsandbytes looks for "
                "outliers across the whole batch, so a text's embedding depends on the other "
                "texts. Set it to 0.0 in the BitsAndBytesConfig.",
                stacklevel=2,
            )
        return (model, info) if wants_info else model

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save as transformers does, and add the code and the sentence-transformers files.

        If the processor is saved to the same folder, AutoModel, pipelines and sentence-transformers
        all load the folder and produce the same embeddings. Weights of an earlier save are removed,
        because transformers would leave the old weights next to the new shards and load the old
        weights instead. Warns if the towers differ in dtype, because a loaded model has one dtype.

        Args:
            save_directory: Folder to write. If sentence-transformers or a user has changed the
                instructions in its `config_sentence_transformers.json` since the last save, the
                changed instructions are kept.
            is_main_process: Whether this process writes the files other than the weights.
            state_dict: Weights to save. Default: the model's.
            push_to_hub: Also upload the model once the folder is complete.
            **kwargs: Further arguments of transformers' `save_pretrained` and `push_to_hub`.

        Raises:
            ValueError: The configuration would not load, bitsandbytes quantized the LLM, a LoRA is
                not merged, or the model is without its towers. Nothing is written.
        """
        folder = Path(save_directory)
        self.config.require_loadable()
        require_savable(self)
        towers = {n: m.dtype for n, m in self.named_children() if isinstance(m, PreTrainedModel)}
        if len(set(towers.values())) > 1:
            warnings.warn(
                f"The towers have different dtypes ({towers}), but both will be loaded as "
                f"{self.dtype}, so rounding will change embeddings. Cast the whole model first.",
                stacklevel=2,
            )
        weights = self.named_parameters() if state_dict is None else state_dict.items()
        self.config.random_heads = list_random(
            self.config.random_heads, self._start, sample_heads(weights)
        )
        self.config.auto_map = {**_CODE_OF_EVERY_FOLDER, **self._auto_classes}
        upload = {name: kwargs.pop(name) for name in _UPLOAD_OPTIONS if name in kwargs}
        repo_id = kwargs.pop("repo_id", folder.name)
        instructions = self.config.instructions
        self.config.instructions = find_instructions(folder, instructions)
        old_file = read_file_state(folder / WEIGHT_FILE)
        try:
            super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
            if is_main_process:
                remove_old_layout(folder, old_file)
                require_own_names(folder, [name for name, _ in self.named_children()])
                write_sentence_transformers_files(
                    folder, instructions=self.config.instructions, modalities=self.input_modalities
                )
        finally:
            self.config.instructions = instructions
        if push_to_hub:  # transformers would upload before the folder is complete
            shared = {name: kwargs[name] for name in ("token", "max_shard_size") if name in kwargs}
            self.push_to_hub(repo_id, **upload, **shared)

    def post_init(self) -> None:
        """Finish initialization like transformers, then prune `_no_split_modules`.

        If the heads were initialized instead of loaded, this model's copy of the configuration says
        that they are random, even if the configuration of a trained model was passed.
        """
        super().post_init()  # type: ignore[no-untyped-call]
        self._start = sample_heads(self.named_parameters())
        if any(map(len, self._start.values())):  # a loader builds empty ones
            self.config = copy(self.config)
            self.config.random_heads = [*HEADS]
        self.prune_no_split_modules()

    def prune_no_split_modules(self) -> None:
        """Drop layers from `_no_split_modules` that the model does not have: FSDP rejects them.

        A vision tower's class may also list layers of its text encoder, which is not loaded here.
        """
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = set(self._no_split_modules or ()) & present

    def train(self, mode: bool = True) -> LLM2CLIPPreTrainedModel:
        """Set training or evaluation mode; frozen parts of towers stay in evaluation mode.

        Args:
            mode: True for training mode.

        Returns:
            The model itself.
        """
        super().train(mode)
        if mode:
            for name in ("text_model", "vision_model"):
                if hasattr(self, name):
                    settle_frozen(getattr(self, name))
            # Last, because an encoder in another thread reads the count last and discards its
            # embeddings if it has changed.
            self.num_switches_to_training += 1
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Convert like torch, but keep the frequencies of rotary positions in float32.

        Loading in another dtype also keeps the frequencies in float32, and rounding cannot be
        undone.
        """
        exact = {
            name: buffer
            for name, buffer in self.named_buffers()
            if name.endswith("inv_freq") and buffer.dtype == torch.float32
        }
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in exact.items():
            place, _, own_name = name.rpartition(".")
            module = self.get_submodule(place)
            converted = getattr(module, own_name)
            if converted.dtype != torch.float32:
                setattr(module, own_name, buffer.to(converted.device))
        return self

    def _set_gradient_checkpointing(  # type: ignore[override]
        self, enable: bool = True, **settings: Any
    ) -> None:
        """Switch gradient checkpointing in both towers; transformers' method skips timm networks.

        A frozen tower without support is skipped, because it stores no activations anyway.
        """
        parts = [(n, m) for n, m in self.named_children() if isinstance(m, PreTrainedModel)]
        for name, tower in ((name, tower) for name, part in parts for tower in list_towers(part)):
            try:
                tower._set_gradient_checkpointing(enable, **settings)
            # timm networks without support raise the last two.
            except (ValueError, AssertionError, AttributeError) as error:
                if enable and any(p.requires_grad for p in tower.parameters()):
                    raise ValueError(
                        f"The {tower.config.model_type!r} tower cannot recompute its activations: "
                        f"{error}. Turn gradient checkpointing off, or freeze the tower first "
                        f"(model.{name}.requires_grad_(False))."
                    ) from error
            else:
                if hasattr(tower, "timm_model"):
                    tower.gradient_checkpointing = enable  # read by transformers and peft

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Set the attention implementation as transformers does, also that of joined towers.

        If one of the joined towers has only eager attention (ConvNeXt, ResNet), transformers
        refuses dictionaries unless the whole model is set to eager; then load the model with
        `attn_implementation` instead.

        Args:
            *args: Implementation of both towers, or a dictionary with an implementation for
                `vision_config`, `text_config` or both.
            **kwargs: Further arguments of transformers.
        """
        super().set_attn_implementation(*args, **kwargs)
        if hasattr(getattr(self, "vision_model", None), "towers"):  # no dictionary names them
            self.vision_model.set_attn_implementation(self.vision_model.config._attn_implementation)

    def get_input_embeddings(self) -> nn.Module:
        """Return the LLM's token embeddings, or the patch embeddings of a vision-only model."""
        tower = self.text_model if "text" in self.input_modalities else self.vision_model
        return tower.get_input_embeddings()  # type: ignore[no-any-return]

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the layer that `get_input_embeddings` returns.

        Args:
            value: The new embedding layer.
        """
        tower = self.text_model if "text" in self.input_modalities else self.vision_model
        tower.set_input_embeddings(value)

    def _add_text_tower(self, text_model: PreTrainedModel | None) -> None:
        config = self.config
        width = config.text_width
        self.text_model = text_model or build_tower(config.text_config)
        self.text_model.config = config.text_config  # one object, so changes reach both
        set_attention_direction(self.text_model, bidirectional=config.bidirectional)
        # transformers 5.6 to 5.16 choose SDPA for Gemma 2, which ignores its logit soft-capping.
        caps_scores = getattr(config.text_config, "attn_logit_softcapping", None)
        if caps_scores and config.text_config._attn_implementation == "sdpa":
            self.text_model.set_attn_implementation("eager")
        # Inside the tower, so freezing, replacing or fingerprinting the tower includes it.
        if config.text_dense_width is not None and not hasattr(self.text_model, "pooled_dense"):
            self.text_model.pooled_dense = PooledDense(config.text_dense_width, width)
        self.text_adapter = TextAdapter(
            width,
            num_layers=config.text_adapter_layers,
            expansion=config.text_adapter_expansion,
            normalize=config.normalize_text_before_adapter,
        )
        self.text_projection = nn.Linear(width, config.projection_dim)

    def _add_vision_tower(self, vision_model: PreTrainedModel | None) -> None:
        config = self.config
        self.vision_model = vision_model or build_vision_tower(config.vision_config)
        self.vision_model.config = config.vision_config
        if config.vision_pooling == "cls" and not has_class_token(self.vision_model):
            raise ValueError(
                f"vision_pooling='cls', but this {config.vision_config.model_type!r} tower has no "
                "class token: its first token is a patch. Use 'pooler', 'mean' or 'patch_mean'."
            )
        width = config.vision_width or find_width(self.vision_model)
        if width is None:
            raise ValueError(
                f"This {config.vision_config.model_type!r} tower does not state the width of its "
                "image embedding. Set vision_width in the configuration, or build the model with "
                "join_towers, which measures it."
            )
        self.visual_projection = nn.Linear(
            width, config.projection_dim, bias=config.visual_projection_bias
        )


def set_attention_direction(text_model: PreTrainedModel, *, bidirectional: bool) -> None:
    """Make an LLM's attention bidirectional or causal, in place.

    Sets both the configuration and the modules. If only the configuration were set, families that
    drop attention arguments would stay causal; if only the modules were set, eager attention and
    padded batches would.
    """
    text_model.config.is_causal = not bidirectional
    for module in text_model.modules():
        if hasattr(module, "is_causal"):
            setattr(module, "is_causal", not bidirectional)  # noqa: B010 (mypy: not a Tensor)


def settle_frozen(tower: nn.Module) -> None:
    """Put a frozen tower, or frozen batch norm inside a tower, into evaluation mode.

    In training mode, batch norm updates its running statistics with every batch, even if its
    weights are frozen. Neither an optimizer nor a LoRA saves these statistics, so the updates
    would be lost. Batch norm without weights stays in training mode only if every parameter of the
    tower is trained.
    """
    parameters = list(tower.parameters())
    if not any(p.requires_grad for p in parameters):
        tower.eval()
        return
    trains_all = all(p.requires_grad for p in parameters)
    for module in tower.modules():
        # Not getattr: peft's wrapper exposes the statistics of the layer inside it.
        if any(name == "running_mean" for name, _ in module.named_buffers(recurse=False)):
            weights = list(module.parameters(recurse=False))
            if not (any(p.requires_grad for p in weights) if weights else trains_all):
                module.eval()
