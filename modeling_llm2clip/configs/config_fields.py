"""Base classes of all options, validated by pydantic from their annotations, and YAML reading.

A field's annotation defines its valid values (`Annotated[int, Interval(ge=1)]`,
`Literal["a", "b"]`), and the string below the field documents it. pydantic is only imported to
create a config with values other than the defaults.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_type_hints

import yaml
from annotated_types import Interval

from .._suggestions import did_you_mean

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from pydantic_core import CoreSchema, ErrorDetails

# The range that torch, NumPy and transformers all accept.
Seed = Annotated[int, Interval(ge=0, le=2**32 - 1)]
Precision = Literal["auto", "float32", "bfloat16"]
# One alias for all fields, because Python treats Literals with the same choices in another order
# as equal and may reuse the wrong one.
WeightDtype = Literal["float32", "bfloat16", "float16"]

_ADAPTERS: dict[type, TypeAdapter[Any]] = {}  # built once per config type


@dataclass(frozen=True, kw_only=True)
class Matches:
    """Annotation for strings that must match `pattern`; error messages describe it as `meaning`."""

    pattern: str
    meaning: str

    def __get_pydantic_core_schema__(
        self, source: Any, handler: Callable[[Any], CoreSchema]
    ) -> CoreSchema:
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(self._require, handler(source))

    def _require(self, text: str) -> str:
        if not re.fullmatch(self.pattern, text):
            raise ValueError(f"must be {self.meaning}")
        return text


Device = Annotated[
    str,
    Matches(pattern=r"auto|cpu|cuda(:\d+)?|mps", meaning="one of auto, cpu, cuda, cuda:N, mps"),
]
ShardSize = Annotated[
    str, Matches(pattern=r"[1-9]\d*(KB|MB|GB|KiB|MiB|GiB)", meaning="a size, like 5GB or 500MB")
]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base class of all options, which validates every field by its annotation.

    Lists become tuples, and strings become numbers or paths as the field requires, so Python, YAML
    and flags create the same object.

    Raises:
        ValueError: Fields have invalid values; the message names all of them.
    """

    # Fields without a command-line flag, for Python and recipes only; not a field itself.
    without_flags = tuple[str, ...]()

    def __post_init__(self) -> None:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)
                  if getattr(self, field.name) is not field.default}  # fmt: skip
        if values:
            for name, value in _check(type(self), values).items():
                object.__setattr__(self, name, value)
        if conflicts := [sentence for sentence, holds in self._list_conflicts().items() if holds]:
            raise ValueError(" ".join(conflicts))

    def _list_conflicts(self) -> dict[str, object]:
        """Map the error message of each possible conflict to a value that is true if it occurs."""
        return {}

    def list_given(self) -> list[str]:
        """List the options that differ from their defaults."""
        return [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: object) -> CoreSchema:
        """Accept a mapping for a field whose type is another config."""
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(cls._from_section)

    @classmethod
    def _from_section(cls, value: Any) -> Any:
        return value if isinstance(value, cls) else make_config(cls, value)


@dataclass(frozen=True, kw_only=True)
class DeviceConfig(Config):
    """Device to run a model on."""

    device: Device = "auto"
    """Device to run on: auto, cpu, cuda, cuda:N or mps. auto picks cuda if available, then mps,
    then cpu."""


@dataclass(frozen=True, kw_only=True)
class CompileConfig(DeviceConfig):
    """Compilation of a model's towers."""

    compile: bool = False
    """Compile the towers' layers with Triton or a C++ compiler. The first batches take longer, but
    later ones run faster. Rounding may change the embeddings and the gradients."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(CompileConfig):
    """Options for a training stage: duration, speed, device, checkpoints and metrics."""

    max_steps: Annotated[int, Interval(ge=1)] | None = None
    """Number of training steps. Default: set by `num_train_epochs`."""
    num_train_epochs: Annotated[float, Interval(gt=0)] | None = None
    """Number of passes over the data. Default: depends on the stage."""
    learning_rate: Annotated[float, Interval(gt=0)] | None = None
    """Peak learning rate. Default: depends on the stage."""
    warmup_steps: Annotated[float, Interval(ge=0)] = 0.1
    """Warmup steps until the learning rate reaches its peak; a value below 1 is a share of the run.
    """
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, which saves memory but takes about a third
    longer."""
    deterministic: bool = False
    """Use only deterministic kernels, which are slower, so that a resumed run on a GPU has the same
    bytes as an uninterrupted one even if it trains a tower or a LoRA. Operations without such a
    kernel raise an error. On a GPU, the environment must set CUBLAS_WORKSPACE_CONFIG=:4096:8."""
    precision: Precision = "auto"
    """Dtype to compute in. auto uses bfloat16 on GPUs and CPUs that multiply it in hardware,
    otherwise each weight's stored dtype. float32 also casts towers that are stored in half
    precision. Trained weights always stay float32. The launcher's mixed-precision setting is
    ignored."""
    save_steps: Annotated[int, Interval(ge=1)] | None = None
    """Steps between checkpoints; the last step is always saved. Default: depends on the stage."""
    logging_steps: Annotated[int, Interval(ge=1)] | None = None
    """Steps between logged metrics. Default: depends on the stage."""
    report_to: tuple[str, ...] | None = None
    """Integrations of transformers' Trainer to report metrics to, in addition to metrics.jsonl:
    names such as tensorboard, trackio and wandb, or only all or none. Default: tensorboard if
    installed."""
    seed: Seed = 0
    """Random seed of the run."""

    def _list_conflicts(self) -> dict[str, object]:
        return {
            **super()._list_conflicts(),
            f"warmup_steps={self.warmup_steps} must be a share below 1 or an integer.": (
                self.warmup_steps > 1 and self.warmup_steps % 1
            ),
            "deterministic=True cannot be combined with compile=True, because each process chooses "
            "its compiled kernels anew. Leave one out.": self.deterministic and self.compile,
        }


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """Options for reading captioned images."""

    without_flags = ("caption_fields",)

    image_dir: Path | None = None
    """Folder with the images. Default: the folder of the data."""
    ignore_fields: tuple[str, ...] = ()
    """Fields of the records to ignore; any other unknown field is an error. Default: none."""
    caption_fields: tuple[str, ...] | None = None
    """Fields of the captions to read, short and long, which every record must have; other captions
    are ignored. Default: every field of captions."""
    check_images: bool | None = None
    """Decode every image before the run starts. Runs with the same cached record table check the
    images only once. Default: yes if the stage trains on images, unless it resumes or the images
    are remote."""
    cache: bool = True
    """Cache the record table of a large dataset in ~/.cache/llm2clip, and reuse it in later runs.
    """


@dataclass(frozen=True, kw_only=True)
class ImageLimitsConfig(Config):
    """The one limit of `ImageLimits` that has a flag; an environment variable sets the others."""

    max_megapixels: Annotated[float, Interval(gt=0)] | None = None
    """Maximum size of a decoded image, in megapixels; larger images are invalid. Default: 160."""

    def list_limits(self) -> dict[str, float]:
        """Return the limits that were set, by name."""
        return {} if self.max_megapixels is None else {"max_megapixels": self.max_megapixels}


ConfigT = TypeVar("ConfigT", bound=Config)


def read_config(file: str | Path, config_type: type[ConfigT]) -> ConfigT:
    """Read options from a YAML file: fields with values, and sections as nested mappings.

    `base` names another YAML file, relative to this one, for the options that this file leaves out.
    A section is merged with the base's section of the same name.
    """
    values = read_yaml(file)
    origin = f"{file}, base {values['base']}" if "base" in values else f"{file}"
    try:
        if "base" in values:
            values = _merge_base(Path(file), values)
        return make_config(config_type, values)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None


def _merge_base(file: Path, values: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(values["base"], str):
        raise ValueError(f"base must be the path of one YAML file, not {values['base']!r}.")
    merged = read_yaml(base := file.parent / values["base"])
    if "base" in merged:
        raise ValueError(f"{base} has a base as well. Only one level is supported.")
    for name, value in values.items():
        inherited = merged.get(name)
        if isinstance(value, dict) and isinstance(inherited, dict):
            merged[name] = {**inherited, **value}
        else:
            merged[name] = value
    del merged["base"]
    return merged


def read_yaml(file: str | Path) -> dict[str, Any]:
    """Read a YAML mapping; scalars stay strings, except `null`, which becomes None."""
    try:
        values = yaml.load(Path(file).read_text(encoding="utf-8"), Loader=_YamlLoader)
    except OSError as error:
        raise ValueError(
            f"{file} cannot be read: {error.strerror}. Pass a YAML file of options."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if values is None:  # an empty file
        return {}
    if not isinstance(values, dict) or None in values:
        raise ValueError(f"{file} must contain `option: value` lines.")
    return values


def make_config(config_type: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """Create a config from values read from YAML or JSON; sections are mappings."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{values!r} must be a section with its own options.")
    return config_type(**_check(config_type, values))


def _check(config_type: type[Config], values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert values to the fields' types; refuse a missing field that has no default."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
    from typing_extensions import NotRequired, TypedDict

    if config_type not in _ADAPTERS:
        hints = get_type_hints(config_type, include_extras=True)
        for field in dataclasses.fields(config_type):
            if not field.default is field.default_factory is dataclasses.MISSING:
                hints[field.name] = NotRequired[hints[field.name]]
        config = ConfigDict(extra="forbid", allow_inf_nan=False)
        fields: Any = TypedDict("fields", hints)  # type: ignore[misc]
        _ADAPTERS[config_type] = TypeAdapter(with_config(config)(fields))
    if unordered := [name for name, value in values.items() if isinstance(value, set | frozenset)]:
        raise ValueError(
            f"{', '.join(unordered)} must be a list: the order of a set differs between processes."
        )
    try:
        return _ADAPTERS[config_type].validate_python(dict(values))  # type: ignore[no-any-return]
    except ValidationError as error:
        messages = (_describe(cause, config_type) for cause in error.errors())
        raise ValueError(" ".join(messages)) from None


def _describe(error: ErrorDetails, config_type: type[Config]) -> str:
    """Describe a pydantic error in one sentence: the value, and what was expected."""
    name = ".".join(map(str, error["loc"]))
    if error["type"] == "missing":
        return f"{name} is missing."
    if error["type"] == "extra_forbidden":
        options = [field.name for field in dataclasses.fields(config_type)]
        return f"{name} is not an option.{did_you_mean(name, options)}"
    if isinstance(error["input"], Mapping):  # the section's own message names its fields
        return f"{name}: {get_reason(error)}"
    return f"{name}={error['input']!r}: {get_reason(error)}."


def get_reason(error: ErrorDetails) -> str:
    """Return a pydantic error's message, without the prefix that pydantic adds to other errors."""
    return str(error.get("ctx", {}).get("error", error["msg"]))


class _YamlLoader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
    """YAML loader that keeps scalars as strings, because config fields define their own types.

    PyYAML follows YAML 1.1, where `1e-4` is a string, `010` is 8, and `no` (also the code for
    Norwegian) is false. Duplicate keys are an error.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # as in the base class

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                mark = node.value[number][0].start_mark
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", mark)
        return super().construct_mapping(node, deep=deep)  # type: ignore[no-any-return]


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:null", re.compile("^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]
)
