"""Checks that do not run the model: config, weight files, remote code, tokenizer, processor."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, AutoTokenizer

from .._suggestions import counted
from ..base_llm2clip import _CODE_OF_EVERY_FOLDER
from ..configuration_llm2clip import LLM2CLIPConfig
from ..data.safetensors_files import iterate_tensors
from ..data.sources.json_files import read_object
from ..loading_llm2clip import list_foreign_code, list_model_files, load_without_code
from ..model_folders.fingerprint import fingerprint_embeddings
from ..model_folders.golden_embeddings import GOLDEN_FILE, require_recorded_files
from ..model_folders.model_folder import list_uploaded_files
from ..model_folders.model_loading import MODEL_CLASSES, describe_untrained
from ..model_folders.training_images import TRAINING_IMAGES_FILE, read_training_images
from ..model_folders.weights import open_model_weights
from ..modeling_llm2clip import LLM2CLIPModel
from ..processing_llm2clip import LLM2CLIPProcessor
from .model_report import ConcernError, NotApplicableError
from .model_under_test import SHORT_TEXTS, ModelUnderTest

# Files in which AutoProcessor looks for code before config.json. The first one takes precedence;
# the others may lack the code if another program has re-saved them.
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
_MAY_NAME_NO_CODE = _PROCESSOR_FILES[1:]
_NAMES_SHOWN = 8
# Dtypes of masks and of unquantized weights.
_PLAIN_DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool}


def check_config(tested: ModelUnderTest) -> str:
    """Require config.json to be complete, consistent, and in this package's format."""
    raw = _read_json(tested.folder / "config.json")
    if raw.get("model_type") != LLM2CLIPConfig.model_type:
        raise ValueError(
            f"config.json has model_type={raw.get('model_type')!r}, expected "
            f"{LLM2CLIPConfig.model_type!r}. Convert or build the model first."
        )
    architecture = (raw.get("architectures") or ["nothing"])[0]
    if architecture not in MODEL_CLASSES:
        raise ValueError(
            f"config.json has architectures={raw.get('architectures')}, expected one of "
            f"{sorted(MODEL_CLASSES)}. Save the model with save_pretrained."
        )
    config = LLM2CLIPConfig.from_pretrained(tested.folder, local_files_only=True)
    tested.config, tested.model_class = config, MODEL_CLASSES[architecture]
    direction = "bidirectional" if config.bidirectional else "causal"
    return (
        f"{architecture}, format {config.format_version}, {direction}, "
        f"{config.projection_dim} dimensions"
    )


def check_training(tested: ModelUnderTest) -> str:
    if state := describe_untrained(tested.config):
        raise ConcernError(state)
    return "according to config.json, text adapter and projections are trained"


def check_training_images(tested: ModelUnderTest) -> str:
    """Require the summary of the training images, if any, to match the model's vision tower."""
    summary = read_training_images(tested.folder)
    if summary is None:
        return f"there is no {TRAINING_IMAGES_FILE}, so unfamiliar images cannot be detected"
    projection = open_model_weights(tested.folder).get("visual_projection.weight")
    if projection is not None:
        summary.require_width(projection.shape[1])
    return ", ".join(f"{data.name} ({data.num_images:,} images)" for data in summary.datasets)


def check_text_like(tested: ModelUnderTest, *, other: Path) -> str:
    """Require everything that affects text embeddings to be identical to another model's."""
    ours, theirs = (fingerprint_embeddings(folder, "text") for folder in (tested.folder, other))
    if differing := sorted(n for n in {*ours, *theirs} if ours.get(n) != theirs.get(n)):
        raise ValueError(
            f"Text embeddings differ from {other}, because {', '.join(differing)} differ. Embed "
            "all texts again, or train with --lock-text."
        )
    return f"text embeddings are identical to those of {other}"


def check_weight_dtypes(tested: ModelUnderTest) -> str:
    """Require one floating-point dtype for all weights, and float32 for the temperature."""
    dtypes = {name: tensor.dtype for name, tensor in open_model_weights(tested.folder).items()}
    if getattr(tested.config, "quantization_config", None):
        names = sorted({_name(dtype) for dtype in dtypes.values()})
        if set(dtypes.values()) <= _PLAIN_DTYPES:
            raise ValueError(
                f"config.json says that the weights are quantized, but the files contain only "
                f"{names}. Remove quantization_config from config.json, or save the model again."
            )
        raise NotApplicableError("the weights are quantized, so their dtypes differ by design")
    dtypes = {name: dtype for name, dtype in dtypes.items() if dtype.is_floating_point}
    temperature = {
        name: dtypes.pop(name) for name in list(dtypes) if name.startswith("logit_scale.")
    }
    errors = [
        f"{name} is {_name(dtype)}, not float32"
        for name, dtype in temperature.items()
        if dtype != torch.float32
    ]
    common = Counter(dtypes.values()).most_common(1)[0][0] if dtypes else None
    odd = sorted(f"{name} ({_name(dtype)})" for name, dtype in dtypes.items() if dtype != common)
    if odd:
        errors.append(
            f"{len(odd)} of {len(dtypes)} weights are not {_name(common)}: {odd[:_NAMES_SHOWN]}"
        )
    stated = getattr(tested.config, "dtype", None)
    if stated is not None and common != stated:
        errors.append(f"config.json has {_name(stated)}, the weights are {_name(common)}")
    if errors:
        raise ValueError("; ".join(errors) + ". Load the model in one dtype and save it again.")
    return f"{len(dtypes)} weights are {_name(common)}"


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def check_finite_weights(tested: ModelUnderTest) -> str:
    """Look for NaN and infinity in every weight."""
    count, errors = 0, []
    for name, tensor in iterate_tensors(list_model_files(tested.folder)):
        count += 1
        # One-byte floats do not implement isfinite.
        wide = tensor.float() if tensor.element_size() == 1 else tensor
        # NaN propagates to the extremes, so no large tensor has to be copied.
        if tensor.numel() and not torch.stack(torch.aminmax(wide)).isfinite().all():
            errors.append(f"{name} has NaN or infinity")
    if errors:
        raise ValueError(
            f"{'; '.join(errors[:_NAMES_SHOWN])} ({len(errors)} of {count} tensors). "
            "Use the last training checkpoint without such weights, or download the files again."
        )
    return f"{count} tensors without NaN or infinity"


def check_remote_code(tested: ModelUnderTest) -> str:
    """Compare the folder's code, and references to code, with the installed package."""
    folder = tested.folder
    uploaded = {path.name: path for path in list_uploaded_files()}
    contents = {"config.json": _read_json(folder / "config.json")}
    contents |= {n: _read_json(folder / n) for n in _PROCESSOR_FILES if (folder / n).is_file()}
    inside = [  # below the top level of a file, such as for a tower or the image processor
        f"{name} refers to other code in a nested entry: {refs}"
        for name, content in contents.items()
        if (refs := list_foreign_code([v for key, v in content.items() if key != "auto_map"]))
    ]
    brings_code = contents["config.json"].get("auto_map") or inside
    if not brings_code and not any((folder / name).exists() for name in uploaded):
        raise NotApplicableError("the folder contains no code; it needs the installed package")
    missing = sorted(name for name in uploaded if not (folder / name).is_file())
    altered = sorted(
        name
        for name, path in uploaded.items()
        if name not in missing and (folder / name).read_bytes() != path.read_bytes()
    )
    errors = [
        f"{what}: {names}" for what, names in (("altered", altered), ("missing", missing)) if names
    ]
    architecture = (contents["config.json"].get("architectures") or [""])[0]
    model_class = MODEL_CLASSES.get(architecture, LLM2CLIPModel)
    for name, content in contents.items():
        entries = {"AutoProcessor": _CODE_OF_EVERY_FOLDER["AutoProcessor"]}
        if name == "config.json":
            entries = {**_CODE_OF_EVERY_FOLDER, **model_class._auto_classes}
        errors += _find_map_errors(name, content.get("auto_map"), entries)
    errors += inside
    if errors:
        raise ValueError(
            f"The folder's code differs from the installed package ({'; '.join(errors)}), so "
            "others would run different code than you. Save the model again with this package, or "
            "install the version that wrote the folder."
        )
    return f"{len(uploaded)} files match the installed package, and its classes are registered"


def check_recorded_files(tested: ModelUnderTest) -> str:
    """Compare the files with those used to compute the golden embeddings."""
    if not require_recorded_files(tested.folder):
        raise NotApplicableError(f"{GOLDEN_FILE} is absent, or records no files")
    return "the files that affect embeddings are unchanged since the folder was written"


def check_tokenizer(tested: ModelUnderTest) -> str:
    """Load the tokenizer as pipelines do; the LLM's embedding table must have all token ids."""
    tokenizer = load_without_code(AutoTokenizer, tested.folder, local_files_only=True)
    rows = tested.config.text_config.vocab_size
    largest = max(tokenizer.get_vocab().values())
    errors = []
    if largest >= rows:
        errors.append(
            f"it has ids up to {largest}, but the LLM's embedding table has only {rows} rows: it "
            "belongs to another LLM"
        )
    if tokenizer.pad_token_id is None:
        errors.append("it has no padding token, so batches cannot be made")
    if tokenizer.padding_side != "right":
        errors.append(f"it pads on the {tokenizer.padding_side}, which shifts positions")
    if errors:
        raise ValueError(f"The saved tokenizer: {'; '.join(errors)}. Restore the original one.")
    tested.tokenizer = tokenizer
    padding = f"padding is {tokenizer.pad_token!r}, on the right"
    return f"{largest + 1} ids fit the {rows} rows, {padding}"


def check_prompt(tested: ModelUnderTest) -> str:
    """Require the saved tokenizer itself to strip texts and add the prompt."""
    config, tokenizer = tested.config, tested.tokenizer
    prefix, suffix = config.prompt_prefix_ids, config.prompt_suffix_ids
    errors = [
        error
        for text in SHORT_TEXTS
        for error in _find_prompt_errors(text, tested, truncated=False)
    ]
    errors += _find_prompt_errors(
        "a dog on a mat " * config.max_text_length, tested, truncated=True
    )
    text = SHORT_TEXTS[0]
    if tokenizer(f" \n{text}\t ")["input_ids"] != tokenizer(text)["input_ids"]:
        errors.append("spaces around a text are not stripped, so they change its embedding")
    ends_special = bool(suffix) and suffix[-1] in tokenizer.all_special_ids
    if ends_special != config.prompt_suffix_ends_special:
        errors.append(
            f"config.prompt_suffix_ends_special is {config.prompt_suffix_ends_special}, but in the "
            f"tokenizer the last suffix id is {'' if ends_special else 'not '}special, so "
            "sentence-transformers would pool instructions incorrectly"
        )
    if errors:
        raise ValueError(
            f"{'; '.join(errors[:3])}. Restore tokenizer.json, or write the prompt again with "
            "building.prompts.write_prompt."
        )
    return f"{tokenizer.decode(prefix)!r} … {tokenizer.decode(suffix)!r}, also when truncated"


def check_text_length(tested: ModelUnderTest) -> str:
    """Require tokenizer, configuration and processor to have the same maximum text length."""
    lengths = {
        "config.max_text_length": tested.config.max_text_length,
        "tokenizer.model_max_length": tested.tokenizer.model_max_length,
    }
    if tested.processor is not None:
        lengths["processor.max_text_length"] = tested.processor.max_text_length
    if len(set(lengths.values())) != 1:
        raise ValueError(
            "The maximum text lengths differ: "
            f"{', '.join(f'{name}={value}' for name, value in lengths.items())}. Long texts would "
            "get different embeddings or be refused. Make the lengths equal."
        )
    return f"{tested.config.max_text_length} tokens in {len(lengths)} places"


def check_processor(tested: ModelUnderTest) -> str:
    is_whole = tested.model_class is LLM2CLIPModel
    if not is_whole and not any((tested.folder / name).is_file() for name in _PROCESSOR_FILES[:2]):
        raise NotApplicableError(f"a {tested.model_class.__name__} was saved without a processor")
    processor = load_without_code(AutoProcessor, tested.folder, local_files_only=True)
    if not isinstance(processor, LLM2CLIPProcessor):
        raise ValueError(
            f"AutoProcessor loads a {type(processor).__name__}, expected LLM2CLIPProcessor. Save "
            "the processor to the folder with save_pretrained."
        )
    tested.processor = processor
    return f"AutoProcessor loads it, with {type(processor.image_processor).__name__}"


def check_tokenizer_path(tested: ModelUnderTest) -> str:
    """Require the bare tokenizer, which pipelines use, to produce the same ids as the processor."""
    if tested.processor is None:
        raise NotApplicableError("there is no processor to compare with")
    bare = tested.tokenizer(
        list(SHORT_TEXTS), padding=True, truncation=True, return_tensors="pt"
    )  # fmt: skip
    processed = tested.processor(text=list(SHORT_TEXTS))
    for name in ("input_ids", "attention_mask"):
        if not torch.equal(bare[name], processed[name]):
            raise ValueError(
                f"AutoTokenizer and AutoProcessor produce different {name} (shapes "
                f"{tuple(bare[name].shape)} and {tuple(processed[name].shape)}), so pipelines get "
                "different embeddings than the processor. Save the processor to the folder again."
            )
    return f"AutoTokenizer and AutoProcessor produce the same ids for {len(SHORT_TEXTS)} texts"


def _find_map_errors(name: str, auto_map: Any, expected: dict[str, str]) -> list[str]:
    if auto_map is not None and not isinstance(auto_map, dict):
        return [f"auto_map in {name} is {auto_map!r}, expected an object"]
    auto_map = auto_map or {}
    foreign = sorted(
        f"{auto_class}: {reference}"
        for auto_class, reference in auto_map.items()
        if expected.get(auto_class) != reference
    )
    missing = sorted(set(expected) - set(auto_map)) if name not in _MAY_NAME_NO_CODE else []
    return [
        *([f"auto_map in {name} refers to other code: {foreign}"] if foreign else []),
        *([f"auto_map in {name} lacks {missing}"] if missing else []),
    ]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}, so it is not a saved model.")
    return read_object(path)


def _find_prompt_errors(text: str, tested: ModelUnderTest, *, truncated: bool) -> list[str]:
    config = tested.config
    prefix, suffix = config.prompt_prefix_ids, config.prompt_suffix_ids
    ids = tested.list_ids(text) if truncated else tested.tokenizer(text, verbose=False)["input_ids"]
    when = f" truncated to {config.max_text_length} tokens" if truncated else ""
    shown = f"{text[:24]!r}{when} is tokenized as {ids[:12]}…{ids[-4:]}"
    errors = []
    if ids[: len(prefix)] != prefix:
        errors.append(f"{shown}, which does not start with the prompt {prefix}")
    if suffix and ids[-len(suffix) :] != suffix:
        errors.append(f"{shown}, which does not end with the prompt suffix {suffix}")
    if truncated and len(ids) != config.max_text_length:
        errors.append(f"{shown}, which has {counted(len(ids), 'token')}")
    return errors
