"""Checks that run the model, some against golden embeddings or sentence-transformers."""

from __future__ import annotations

import gc
import math
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .._suggestions import counted
from ..base_llm2clip import SETTINGS_FILE, check_instructions, find_instructions
from ..building.tower_checks import find_direction_errors
from ..data.sources.json_files import read_json
from ..heads_llm2clip import MAX_LOG_SCALE
from ..loading_llm2clip import naming_code
from ..model_folders.golden_embeddings import (
    GOLDEN_FILE,
    compare_golden,
    find_tolerance,
    measure_distances,
    render_golden_images,
)
from ..model_folders.model_writing import explain_incomplete
from .model_report import ConcernError, NotApplicableError
from .model_under_test import SHORT_TEXTS, ModelUnderTest

# Long enough to reveal overflowing half-precision sums, short enough for one core.
_MAX_LONG_WORDS = 512
# All are equivalent for unit-length embeddings; sentence-transformers defaults to cosine.
_COSINES = ("cosine", "dot", None)


def check_loading(tested: ModelUnderTest) -> str:
    """Load the model strictly: every weight must be used, and none may be missing."""
    model = tested.model_class.from_pretrained(tested.folder, local_files_only=True)
    tested.model = model.eval().requires_grad_(False).to(tested.device)
    size = sum(parameter.numel() for parameter in model.parameters())
    return f"{len(model.state_dict())} tensors used, none missing ({size:,} parameters)"


def check_temperature(tested: ModelUnderTest) -> str:
    """Require an inverse temperature within [1, 100]; other values would be clamped."""
    log_scale = float(tested.model.logit_head.log_scale)
    temperature = math.exp(min(log_scale, 700.0))  # above 700, exp overflows
    # float32 rounds ln 100 by up to 5e-7; training cannot write anything further outside.
    if not -1e-6 <= log_scale <= MAX_LOG_SCALE + 1e-6:
        raise ValueError(
            f"The inverse temperature is {temperature:.4g} (logarithm {log_scale:.4g}), expected a "
            "value within [1, 100]. The value would be clamped. Either training diverged, or the "
            "value was written by hand."
        )
    return f"inverse temperature {temperature:.2f} is within [1, 100]"


def check_attention_direction(tested: ModelUnderTest) -> str:
    """Require each token to attend to all tokens, or only to earlier tokens, as configured."""
    config, text_model = tested.model.config, tested.model.text_model
    errors = []
    if bool(config.text_config.is_causal) == config.bidirectional:
        errors.append(
            f"bidirectional={config.bidirectional} and text_config.is_causal="
            f"{config.text_config.is_causal} contradict each other"
        )
    contrary = [
        name
        for name, module in text_model.named_modules()
        if hasattr(module, "is_causal") and bool(module.is_causal) == config.bidirectional
    ]
    if contrary:
        count = counted(len(contrary), "attention module")
        errors.append(f"wrong attention direction in {count} ({contrary[0]}, …)")
    errors += find_direction_errors(text_model, bidirectional=config.bidirectional)
    if errors:
        raise ValueError(
            f"{'; '.join(errors)}. Update transformers and this package, or load with another "
            "attn_implementation."
        )
    return "every token sees all others" if config.bidirectional else "causal, as configured"


def check_finite_outputs(tested: ModelUnderTest) -> str:
    """Encode short, non-English and long texts, and images; NaN and infinity are errors."""
    errors, count = [], 0
    if tested.encodes_texts:
        num_words = min(tested.config.max_text_length, _MAX_LONG_WORDS)
        texts = [*SHORT_TEXTS, "a dog on a mat " * (num_words // 5 + 1)]
        for row in _find_bad_rows(tested.encode_texts(texts)):
            errors.append(f"text_embeds row {row} ({texts[row][:24]!r})")
        count += len(texts)
    if tested.encodes_images:
        images = render_golden_images()
        errors += [f"image_embeds row {r}" for r in _find_bad_rows(tested.encode_images(images))]
        count += len(images)
    if not count:
        raise NotApplicableError("there is neither a tokenizer nor a processor to encode with")
    if errors:
        raise ValueError(
            f"NaN or infinity in {', '.join(errors)}, computed in {tested.model.dtype}. If the "
            "weights are finite, the dtype's range is too small. Use bfloat16 or float32."
        )
    return f"{count} embeddings without NaN or infinity in {tested.model.dtype}"


def check_pooled_span(tested: ModelUnderTest) -> str:
    """Require that exactly the configured tokens are pooled; check their number and the result."""
    config = tested.config
    num_prefix, num_suffix = len(config.prompt_prefix_ids), len(config.prompt_suffix_ids)
    errors = []
    for text in SHORT_TEXTS:
        whole, caption = tested.list_ids(text), tested.list_bare_ids(text)[: tested.room]
        pooled, num_wanted = whole[num_prefix:], len(caption) + num_suffix
        if len(pooled) != num_wanted or pooled[: len(caption)] != caption:
            errors.append(
                f"{text!r} has {len(caption)} tokens plus {num_suffix} in the suffix, but "
                f"{len(pooled)} are pooled ({pooled[:6]}…, expected {caption[:6]}…)"
            )
            continue
        by_hand = tested.pool_by_hand(whole, num_unpooled=config.num_unpooled)
        by_model = tested.model.get_caption_embeds(torch.tensor([whole], device=tested.device))
        distance = float((by_hand - by_model).norm() / by_hand.norm())
        if not distance <= find_tolerance(tested.model.dtype):
            errors.append(
                f"pooling {text!r} differs by {distance:.1e} from pooling its caption and suffix"
            )
    if errors:
        raise ValueError(f"{'; '.join(errors[:3])}. Restore prompt_prefix_ids in config.json.")
    if config.pools_prompt:
        return "prompt, caption and suffix"
    return f"caption and suffix, after {num_prefix} prompt tokens"


def check_batch_invariance(tested: ModelUnderTest) -> str:
    """Require an input to have the same embedding on its own and in a batch."""
    compared: dict[str, tuple[Tensor, Tensor]] = {}
    if tested.encodes_texts:
        alone = torch.cat([tested.encode_texts([text]) for text in SHORT_TEXTS])
        compared["texts"] = alone, tested.encode_texts(SHORT_TEXTS)
        compared["texts in one batch"] = alone, tested.encode_texts(SHORT_TEXTS, as_one_batch=True)
    if tested.encodes_images:
        images = render_golden_images()
        alone = torch.cat([tested.encode_images([image]) for image in images])
        compared["images"] = alone, tested.encode_images(images)
    return _require_equal(
        tested, compared, cause="Padding or other inputs in the batch leak into the embeddings"
    )


def check_padding_invariance(tested: ModelUnderTest) -> str:
    """Require left and right padding to produce the same embeddings."""
    left, right = (
        tested.encode_texts(SHORT_TEXTS, padding_side=side, as_one_batch=True)
        for side in ("left", "right")
    )
    return _require_equal(
        tested,
        {"left- and right-padded texts": (left, right)},
        cause="Positions or the attention mask depend on padding",
    )


def check_golden_embeddings(tested: ModelUnderTest) -> str:
    """Require the embeddings to match those recorded when the folder was written."""
    if not (tested.folder / GOLDEN_FILE).is_file():
        raise ConcernError(str(explain_incomplete(tested.folder)))
    if tested.processor is None:
        raise NotApplicableError("there is no processor to prepare the recorded inputs with")
    compared = compare_golden(tested.folder, tested.model, tested.processor)
    assert compared is not None
    return compared


def check_sentence_transformers(tested: ModelUnderTest) -> str:
    """Require sentence-transformers to produce the model's own embeddings; frees the model."""
    if find_spec("sentence_transformers") is None:
        raise NotApplicableError(
            "sentence-transformers is not installed (modeling_llm2clip[sentence-transformers])"
        )
    if not (tested.folder / "modules.json").is_file():
        raise NotApplicableError(
            "the folder has no modules.json, so sentence-transformers would load it without "
            "normalizing its embeddings; the model's save_pretrained writes that file"
        )
    if tested.processor is None:
        raise NotApplicableError(
            "sentence-transformers cannot load a model without its processor; the processor's "
            "save_pretrained adds it"
        )
    tolerance, dtype = find_tolerance(tested.model.dtype), tested.model.dtype
    prompts = _read_instructions(tested)
    expected = _encode_with_model(tested, prompts)
    tested.model = None
    gc.collect()  # a large LLM does not fit twice
    encoded = _encode_with_sentence_transformers(tested, prompts, content=set(expected))
    distances = {
        what: float(measure_distances(encoded[what], embeddings).max())
        for what, embeddings in expected.items()
        if what in encoded
    }
    if not distances:
        raise ValueError(
            f"sentence-transformers supports none of the model's modalities, {sorted(expected)}. "
            "Export the folder again."
        )
    errors = [f"{what} by {d:.1e}" for what, d in distances.items() if not d <= tolerance]
    if errors:
        raise ValueError(
            f"sentence-transformers and AutoModel give different embeddings: {', '.join(errors)} "
            f"(allowed in {dtype}: {tolerance:.2g}). Export the folder again."
        )
    missing = ", ".join(set(expected) - set(encoded))
    left_out = f"; not supported: {missing}" if missing else ""
    largest = max(distances.values())
    return f"{', '.join(distances)}: at most {largest:.1e} from AutoModel's{left_out}"


def _require_equal(
    tested: ModelUnderTest, compared: dict[str, tuple[Tensor, Tensor]], *, cause: str
) -> str:
    tolerance = find_tolerance(tested.model.dtype)
    distances = {what: measure_distances(*pair) for what, pair in compared.items()}
    errors = [
        f"{what}: row {int(distance.argmax())} moves by {float(distance.max()):.1e}"
        for what, distance in distances.items()
        if not float(distance.max()) <= tolerance
    ]
    if errors:
        raise ValueError(
            f"{'; '.join(errors)} (allowed in {tested.model.dtype}: {tolerance:.2g}). {cause}. "
            "Load with attn_implementation='eager', and report the tower's model type."
        )
    largest = max(float(distance.max()) for distance in distances.values())
    return f"{', '.join(distances)}: at most {largest:.1e} apart (allowed {tolerance:.2g})"


def _find_bad_rows(embeds: Tensor) -> list[int]:
    return [int(row) for row in (~embeds.isfinite()).any(dim=1).nonzero().flatten()]


def _read_instructions(tested: ModelUnderTest) -> dict[str, str]:
    """Return the instructions with which sentence-transformers encodes texts.

    Raises ValueError if the settings would make embeddings differ from AutoModel's.
    """
    path = tested.folder / SETTINGS_FILE
    settings = read_json(path) if path.is_file() else {}
    prompts = {name: text for name, text in (settings.get("prompts") or {}).items() if text.strip()}
    errors = []
    default = settings.get("default_prompt_name")
    if default in prompts:
        errors.append(
            f"default_prompt_name={default!r} prepends an instruction to every text, but "
            "AutoModel and pipelines do not"
        )
    if settings.get("similarity_fn_name") not in _COSINES:
        errors.append(f"similarity_fn_name={settings['similarity_fn_name']!r} is not the cosine")
    if errors:
        raise ValueError(
            f"{SETTINGS_FILE}: {'; '.join(errors)}. Set them to null and 'cosine', respectively."
        )
    config = tested.config
    if not tested.encodes_texts:
        prompts = {}
    if prompts:
        check_instructions(
            tested.tokenizer,
            prompts,
            num_suffix=len(config.prompt_suffix_ids),
            max_text_length=config.max_text_length,
        )
    if find_instructions(tested.folder, config.instructions) != config.instructions:
        raise ValueError(
            f"config.json has the instructions {config.instructions}, but {SETTINGS_FILE} has "
            "different ones, which would be lost if the model is loaded and saved elsewhere. Make "
            "them equal, or save the folder again with "
            "SentenceTransformer(folder).save_pretrained(folder)."
        )
    return prompts


def _encode_with_model(tested: ModelUnderTest, prompts: dict[str, str]) -> dict[str, Tensor]:
    embeddings = {}
    if tested.encodes_texts:
        embeddings["texts"] = tested.encode_texts(SHORT_TEXTS)
    if tested.encodes_images:
        embeddings["images"] = tested.encode_images(render_golden_images())
    for name, instruction in prompts.items():
        embeddings[f"texts with {name!r}"] = tested.encode_instructed(SHORT_TEXTS[:1], instruction)
    return embeddings


def _encode_with_sentence_transformers(
    tested: ModelUnderTest, prompts: dict[str, str], *, content: set[str]
) -> dict[str, Tensor]:
    from sentence_transformers import SentenceTransformer

    with naming_code(tested.folder):
        encoder = SentenceTransformer(
            str(tested.folder), device=tested.device, local_files_only=True, trust_remote_code=False
        )

    def encode(inputs: list[Any], **settings: Any) -> Tensor:
        embeddings: Tensor = encoder.encode(
            inputs, convert_to_tensor=True, show_progress_bar=False, **settings
        )
        return embeddings.float().cpu()

    encoded = {}
    if "texts" in content:
        encoded["texts"] = encode(list(SHORT_TEXTS))
    if "images" in content and "image" in encoder.modalities:
        encoded["images"] = encode(list(render_golden_images()))
    for name in prompts:
        encoded[f"texts with {name!r}"] = encode([SHORT_TEXTS[0]], prompt_name=name)
    return encoded
