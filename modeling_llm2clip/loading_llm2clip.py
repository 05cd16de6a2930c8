"""Strict loading: chooses the weight files, requires every weight to fit, never runs custom code.

Quantization with bitsandbytes applies only to the LLM and is never saved.

Uploaded with the weights.
"""

from __future__ import annotations

import copy
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from traceback import extract_tb
from typing import Any

import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file, try_to_load_from_cache

_OWN_CODE = (
    "configuration_llm2clip.", "image_cropping_llm2clip.", "modeling_llm2clip.",
    "processing_llm2clip.",
)  # fmt: skip
# Files in which transformers looks for references to custom code.
_NAMING_FILES = (
    "config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json",
)  # fmt: skip
# Parts of module names, and the files whose fields those modules read.
_FILES_OF = {
    "lora_merging": "adapter_config.json",
    "tokeniz": "tokenizer.json or tokenizer_config.json",
    "text_embedders": "modules.json, or the configuration of a module,",
    "process": "processor_config.json or preprocessor_config.json",
    "": "config.json",
}
_DEVICES = re.compile("CUDA|MPS|HIP|XPU|NVIDIA|allocate memory")
_REMEDY = "Choose a model whose classes are part of transformers."
# Errors of a loader that lacks a class defined only in the folder's code.
_LOADING_ERRORS = (ValueError, OSError, LookupError, AttributeError, TypeError, ImportError)
WEIGHT_FILE = "model.safetensors"
_LORA_CONFIG = "adapter_config.json"
# Options of `from_pretrained` that select weights `list_model_files` does not list.
_OTHER_WEIGHTS = ("state_dict", "gguf_file", "variant")
_PLAIN_NAME = re.compile(r"[^/\\:]*[^/\\:.][^/\\:]*")  # no "..", on any system
_NAMES_SHOWN = 8
# Bytes in files may pack two 4-bit numbers each.
_PACKED_DTYPES = {"U8": 2, "I8": 2}
# Weights registered per weight in the files: up to three stored as one, and again in quantized
# layers. Likewise for numbers: once, and a second time if quantized or tied. Unsaved buffers may be
# as large as the weights plus 1 GiB. A model within these bounds is built quickly, so the usual
# error can name every weight that does not fit.
_REGISTERED_PER_TENSOR, _MORE_TENSORS = 8, 256
_REGISTERED_PER_NUMBER, _MORE_NUMBERS = 2, 1 << 20
_UNSAVED_NUMBERS = 1 << 28


def list_loaded_files(source: Any, options: Mapping[str, Any]) -> list[Path]:
    """List the weight files that a model's `from_pretrained` reads, given its keyword arguments.

    The list is empty if a state dict or another format is requested. A repository's files must be
    in the cache.
    """
    if source is None or any(options.get(name) for name in _OTHER_WEIGHTS):
        return []
    subfolder = options.get("subfolder") or ""
    folder = Path(source) / subfolder
    if (folder / _LORA_CONFIG).is_file() and not (folder / "config.json").is_file():
        return []  # only a LoRA, whose base transformers loads
    if Path(source).is_dir():
        return list_model_files(folder)
    if Path(source).exists():
        return []
    place = {name: options[name] for name in ("cache_dir", "revision") if options.get(name)}
    name = f"{subfolder}/{WEIGHT_FILE}" if subfolder else WEIGHT_FILE
    file: Any = try_to_load_from_cache(str(source), name, **place)
    # transformers requests the index only if there is no single file.
    more = {name: options[name] for name in ("token", "local_files_only") if name in options}
    index = cached_file(
        str(source), f"{name}.index.json", **place, **more,
        _raise_exceptions_for_gated_repo=False, _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    cached = next((path for path in (file, index) if isinstance(path, str)), None)
    return list_model_files(Path(cached).parent) if cached else []


def list_model_files(folder: Path) -> list[Path]:
    """List the weight files that loading an LLM2CLIP model reads, sorted by name.

    All code that hashes, checks, copies or counts a model's weights uses this list. A folder that
    also holds a LoRA is refused, because transformers would load the base that the LoRA names.
    """
    if (folder / _LORA_CONFIG).is_file():
        raise ValueError(
            f"{folder} has the {_LORA_CONFIG} of a LoRA, so transformers would load the model it "
            "names instead of the weights in this folder. Merge the LoRA (llm2clip build --lora), "
            "or move its files to another folder."
        )
    return list_weight_files(folder)


def list_weight_files(path: Path, *, names: Sequence[str] = (WEIGHT_FILE,)) -> list[Path]:
    """List the weight files of a saved model that transformers reads, sorted by name.

    `path` may be a weight file itself. In a folder, the first file of `names` that exists is used,
    or its index `NAME.index.json`. Duplicate or missing weights and a damaged index raise
    ValueError.
    """
    if path.is_file():
        return [path]
    for name in names:
        file, index = path / name, path / f"{name}.index.json"
        if file.is_file() and index.is_file():
            raise ValueError(
                f"{path} has its weights twice: in {name} and in the files of {index.name}. One of "
                f"them is left over from an earlier save. Delete {name}, or the index and its "
                "files, or save the model to a new folder."
            )
        if file.is_file() or index.is_file():
            return [file] if file.is_file() else _read_index(index)
    more = (
        "From a repository on the Hub, .bin files are not downloaded: download the file yourself "
        "and pass its folder."
        if any(name.endswith(".bin") for name in names)
        else "A pytorch_model.bin is not read: transformers saves it as safetensors "
        "(AutoModel.from_pretrained(SOURCE).save_pretrained(FOLDER))."
    )
    raise ValueError(
        f"{path} has no weights: none of {', '.join(names)}, and no index of them. Pass the folder "
        f"of a saved model or the weight file itself. {more}"
    )


def _read_index(index: Path) -> list[Path]:
    try:
        listed = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in listed if not _PLAIN_NAME.fullmatch(name)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged ({error!r}). Download it again.") from error
    if outside or not listed:
        raise ValueError(
            f"{index} names {outside[:_NAMES_SHOWN] or 'no files'}, but must name files in its own "
            "folder. Download it again from a source that you trust."
        )
    if lost := [name for name in listed if not (index.parent / name).is_file()]:
        raise ValueError(
            f"{index.parent} lacks the weight files {lost}. Save or download it again."
        )
    return [index.parent / name for name in listed]


def read_file_state(file: Path) -> tuple[int, ...] | None:
    """Read the file attributes that change when a file is rewritten; None if it does not exist."""
    if not file.is_file():
        return None
    state = file.stat()
    return state.st_mtime_ns, state.st_ctime_ns, state.st_ino, state.st_size


def remove_old_layout(folder: Path, old_file: tuple[int, ...] | None) -> None:
    """Remove the weight file or the index, whichever is left from an earlier save.

    transformers itself removes shards that a save does not replace.
    """
    file, index = folder / WEIGHT_FILE, folder / f"{WEIGHT_FILE}.index.json"
    if file.is_file() and index.is_file():
        (file if read_file_state(file) == old_file else index).unlink()


def require_own_names(folder: Path, parts: Sequence[str]) -> None:
    """Check that saved weights are named after the model's parts; otherwise they would not load."""
    files = sorted(folder.glob("model*.safetensors"))
    names = {name for file in files for name in read_weight_shapes([file])}
    if strange := sorted(name for name in names if name.partition(".")[0] not in parts):
        raise ValueError(
            f"{folder}: transformers saved weights under the wrong names ({len(strange)}, such as "
            f"{strange[:_NAMES_SHOWN]}), so the folder will not load. Versions 5.6 to 5.8 do this "
            "to models with a DINOv3 tower. Upgrade transformers and save again."
        )


@contextmanager
def naming_damage(source: Any) -> Iterator[None]:
    """Explain the error of a damaged safetensors file."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"{source}: a safetensors file is truncated or damaged ({error}). Save or download it "
            "again, and compare its size and SHA-256 with the original's."
        ) from error


@contextmanager
def open_safetensors(file: Path) -> Iterator[Any]:
    with naming_damage(file), safe_open(file, framework="pt") as opened:
        yield opened


def read_weight_shapes(files: Sequence[Path]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Read the name, shape and dtype (as safetensors spells it) of every tensor in the files.

    A name in two files is refused, because transformers would silently load the last one.
    """
    shapes: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in files:
        with open_safetensors(file) as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}
            heads = {n: (tuple(p.get_shape()), str(p.get_dtype())) for n, p in parts.items()}
        if twice := sorted(set(shapes) & set(heads)):
            raise ValueError(
                f"{file} repeats the weights {twice[:_NAMES_SHOWN]} of another file in its folder. "
                "Keep one copy."
            )
        shapes |= heads
    return shapes


@contextmanager
def bounded_by_weights(list_files: Callable[[], Sequence[Path]]) -> Iterator[None]:
    """Stop building a network that has far more weights than its weight files contain.

    A configuration may state any number of layers and any width. Building an oversized network
    would take minutes and fill the memory before the mismatch with the files is found. The files
    are listed when the first weight is registered: by then transformers has downloaded the files.
    Without files, any size is allowed.
    """
    thread, seen, counts = threading.get_ident(), set[tuple[int, str]](), Counter[str]()

    @cache
    def find_limits() -> tuple[int, int]:
        shapes = read_weight_shapes(list_files()).values()
        return len(shapes), sum(
            prod(shape) * _PACKED_DTYPES.get(dtype, 1) for shape, dtype in shapes
        )

    def count(kind: str, module: nn.Module, name: str, value: Tensor | None) -> None:
        # torch calls hooks in every thread, and loading a weight registers it a second time.
        key = (id(module), name)
        if threading.get_ident() != thread or value is None or key in seen:
            return
        seen.add(key)
        counts.update({kind: 1, f"numbers in {kind}": value.numel()})
        tensors, numbers = find_limits()
        if tensors and (
            counts["weights"] > _REGISTERED_PER_TENSOR * tensors + _MORE_TENSORS
            or counts["numbers in weights"] > _REGISTERED_PER_NUMBER * numbers + _MORE_NUMBERS
            or counts["numbers in buffers"] > numbers + _UNSAVED_NUMBERS
        ):
            raise ValueError(
                f"config.json describes a larger model than the weight files contain: {tensors} "
                f"tensors with {numbers:,} numbers. Building stopped at {name!r} of shape "
                f"{tuple(value.shape)} in a {type(module).__name__}, after {counts['weights']} "
                f"weights with {counts['numbers in weights']:,} numbers. Use the class that saved "
                "the folder, or restore config.json or the matching weights."
            )

    hooks = (
        torch_module.register_module_parameter_registration_hook(partial(count, "weights")),
        torch_module.register_module_buffer_registration_hook(partial(count, "buffers")),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def load_without_code(loader: Any, source: str | Path, **settings: Any) -> Any:
    """Call `loader.from_pretrained` without ever running code from the folder or repository.

    By default, transformers asks on the terminal whether to run such code. If transformers has its
    own class for the model type, that class is used.
    """
    with naming_fields(source), naming_code(source, revision=settings.get("revision")):
        return loader.from_pretrained(source, trust_remote_code=False, **settings)


@contextmanager
def naming_fields(source: Any, arguments: Iterable[str] = ()) -> Iterator[None]:
    """Raise errors about fields of a folder's files as ValueError, naming the folder and the files.

    `arguments` names the caller's options, which may be the cause instead.
    """
    try:
        yield
    except (OSError, ImportError, MemoryError, SafetensorError):  # these name the cause
        raise
    except UnpicklingError as error:  # torch's remedy is to run the code in the file
        raise ValueError(
            f"{source}: a weight file that is not safetensors is damaged or contains more than "
            "weights. Unpickling it could run code, so it is refused. Download it again, or save "
            "the model as safetensors on a machine where you trust it."
        ) from error
    except Exception as error:  # the tokenizers library raises this class
        reason = " ".join(str(error).split())
        is_named = str(source) in reason or ".json" in reason
        is_of_device = type(error).__name__ == "OutOfMemoryError" or _DEVICES.search(reason)
        if is_of_device or (is_named and isinstance(error, ValueError | RuntimeError)):
            raise
        places = [Path(frame.filename).name for frame in extract_tb(error.__traceback__)]
        files = next(files for part, files in _FILES_OF.items() if any(part in p for p in places))
        by_caller = f", or this call has an argument ({', '.join(arguments)})," if arguments else ""
        raise ValueError(
            f"{source} cannot be loaded: {files} has a field{by_caller} that is refused "
            f"({type(error).__name__}: {reason}). Restore the file from the original model folder."
        ) from error


@contextmanager
def naming_code(
    source: Any, *, revision: str | None = None, remedy: str = _REMEDY
) -> Iterator[None]:
    """Explain a loading error by custom code that was not run, if the source refers to any."""
    try:
        yield
    except _LOADING_ERRORS as error:
        # For a repository, only cached files are read.
        references_of = {
            name: references
            for name in _NAMING_FILES
            if (references := list_foreign_code(_read_settings(source, name, revision=revision)))
        }
        if not references_of:
            raise
        named = "; ".join(f"{file} names {', '.join(refs)}" for file, refs in references_of.items())
        # transformers' own advice is to run the code.
        reason = "" if "trust_remote_code" in str(error) else f" ({error})"
        raise ValueError(
            f"{source} needs custom code, which is never run here: {named}. It cannot be loaded "
            f"without that code{reason}. {remedy}"
        ) from error


def _read_settings(source: Any, name: str, *, revision: str | None) -> Any:
    """Read a JSON file; None if it is missing or invalid, which its loader will report."""
    try:
        path: Any = Path(source) / name
        if not Path(source).exists():
            path = try_to_load_from_cache(str(source), name, revision=revision)
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return None


def list_foreign_code(content: Any) -> list[str]:
    """List references to code other than this package's, at any depth of JSON content."""
    if isinstance(content, list):
        return [ref for value in content for ref in list_foreign_code(value)]
    if not isinstance(content, dict):
        return []
    named = content.get("auto_map") or {}
    named = named if isinstance(named, dict) else {"AutoTokenizer": named}  # the old format
    refs = [
        f"{auto_class}: {ref}"
        for auto_class, classes in named.items()
        for ref in (classes if isinstance(classes, list | tuple) else [classes])
        if ref is not None and not str(ref).startswith(_OWN_CODE)
    ]
    inside = [value for name, value in content.items() if name != "auto_map"]
    return refs + list_foreign_code(inside)


def build_tower(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a tower with random weights from one of transformers' own classes.

    Code that the configuration refers to is never run.
    """
    tower_class = find_tower_class(config)
    if hasattr(tower_class, "from_config"):
        return tower_class.from_config(config, trust_remote_code=False)  # type: ignore[no-any-return]
    return tower_class._from_config(config)  # type: ignore[no-any-return]


def find_tower_class(config: PreTrainedConfig) -> Any:
    """Return AutoModel, or the class of a tower that AutoModel lacks (MetaCLIP 2, AltCLIP).

    Raise ValueError if transformers has no class named after the configuration.
    """
    # Imported here because it registers the model's classes, whose module imports this one.
    from transformers import MODEL_MAPPING, AutoModel

    if type(config) in MODEL_MAPPING:
        return AutoModel
    name = type(config).__name__.removesuffix("Config") + "Model"
    tower_class: Any = getattr(transformers, name, None)
    if getattr(tower_class, "config_class", None) is not type(config):
        raise ValueError(
            f"This version of transformers has no class for a standalone {config.model_type!r} "
            "tower. Upgrade transformers, or choose another tower."
        )
    return tower_class


# Every part except the LLM. They are small, and quantizing them would change image embeddings.
KEPT_IN_FULL = [
    "vision_model",
    "visual_projection",
    "pooled_dense",
    "text_adapter",
    "text_projection",
    "logit_scale",
]
_QUANTIZED_WEIGHTS = ("Params4bit", "Int8Params")  # classes of bitsandbytes, which is optional
_DICTIONARY_KEYS = ("load_in_4bit", "load_in_8bit")


def quantize_llm_only(quantization_config: Any, *, class_name: str, has_llm: bool) -> Any:
    """Return a `quantization_config` for `from_pretrained` that quantizes only the LLM.

    Configurations for libraries other than bitsandbytes are returned unchanged. A class without an
    LLM is refused.
    """
    config = quantization_config
    if isinstance(config, dict) and any(config.get(key) for key in _DICTIONARY_KEYS):
        config = BitsAndBytesConfig.from_dict(config)
    if not isinstance(config, BitsAndBytesConfig):
        return config
    if not has_llm:
        raise ValueError(
            f"{class_name} has no LLM, and bitsandbytes may only quantize an LLM: quantizing a "
            "vision tower or projection would change the embeddings. Remove quantization_config; "
            "dtype=torch.bfloat16 needs half the memory."
        )
    config = copy.deepcopy(config)
    skipped = config.llm_int8_skip_modules or ()
    config.llm_int8_skip_modules = [*dict.fromkeys((*skipped, *KEPT_IN_FULL))]
    return config


def require_savable(model: PreTrainedModel) -> None:
    """Refuse to save quantized layers, layers wrapped by peft, and heads without their towers.

    bitsandbytes may not restore quantized layers exactly, layers wrapped by peft are saved under
    names that do not load without peft, and a folder without towers does not load at all.
    """
    if hasattr(model, "loaded_files"):  # set by load_heads
        raise ValueError(
            "The model was not saved, because load_heads loaded it without its towers, so the "
            "folder would not load. Write the whole model with save_heads."
        )
    quantized = [
        name
        for name, module in model.named_modules()
        if type(getattr(module, "weight", None)).__name__ in _QUANTIZED_WEIGHTS
    ]
    if quantized:
        raise ValueError(
            f"The model was not saved, because bitsandbytes quantized {len(quantized)} of its "
            f"layers (first: {quantized[0]}). Save it in full precision, and quantize it when "
            "loading that folder (quantization_config)."
        )
    if getattr(model, "_hf_peft_config_loaded", False):  # transformers saves only the LoRA
        return
    if wrapped := [name for name, module in model.named_modules() if hasattr(module, "base_layer")]:
        raise ValueError(
            f"The model was not saved, because peft wraps {len(wrapped)} of its layers (first: "
            f"{wrapped[0]}), so the folder would not load. Save the model that merge_and_unload "
            "returns, or call the peft model's save_pretrained to save only the LoRA."
        )


def refuse_unaccounted_keys(cls: type, info: dict[str, Any], *, allow_misshapen: bool) -> None:
    """Check that every weight was loaded.

    With `allow_misshapen`, weights with the wrong shape keep their initial values.
    """
    mismatched = {} if allow_misshapen else {key[0]: key[1:] for key in info["mismatched_keys"]}
    missing = sorted(set(info["missing_keys"]) - {key[0] for key in info["mismatched_keys"]})
    unexpected = sorted(info["unexpected_keys"])
    if not (mismatched or missing or unexpected):
        return
    raise ValueError(
        f"{cls.__name__}: the weights do not fit the configuration. "
        f"Missing ({len(missing)}): {missing[:8]}. Unexpected ({len(unexpected)}): "
        f"{unexpected[:8]}. Wrong shape ({len(mismatched)}; saved, expected): "
        f"{dict(list(mismatched.items())[:8])}. Use the class that saved the folder (text-only: "
        "LLM2CLIPTextModel, vision-only: LLM2CLIPVisionModel) and the transformers version named "
        "in its config.json, or convert the checkpoint again."
    )
