"""Configuration of an LLM2CLIP model: everything that affects embeddings, and what was trained.

Uploaded with the weights.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache, partial
from inspect import signature
from numbers import Integral, Real
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .pooling_llm2clip import TEXT_POOLINGS

# Entry i migrates the content of a config.json from format i + 1 to i + 2. A new format needs its
# migration here, so every published format stays loadable.
_MIGRATIONS: tuple[Callable[[dict[str, Any]], dict[str, Any]], ...] = (
    dict,  # format 2 may have several vision towers; all else is as in format 1
)
FORMAT_VERSION = 1 + len(_MIGRATIONS)
_ONE_TOWER_FORMAT = 1  # still written for one vision tower, so that older versions load it
LOGIT_SCALE_INIT = math.log(1 / 0.07)  # arXiv:2103.00020, section 2.5
HEADS = ("text_adapter", "text_projection", "visual_projection")
VISION_POOLINGS = ("pooler", "cls", "mean", "patch_mean")

# Fields that other libraries read from or write to a config.json; others cause a warning. Before
# transformers 5.17, Trainer writes the tokenizer's three token ids. They are kept but have no
# effect, because the model reads the LLM's ids.
_BASE_FIELDS = {
    "bos_token_id", "eos_token_id", "pad_token_id",
    "auto_map", "model_type", "torch_dtype", "attn_implementation", "experts_implementation",
    "name_or_path", "num_labels", "quantization_config", "use_cache", "tie_word_embeddings",
    "label2id", "id2label", "transformers.js_config",
    "hidden_size", "max_position_embeddings", "num_hidden_layers",  # of an ONNX export, for TEI
}  # fmt: skip


class UpgradeRequiredError(ValueError):
    """A config.json needs a newer version of this package or of transformers."""


class JoinedVisionConfig(PreTrainedConfig):
    """Configuration of several vision towers that are used as one.

    All towers see the same pixels, prepared for the largest image size. A tower's own pixels are
    these, resized to its size, times its scales plus its shifts.

    Args:
        towers: Configurations of the towers, as objects or dictionaries with `model_type`.
        image_sizes: Side of each tower's square images, in pixels.
        pixel_scales: For each tower, one factor per color channel.
        pixel_shifts: For each tower, one summand per color channel.
        **kwargs: Fields that every transformers configuration has, and `architecture`, which
            names the towers.
    """

    model_type = "llm2clip_joined_vision"
    has_no_defaults_at_init = True

    def __init__(
        self,
        towers: Sequence[PreTrainedConfig | dict[str, Any]],
        image_sizes: Sequence[int],
        pixel_scales: Sequence[Sequence[float]],
        pixel_shifts: Sequence[Sequence[float]],
        **kwargs: Any,
    ) -> None:
        _check_unknown_fields(kwargs, "JoinedVisionConfig", {"architecture", "image_size"})
        for name, values, expected, fits in (
            ("towers", towers, "a configuration", bool),
            ("image_sizes", image_sizes, *_POSITIVE),
            ("pixel_scales", pixel_scales, *_COLOR),
            ("pixel_shifts", pixel_shifts, *_COLOR),
        ):
            if not (
                isinstance(values, list | tuple)
                and len(values) == len(towers) > 0
                and all(map(fits, values))
            ):
                raise ValueError(
                    f"vision_config.{name} must be a list with {expected} for each of the towers, "
                    f"not {values!r}. Restore config.json from the original model folder."
                )
        super().__init__(**{**kwargs, "image_size": max(image_sizes)})
        self.towers = [_tower_config(tower, name="vision_config.towers") for tower in towers]
        self.image_sizes, self.pixel_scales = list(image_sizes), list(pixel_scales)
        self.pixel_shifts = list(pixel_shifts)

    def __setattr__(self, key: str, value: Any) -> None:
        """Set a field; attention implementation and dtype apply to every tower."""
        super().__setattr__(key, value)  # type: ignore[no-untyped-call]
        if key in ("_attn_implementation", "dtype"):
            for tower in getattr(self, "towers", ()):  # none while the base is initialized
                setattr(tower, key, value)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `config.json`, with a dictionary for each tower."""
        contents = [tower.to_dict() for tower in self.towers]
        version = "transformers_version"  # not repeated, as in other nested configurations
        towers = [{k: v for k, v in each.items() if k != version} for each in contents]
        return {**super().to_dict(), "towers": towers}


class LLM2CLIPConfig(PreTrainedConfig):
    """Configuration of an LLM2CLIP model (arXiv:2411.04997, section 3).

    Args:
        vision_config: Configuration of the vision tower, as an object or as the dictionary in
            `config.json`; a dictionary needs its `model_type`. That of several towers is a
            `JoinedVisionConfig`.
        text_config: Configuration of the LLM, as an object or a dictionary.
        projection_dim: Width of the space that images and texts share.
        vision_width: Width of the vision tower's pooled output; None if the tower's own
            configuration states it.
        text_width: Width of the caption embeddings; None means the LLM's `hidden_size`. Some LLMs
            (EmbeddingGemma 2) project their hidden states to another width.
        text_dense_width: Width of the pooled hidden states if a linear layer maps them to
            `text_width`, as an embedder's Dense modules do; None if there is no such layer.
        bidirectional: Whether every caption token attends to every other token. The opposite is
            written to `text_config.is_causal`, which transformers' attention reads.
        text_pooling: `"mean"` or `"last_token"` of the tokens after the prompt's prefix. For
            embedders that also pool the prefix: the first token (`"cls"`), the mean of all tokens
            (`"full_mean"`), or the mean weighted by position (`"weighted_mean"`).
        prompt_prefix_ids: Token ids before every caption. The prefix is attended to, but pooled
            only by `"cls"`, `"full_mean"` and `"weighted_mean"`.
        prompt_suffix_ids: Token ids after every caption; attended to and pooled.
        prompt_suffix_ends_special: Whether the last suffix id is a special token of the
            tokenizer. sentence-transformers does not count such a token in a prompt's length.
        max_text_length: Maximum number of tokens per text, prompt included.
        instructions: Name → text that sentence-transformers prepends to a caption on request
            (`prompt_name`). Instructions are pooled if the prompt prefix is.
        normalize_text_before_adapter: Whether caption embeddings are normalized before the
            adapter. True for most official models, False for models trained with the LLM in the
            loop.
        text_adapter_layers: Number of residual blocks in the text adapter; None for no adapter at
            all, not even its LayerNorm.
        text_adapter_expansion: Width of a block's inner layer, as a multiple of the LLM's width.
        vision_pooling: How an image is pooled: the tower's own `"pooler"` output, its `"cls"`
            token, the `"mean"` of all its tokens (including class token and registers), or the
            `"patch_mean"` of only its patches.
        visual_projection_bias: Whether the image projection has a bias.
        logit_scale_init_value: Logarithm of the initial inverse temperature.
        random_heads: Which of `text_adapter`, `text_projection` and `visual_projection` still have
            their random initial weights. A model's `save_pretrained` removes from this list every
            head whose weights have changed since the model was built or loaded, no matter what
            trained them.
        format_version: Version of the layout of weights and configuration. Older versions are
            migrated on loading, and the oldest version that can describe the model is kept.
        **kwargs: Fields that every transformers configuration has. Unknown fields cause a warning,
            but are kept in the saved file.

    Raises:
        ValueError: A field name is misspelled; a field is missing from a saved file, has the wrong
            type or contradicts another field; or the format is newer than this package's.
    """

    model_type = "llm2clip"
    _auto_class = "AutoConfig"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}  # noqa: RUF012
    has_no_defaults_at_init = True
    # Otherwise, Trainer gathers the towers' states over the entire dataset.
    keys_to_ignore_at_inference = ["text_model_output", "vision_model_output"]  # noqa: RUF012

    def __init__(
        self,
        vision_config: PreTrainedConfig | dict[str, Any] | None = None,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        *,
        projection_dim: int = 512,
        vision_width: int | None = None,
        text_width: int | None = None,
        text_dense_width: int | None = None,
        bidirectional: bool = True,
        text_pooling: str = "mean",
        prompt_prefix_ids: Sequence[int] = (),
        prompt_suffix_ids: Sequence[int] = (),
        prompt_suffix_ends_special: bool = False,
        max_text_length: int = 512,
        instructions: Mapping[str, str] | None = None,
        normalize_text_before_adapter: bool = True,
        text_adapter_layers: int | None = 4,
        text_adapter_expansion: int = 2,
        vision_pooling: str = "pooler",
        visual_projection_bias: bool = False,
        logit_scale_init_value: float = LOGIT_SCALE_INIT,
        random_heads: Sequence[str] = HEADS,
        format_version: int = FORMAT_VERSION,
        **kwargs: Any,
    ) -> None:
        _check_unknown_fields(kwargs, "LLM2CLIPConfig", {*_SAVED_FIELDS, *_TYPES})
        _check_types(locals())
        # The base class sets the attention implementation of any tower that is already assigned.
        # So it is initialized before the towers, and a requested implementation is set afterward.
        attn_implementation = kwargs.pop("attn_implementation", None)
        super().__init__(**kwargs)
        # AutoModel chooses the class by this field and fails if it is None.
        self.architectures = self.architectures or ["LLM2CLIPModel"]
        self.vision_config = _tower_config(vision_config, name="vision_config")
        self.text_config = _tower_config(text_config, name="text_config")
        self.projection_dim = projection_dim
        self.vision_width = vision_width
        self.text_width = self.text_config.hidden_size if text_width is None else text_width
        self.text_dense_width = text_dense_width
        self.bidirectional, self.text_pooling = bidirectional, text_pooling
        self.prompt_prefix_ids = [int(i) for i in prompt_prefix_ids]
        self.prompt_suffix_ids = [int(i) for i in prompt_suffix_ids]
        self.prompt_suffix_ends_special = prompt_suffix_ends_special
        self.max_text_length = max_text_length
        self.instructions = dict(instructions or {})
        self.normalize_text_before_adapter = normalize_text_before_adapter
        self.text_adapter_layers = text_adapter_layers
        self.text_adapter_expansion = text_adapter_expansion
        self.vision_pooling, self.visual_projection_bias = vision_pooling, visual_projection_bias
        self.logit_scale_init_value = logit_scale_init_value
        self.random_heads = [*random_heads]
        self.format_version = (
            FORMAT_VERSION if hasattr(self.vision_config, "towers") else _ONE_TOWER_FORMAT
        )
        _write_attention_direction(self.text_config, bidirectional=bidirectional)
        self._check_values()
        if attn_implementation is not None:
            self._attn_implementation = attn_implementation

    def __setattr__(self, key: str, value: Any) -> None:
        """Set a field; refuse requests for hidden states, which belong in a call of the model."""
        if value and key.lstrip("_") in ("output_hidden_states", "output_attentions"):
            raise ValueError(
                f"{key.lstrip('_')}={value!r} in the configuration has no effect on the towers. "
                f"Pass {key.lstrip('_')}=True when you call the model instead."
            )
        super().__setattr__(key, value)  # type: ignore[no-untyped-call]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> Any:
        """Load as transformers does, but name the source in every error about its fields.

        Args:
            pretrained_model_name_or_path: Folder or Hub repository.
            **kwargs: Further arguments of transformers.

        Returns:
            As `from_dict`.

        Raises:
            ValueError: For the same reasons as in `from_dict`, or the file is not JSON or is nested
                too deeply.
        """
        source = pretrained_model_name_or_path
        try:
            return super().from_pretrained(source, **kwargs)
        except (OSError, ImportError, MemoryError):  # these name the cause
            raise
        except Exception as error:  # a tower's configuration may raise any class
            if isinstance(error, ValueError) and str(source) in str(error):
                raise
            is_newer = isinstance(error, UpgradeRequiredError)
            raise ValueError(
                f"{source}: config.json cannot be used ({type(error).__name__}: "
                f"{' '.join(str(error).split())})."
                f"{'' if is_newer else ' Restore it from the original model folder.'}"
            ) from error

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> LLM2CLIPConfig:
        """Build from the content of a saved `config.json`, which must have every field.

        Missing fields get no defaults, because a default could change the embeddings.

        Args:
            config_dict: Content of `config.json`.
            kwargs: Fields to override, and options of transformers.

        Returns:
            The configuration; with `return_unused_kwargs=True`, a tuple of the configuration and
            the unused options.

        Raises:
            ValueError: A field is missing or invalid, or the format is newer than this package's.
        """
        config_dict = _migrate(config_dict)
        lost = sorted(_SAVED_FIELDS - set(config_dict))
        if isinstance(config_dict.get("text_config"), dict):
            lost += [f"text_config.{name}" for name in _list_lost(config_dict["text_config"])]
        if lost:
            raise ValueError(
                f"config.json lacks {lost}. They have no defaults, because each affects the "
                "embeddings or records what was trained. Restore them from the original model "
                "folder, or rebuild the model."
            )
        loaded: Any = super().from_dict(config_dict, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded  # with unused options
        # transformers sets overridden fields after the checks of `__init__`.
        _check_types(vars(config))
        config._check_values()
        config.text_config.is_causal = not config.bidirectional
        return loaded  # type: ignore[no-any-return]

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Save as transformers does, but only if the file will load again.

        Args:
            save_directory: Folder to write.
            push_to_hub: Also upload the file.
            **kwargs: Further arguments of transformers.

        Raises:
            ValueError: The file would not load, for example because of a field that another
                library set. Nothing is written.
        """
        self.require_loadable()
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @property
    def pools_prompt(self) -> bool:
        """True if the prompt's prefix and instructions are also pooled."""
        return TEXT_POOLINGS[self.text_pooling].pools_prompt

    @property
    def num_unpooled(self) -> int:
        """Number of tokens at the start of each text that are not pooled."""
        return 0 if self.pools_prompt else len(self.prompt_prefix_ids)

    @property
    def projections_trained(self) -> bool:
        """True if no projection still has its random initial weights."""
        return not any("projection" in head for head in self.random_heads)

    def require_loadable(self) -> None:
        """Check that the saved configuration would load again, before anything is written.

        Raises:
            ValueError: The file would not load.
        """
        try:
            self.from_dict(parse_config(self.to_json_string()))
        except (ValueError, TypeError) as error:
            reason = f"JSON cannot store it: {error}" if isinstance(error, TypeError) else error
            raise ValueError(
                f"The configuration was not saved, because it would not load again. {reason}"
            ) from error

    def _check_values(self) -> None:
        errors = [
            f"{name}={getattr(self, name)!r} must be at least {least}"
            for name, least in _LEAST_VALUES.items()
            if (value := getattr(self, name)) is not None and value < least
        ]
        if self.max_text_length > _MOST_TOKENS:
            errors.append(f"max_text_length={self.max_text_length} must be at most {_MOST_TOKENS}")
        if self.text_pooling not in [*TEXT_POOLINGS]:  # a list, for values that cannot be hashed
            errors.append(f"text_pooling={self.text_pooling!r} must be one of {[*TEXT_POOLINGS]}")
        if self.vision_pooling not in VISION_POOLINGS:
            errors.append(
                f"vision_pooling={self.vision_pooling!r} must be one of {VISION_POOLINGS}"
            )
        prompt_length = len(self.prompt_prefix_ids) + len(self.prompt_suffix_ids)
        if self.max_text_length <= prompt_length:
            errors.append(
                f"max_text_length={self.max_text_length} leaves no room for a caption: "
                f"the prompt alone has {prompt_length} tokens"
            )
        if errors:
            raise ValueError("LLM2CLIPConfig: " + "; ".join(errors))


def parse_config(text: str) -> dict[str, Any]:
    """Parse the text of a `config.json`; transformers writes infinity there as an object."""
    parsed: dict[str, Any] = json.loads(
        text, object_hook=lambda entry: float(entry["__float__"]) if "__float__" in entry else entry
    )
    return parsed


# A configuration allocates a list entry per layer and a dictionary entry per label before anything
# is compared with the weights. ImageNet-21k has 21,841 labels, and the deepest LLMs have a few
# hundred layers. Vocabulary sizes and rotary bases are exempt: they allocate no entries.
_MOST_COUNTED = 100_000
_COUNTED = re.compile("^(?!vocab|.*theta).*(layer|depth|block|stage|head|expert|label|class)")
_MOST_TOKENS = 1 << 20  # per text; some checks create texts of this length
_LEAST_VALUES = {
    "projection_dim": 1, "vision_width": 1, "text_width": 1, "text_adapter_layers": 0,
    "text_adapter_expansion": 1,
}  # fmt: skip
# Fields in which transformers has stored rotary positions; the first is the current one.
_ROTARY = {"rope_parameters", "rope_theta", "rope_scaling"}
_SAVED_FIELDS = {
    "vision_config", "text_config", "projection_dim", "text_width", "bidirectional", "text_pooling",
    "prompt_prefix_ids", "prompt_suffix_ids", "prompt_suffix_ends_special", "max_text_length",
    "instructions", "normalize_text_before_adapter", "text_adapter_layers",
    "text_adapter_expansion", "vision_pooling", "visual_projection_bias", "logit_scale_init_value",
    "random_heads", "format_version",
}  # fmt: skip


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


# Types are never converted: in Python, "false" is truthy and "32" sorts before "4".
_INTEGER = ("an integer", _is_integer)
_POSITIVE = ("a positive integer", lambda value: _is_integer(value) and value > 0)
_OPTIONAL = ("an integer or None", lambda value: value is None or _is_integer(value))
_COLOR = (
    "three numbers",
    lambda values: (
        isinstance(values, list | tuple) and len(values) == 3 and all(map(_is_number, values))
    ),
)
_BOOLEAN = ("true or false", lambda value: isinstance(value, bool))
_IDS = (
    "a list of token ids",
    lambda ids: isinstance(ids, list | tuple) and all(_is_integer(i) and i >= 0 for i in ids),
)
_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "projection_dim": _INTEGER,
    "vision_width": _OPTIONAL,
    "text_width": _OPTIONAL,
    "text_dense_width": _OPTIONAL,
    "bidirectional": _BOOLEAN,
    "prompt_prefix_ids": _IDS,
    "prompt_suffix_ids": _IDS,
    "prompt_suffix_ends_special": _BOOLEAN,
    "max_text_length": _INTEGER,
    "instructions": (
        "a dictionary of strings, none of them only whitespace",
        lambda texts: (
            texts is None
            or (
                isinstance(texts, Mapping)
                and all(
                    isinstance(p, str) and (p.strip() or not p) for p in (*texts, *texts.values())
                )
            )
        ),
    ),
    "normalize_text_before_adapter": _BOOLEAN,
    "text_adapter_layers": _OPTIONAL,
    "text_adapter_expansion": _INTEGER,
    "visual_projection_bias": _BOOLEAN,
    "logit_scale_init_value": ("a finite number", _is_number),
    "random_heads": (
        f"a list with items from {HEADS}",
        lambda heads: isinstance(heads, list | tuple) and all(head in HEADS for head in heads),
    ),
    "format_version": (
        f"an integer from 1 to {FORMAT_VERSION}, the current format",
        lambda value: _is_integer(value) and 1 <= value <= FORMAT_VERSION,
    ),
}


def _check_types(values: Mapping[str, Any]) -> None:
    errors = [
        f"{name}={values[name]!r} must be {expected}"
        for name, (expected, fits) in _TYPES.items()
        if not fits(values[name])
    ]
    if errors:
        raise ValueError("LLM2CLIPConfig: " + "; ".join(errors))


def _migrate(content: dict[str, Any]) -> dict[str, Any]:
    """Migrate the content of a `config.json` from any published format to the current one."""
    version: Any = content.get("format_version")
    problem = f"format_version={version!r}, but this version reads formats 1 to {FORMAT_VERSION}."
    if not _is_integer(version) or version < 1:
        raise ValueError(f"{problem} Restore config.json from the original model folder.")
    if version > FORMAT_VERSION:
        raise UpgradeRequiredError(
            f"{problem} Upgrade modeling_llm2clip: if installed, it is used even if the model "
            "folder has newer code."
        )
    for migrate in _MIGRATIONS[version - 1 :]:
        content = migrate(content)
    return {**content, "format_version": FORMAT_VERSION}


_warn_once = cache(partial(warnings.warn, stacklevel=3))


def _check_unknown_fields(kwargs: dict[str, Any], owner: str, own_fields: set[str]) -> None:
    """Refuse misspelled fields; warn once about other unknown fields."""
    known = _BASE_FIELDS | own_fields | set(PreTrainedConfig().to_dict())
    unknown = sorted(key for key in kwargs if key not in known and not key.startswith("_"))
    near = {field: get_close_matches(field, own_fields, 1, 0.85) for field in unknown}
    if misspelled := [f"{field!r} for {like[0]!r}" for field, like in near.items() if like]:
        raise ValueError(
            f"{owner}: these fields look misspelled: {', '.join(misspelled)}. Correct or "
            "rename them."
        )
    if "transformers_weights" in unknown:
        raise ValueError(
            "transformers_weights would load a different weight file than the one that is checked "
            "and fingerprinted. Remove it from config.json."
        )
    if unknown:
        _warn_once(
            f"{owner} has no fields {unknown}. The model ignores them, but they are kept in "
            "the saved config.json."
        )
    _refuse_large_counts(kwargs, name="config.json")


def _refuse_large_counts(content: Any, *, name: str) -> None:
    """Refuse absurd numbers of layers, labels and the like, at any depth."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            _refuse_large_counts(value, name=f"{name}: {key}")
    elif isinstance(content, list | tuple):
        for value in content:
            _refuse_large_counts(value, name=name)
    elif _is_number(content) and content > _MOST_COUNTED and _COUNTED.search(name.split(": ")[-1]):
        raise ValueError(
            f"{name} must be at most {_MOST_COUNTED}, not {content}. Restore it from the original "
            "model folder."
        )


def _tower_config(
    config: PreTrainedConfig | dict[str, Any] | None, *, name: str
) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        return _state_image_size(config)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(
            f"{name} must be a transformers configuration or a dictionary with 'model_type'; "
            f"got {config!r}."
        )
    if config["model_type"] == JoinedVisionConfig.model_type and name == "vision_config":
        return JoinedVisionConfig.from_dict(config)
    if config["model_type"] not in CONFIG_MAPPING:
        raise UpgradeRequiredError(
            f"{name} has model_type={config['model_type']!r}, which this version of "
            "transformers does not know. Upgrade transformers, or choose another tower."
        )
    _refuse_large_counts(config, name=name)
    tower_class = CONFIG_MAPPING[config["model_type"]]
    _warn_of_misspelled_fields(config, tower_class, name=name)
    return _state_image_size(tower_class.from_dict(config))


def _list_lost(text_config: dict[str, Any]) -> list[str]:
    """List an LLM's missing fields whose defaults could differ from the saved model's values."""
    lost = [] if "is_causal" in text_config else ["is_causal"]
    model_type = str(text_config.get("model_type"))
    if model_type in CONFIG_MAPPING and not _ROTARY & set(text_config):
        has_rotary = "rope_parameters" in signature(CONFIG_MAPPING[model_type]).parameters
        lost += ["rope_parameters"] if has_rotary else []
    return lost


def _state_image_size(config: PreTrainedConfig) -> PreTrainedConfig:
    """Set `image_size` in a timm tower's configuration; other towers' configurations have it.

    Scripts written for CLIP read `image_size`. timm stores the size in the network's arguments or
    in its pretrained configuration. A square becomes one number, anything else (height, width).
    """
    if config.model_type == "timm_wrapper":
        stated = (getattr(config, "model_args", None) or {}).get("img_size")
        trained = (getattr(config, "pretrained_cfg", None) or {}).get("input_size")
        size = stated or (trained and trained[-2:])
        if size:
            sides = [size] if isinstance(size, int) else [int(side) for side in size]
            config.image_size = sides[0] if len(set(sides)) == 1 else sides
    return config


def _warn_of_misspelled_fields(config: dict[str, Any], tower_class: Any, *, name: str) -> None:
    """Warn about an unknown field if a known field with nearly the same name is missing.

    Other unknown fields are accepted, because published towers have extra fields. This is only a
    warning, because a later transformers may rename a field and still read its old name.
    """
    known = {field for field in signature(tower_class).parameters if not field.startswith("_")}
    lost = sorted(known - set(config))
    unknown = [f for f in sorted(set(config) - known) if not hasattr(tower_class, f)]
    near = {field: get_close_matches(field, lost, 1, 0.9) for field in unknown}
    misspelled = [f"{field} for {like[0]}" for field, like in near.items() if like]
    if misspelled:
        warnings.warn(
            f"{name} seems to misspell {misspelled}, so defaults are used. Correct config.json.",
            stacklevel=2,
        )


def _write_attention_direction(text_config: PreTrainedConfig, *, bidirectional: bool) -> None:
    stated = getattr(text_config, "is_causal", None)
    if stated is not None and bool(stated) == bidirectional:
        raise ValueError(
            f"bidirectional={bidirectional} contradicts text_config.is_causal={stated}. "
            "Set text_config.is_causal to the opposite, or leave it out."
        )
    text_config.is_causal = not bidirectional
