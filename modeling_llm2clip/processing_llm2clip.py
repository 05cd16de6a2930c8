"""Turns images and texts into model inputs, and raises errors for invalid images and texts.

Uploaded with the weights. The prompt around captions is part of the saved tokenizer, so the
tokenizer on its own and a pipeline produce the same ids as this processor.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import nullcontext
from itertools import chain
from typing import Any

import numpy as np
from PIL import Image
from transformers import BatchFeature, PreTrainedConfig, ProcessorMixin
from transformers.processing_utils import ImagesKwargs, TextKwargs

from .image_loading_llm2clip import (
    get_image_limits,
    load_images,
    read_image_header,
    unpack_pixels,
)
from .loading_llm2clip import naming_code, naming_fields

# Options of other processors that would put more than one caption or image in a row. Generic code
# may pass them as None or False.
_NOT_TAKEN = {
    "text_pair", "text_target", "text_pair_target", "is_split_into_words",
    "return_overflowing_tokens", "audio", "videos",
}  # fmt: skip
_IMAGE_LEVELS, _NOT_TRUE = ("images_kwargs", "common_kwargs"), (False, None)
_BLANK = "A text is blank: its embedding represents only the prompt."
_NOT_READ = ("audio_kwargs", "videos_kwargs")  # sentence-transformers always passes both
# Options that select where to find a model's files.
_LOCATION_OPTIONS = (
    "cache_dir", "force_download", "proxies", "token", "local_files_only", "revision", "subfolder",
)  # fmt: skip
# Maximum pixels per side and patches per image; no tower takes more.
_MOST_PIXELS, _MOST_PATCHES = 4096, 1 << 16
# Entries of a processor's dictionary that transformers reads from other files.
_FROM_OTHER_FILES = {"chat_template", "audio_tokenizer"}
# A tokenizer stores truncation and padding as state before it reads a text, so threads that share
# one without a lock would use each other's lengths.
_tokenizing = threading.RLock()


def _release_after_fork() -> None:
    """Let a forked process tokenize, in a single thread."""
    _tokenizing.release()
    # If the variable is set, tokenizers does not switch parallelism off after a fork by itself; the
    # child would wait for threads that it does not have.
    if "TOKENIZERS_PARALLELISM" in os.environ:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"


if hasattr(os, "register_at_fork"):  # a fork waits until other threads have finished tokenizing
    os.register_at_fork(
        before=_tokenizing.acquire,
        after_in_parent=_tokenizing.release,
        after_in_child=_release_after_fork,
    )


class LLM2CLIPProcessor(ProcessorMixin):
    """Image processor and tokenizer of a model.

    Threads may share a processor. Do not call the processor's tokenizer directly at the same time,
    because tokenizers are not thread-safe.

    Args:
        image_processor: Any image processor of transformers, or `LLM2CLIPImageProcessor`, which
            crops like torchvision.
        tokenizer: The LLM's tokenizer, which includes the model's prompt.
        max_text_length: Maximum number of tokens per text, prompt included.
        **kwargs: Further arguments of `ProcessorMixin`.

    Attributes:
        num_truncated_texts: Number of texts truncated so far; you may reset it to 0.

    Raises:
        ValueError: `max_text_length` is not a positive integer, or the image processor's images
            would be larger than any tower takes.

    Examples:
        >>> processor = LLM2CLIPProcessor.from_pretrained("my-model")
        >>> batch = processor(text=["a dog", "two red apples"], images=["dog.png"])
        >>> sorted(batch)
        ['attention_mask', 'input_ids', 'pixel_values']
        >>> processor.num_truncated_texts
        0
    """

    _auto_class = "AutoProcessor"

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        max_text_length: int = 512,
        **kwargs: Any,
    ) -> None:
        self.max_text_length = _check_length(max_text_length, "max_text_length")
        self.num_truncated_texts = 0
        _check_image_processor(image_processor)
        super().__init__(image_processor, tokenizer, **kwargs)  # type: ignore[no-untyped-call]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load like transformers, but without asking on the terminal whether to run custom code.

        Args:
            pretrained_model_name_or_path: Folder or Hub repository.
            args: Further positional arguments for transformers.
            kwargs: Keyword arguments for transformers.

        Raises:
            ValueError: The processor cannot be loaded without custom code (the message names the
                file that refers to that code), or a file has an invalid field.
        """
        source, revision = pretrained_model_name_or_path, kwargs.get("revision")
        runs_code = kwargs["trust_remote_code"] = bool(kwargs.get("trust_remote_code"))
        options = sorted({*kwargs} - {*_LOCATION_OPTIONS, "trust_remote_code"})
        with naming_fields(source, options):
            with nullcontext() if runs_code else naming_code(source, revision=revision):
                return super().from_pretrained(source, *args, **kwargs)

    @classmethod
    def get_processor_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read `processor_config.json`; without it, read the text length from `config.json`.

        A folder has no `processor_config.json` if model, tokenizer and image processor were saved
        separately.

        Args:
            pretrained_model_name_or_path: Folder or Hub repository.
            kwargs: Keyword arguments for transformers.

        Returns:
            The dictionary, and the keyword arguments that were not used.

        Raises:
            ValueError: `max_text_length` is missing. There is no default length, because texts
                could be truncated at a different length than in training.
        """
        location = {name: kwargs[name] for name in _LOCATION_OPTIONS if name in kwargs}
        settings: dict[str, Any]
        settings, unused = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if set(settings) <= _FROM_OTHER_FILES:
            config, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **location)
            if "max_text_length" in config:
                settings["max_text_length"] = config["max_text_length"]
        if "max_text_length" not in {*settings, *unused}:
            raise ValueError(
                f"{pretrained_model_name_or_path}: processor_config.json lacks max_text_length, "
                f"which has no default; it has {sorted(settings)}. Restore it from the original "
                "model folder, or pass max_text_length."
            )
        return settings, unused

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        on_long_text: str = "truncate",
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare images, texts, or both.

        Args:
            images: One image or a list, which may be nested: PIL images, paths, web and `data:`
                URLs, or RGB arrays and tensors of shape (H, W, 3) or (3, H, W). Arrays are uint8;
                or uint16, which is scaled to 8 bits; or with `do_rescale=False`, floats in [0, 1],
                which are rounded to 8 bits. A 4-dimensional batch is read as a list. See
                `load_images` for transparency, EXIF rotation and animations.
            text: One caption or a list. By default, texts are padded, truncated before the prompt's
                suffix, and returned as PyTorch tensors. A blank text raises a warning, because its
                embedding represents only the prompt.
            on_long_text: `"truncate"`, which increments `num_truncated_texts`, or `"error"`.
            **kwargs: Options of the tokenizer and the image processor, flat or in `text_kwargs`,
                `images_kwargs` and `common_kwargs`.

        Returns:
            `pixel_values` (B, 3, H, W) float32 for images; `input_ids` and `attention_mask` (B, L)
            int64 for texts.

        Raises:
            ValueError: A caption is not a string, an image is invalid, or an option is unknown; the
                message names it.
        """
        if on_long_text not in ("truncate", "error"):
            raise ValueError(f"on_long_text must be 'truncate' or 'error', got {on_long_text!r}.")
        if images is None and text is None:
            raise ValueError("Got neither images nor text. Pass at least one of them.")
        _refuse_options(kwargs, self.image_processor)
        if text is not None:
            text = clean_texts(text, takes_blank=True)
            if "" in ([text] if isinstance(text, str) else text):
                warnings.warn(_BLANK, stacklevel=2)
        if images is not None:
            if isinstance(images, list | tuple) and all(
                isinstance(i, list | tuple) for i in images
            ):
                images = [*chain(*images)]  # one row per image, as in CLIPProcessor
            if _pop_unscaled(kwargs):
                images = _to_eight_bits(images)
            images = load_images(images)
            if self._unpacks_images():
                images = [*map(_unpack, images)] if isinstance(images, list) else _unpack(images)
        filled = self._fill_defaults(kwargs)
        if text is not None:
            self._require_room(filled["text_kwargs"])
        batch = BatchFeature()
        if images is not None:
            batch.update(super().__call__(images=images, **filled))
            count = len(images) if isinstance(images, list) else 1
            if len(batch["pixel_values"]) != count:
                raise ValueError(
                    "The image processor must return one row per image, but returned "
                    f"{len(batch['pixel_values'])} for {count}. It may cut images into tiles. "
                    "Restore processor_config.json from the original model folder."
                )
        if text is not None:
            limit = filled["text_kwargs"]["max_length"]
            with _tokenizing:
                batch.update(super().__call__(text=text, **filled))
                self._count_truncated(text, batch, limit=limit, on_long_text=on_long_text)
        return batch

    @staticmethod
    def open_image(source: Any, *, name: str, **limits: Any) -> Image.Image:
        """Open an image for a later call, after checking its header against the limits.

        Args:
            source: A path, a binary file, or a PIL image.
            name: Name of the image in error messages.
            **limits: Fields of `ImageLimits` that override `get_image_limits`.

        Returns:
            The image, which will be decoded on first use.

        Raises:
            ValueError: The source is not an image, or exceeds the limits.
        """
        return read_image_header(source, name=name, limits=get_image_limits(**limits))

    def list_ids(self, texts: Iterable[str]) -> tuple[list[list[int]], list[bool]]:
        """Return the token ids of each text: the same ids as from a call, but without padding.

        Args:
            texts: N non-blank texts.

        Returns:
            One list of ids per text, and one boolean per text that is True if the text was
            truncated.

        Raises:
            ValueError: A text is blank or not a string (the message names it), or the maximum
                length leaves no room for any text.
        """
        texts = clean_list(texts)
        self._require_room({"max_length": self.longest_text, "truncation": True})
        with _tokenizing:
            encoded = self.tokenizer(
                texts, truncation=True, max_length=self.longest_text, padding=False
            )
        return encoded["input_ids"], [bool(row.overflowing) for row in encoded.encodings]

    @property
    def longest_text(self) -> int:
        """Maximum tokens per text: the smaller of `max_text_length` and the tokenizer's maximum."""
        # sentence-transformers' max_seq_length sets the latter.
        return min(self.max_text_length, int(self.tokenizer.model_max_length))

    def _unpacks_images(self) -> bool:
        """Return whether the image processor converts PIL images to arrays itself, slowly."""
        from transformers.image_processing_backends import TorchvisionBackend

        reads = getattr(type(self.image_processor), "process_image", None)
        return reads is TorchvisionBackend.process_image

    def _fill_defaults(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Collect the tokenizer's options in `text_kwargs` and add the defaults.

        The oldest supported version of transformers ignores some options outside `text_kwargs`.
        """
        common = dict(kwargs.pop("common_kwargs", None) or {})
        nested = dict(kwargs.pop("text_kwargs", None) or {})
        known = set(TextKwargs.__annotations__)
        flat = {name: kwargs.pop(name) for name in known & set(kwargs)}
        if twice := sorted(set(flat) & set(nested)):
            raise ValueError(f"Set both flat and in text_kwargs: {twice}. Set each only once.")
        options = {**common, **nested, **flat}
        tensors = options.pop("return_tensors", "pt")
        if options.get("max_length", 0) is None:  # None means the default, as in tokenizers
            del options["max_length"]
        defaults = {"padding": True, "truncation": True, "max_length": self.longest_text}
        text_kwargs = {k: v for k, v in {**defaults, **options}.items() if k in known}
        common = {k: v for k, v in common.items() if k not in text_kwargs}
        common["return_tensors"] = tensors
        return {**kwargs, "text_kwargs": text_kwargs, "common_kwargs": common}

    def _require_room(self, text_kwargs: dict[str, Any]) -> None:
        """Raise ValueError if a length leaves no room for a caption: nothing would be truncated."""
        length = _check_length(text_kwargs["max_length"], "max_length")
        num_prompt = self.tokenizer.num_special_tokens_to_add()
        if text_kwargs["truncation"] and length <= num_prompt:
            raise ValueError(
                f"max_length={length} leaves no room for a caption: the prompt alone has "
                f"{num_prompt} tokens. Set it to at least {num_prompt + 1}."
            )

    def _count_truncated(
        self, text: str | list[str], batch: BatchFeature, *, limit: int, on_long_text: str
    ) -> None:
        texts = [text] if isinstance(text, str) else text
        mask = batch["attention_mask"]
        rows = [mask] if np.ndim(mask[0]) == 0 else mask  # rows may be lists of unequal length
        lengths = [int(np.asarray(row).sum()) for row in rows]
        # A shorter text was not truncated. With truncation off, a text may be longer.
        least = min(limit, self.tokenizer.model_max_length)
        full = [number for number, length in enumerate(lengths) if length >= least]
        if not full:
            return
        full_ids = self.tokenizer([texts[i] for i in full], truncation=False, verbose=False)
        length_of = {i: len(ids) for i, ids in zip(full, full_ids["input_ids"], strict=True)}
        long = [number for number, length in length_of.items() if length > limit]
        if long and on_long_text == "error":
            raise ValueError(
                f"{len(long)} of {len(texts)} texts have more than {limit} tokens (the first is "
                f"text number {long[0] + 1}). Shorten them, or pass on_long_text='truncate'."
            )
        self.num_truncated_texts += sum(length_of[i] > lengths[i] for i in full)


def _unpack(image: Any) -> Any:
    # A dimension of up to 4 could be mistaken for the channels.
    return unpack_pixels(image) if isinstance(image, Image.Image) and min(image.size) > 4 else image


def _pop_unscaled(kwargs: dict[str, Any]) -> bool:
    """Remove `do_rescale` of False or None (the default), and return whether any was False."""
    levels = {name: dict(kwargs[name] or {}) for name in _IMAGE_LEVELS if name in kwargs}
    kwargs.update(levels)
    places = [p for p in (kwargs, *levels.values()) if p.get("do_rescale", True) in _NOT_TRUE]
    return False in [place.pop("do_rescale") for place in places]


def _to_eight_bits(images: Any) -> Any:
    """Round float images in [0, 1] to 8 bits, which image processors then rescale as usual."""
    if isinstance(images, list | tuple):
        return [*map(_to_eight_bits, images)]
    dtype = str(getattr(images, "dtype", type(images).__name__))
    if "float" not in dtype or not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(
            f"do_rescale=False needs float images in [0, 1], not {dtype}"
            f"{' outside it' if 'float' in dtype else ''}. Remove it, or scale the pixels."
        )
    scaled = (images * 255).round()
    return scaled.byte() if hasattr(scaled, "byte") else scaled.astype(np.uint8)


def _refuse_options(kwargs: Mapping[str, Any], image_processor: Any) -> None:
    """Raise ValueError on unknown options, which transformers would silently drop."""
    extra = getattr(getattr(image_processor, "valid_kwargs", None), "__annotations__", ())
    text, images = set(TextKwargs.__annotations__), {*ImagesKwargs.__annotations__, *extra}
    either = text | images
    known = {"text_kwargs": text, "images_kwargs": images, "common_kwargs": either}
    places: dict[str, Mapping[str, Any]] = {place: kwargs.get(place) or {} for place in known}
    places["flat"] = {k: v for k, v in kwargs.items() if k not in {*known, *_NOT_READ}}
    unknown = sorted(
        option
        for place, options in places.items()
        for option in options
        if option not in known.get(place, either) | _NOT_TAKEN
    )
    refused = sorted(
        option
        for options in places.values()
        for option in _NOT_TAKEN & set(options)
        if options[option] not in (None, False)
    )
    if unknown:
        taken = sorted({"on_long_text", *known, *either} - _NOT_TAKEN)
        raise ValueError(
            f"LLM2CLIPProcessor has no options {unknown}, or not at this level. Known: {taken}. "
            "Correct the spelling, or remove them."
        )
    if refused:
        raise ValueError(f"{refused}: each row must be one caption or one image. Remove them.")
    if any(not options.get("return_attention_mask", True) for options in places.values()):
        raise ValueError("return_attention_mask=False: the model needs the mask. Remove it.")


def _check_image_processor(image_processor: Any) -> None:
    """Raise ValueError for settings that cannot have been used to train a tower."""
    sides = {
        f"{name} {side}": pixels
        for name in ("size", "crop_size")
        for side, pixels in dict(getattr(image_processor, name, None) or {}).items()
    }
    most = dict.fromkeys(sides, _MOST_PIXELS) | {"max_num_patches": _MOST_PATCHES}
    sizes = sides | {"max_num_patches": getattr(image_processor, "max_num_patches", None)}
    wrong = [f"{n}={v}, at most {most[n]}" for n, v in sizes.items() if (v or 0) > most[n]]
    if wrong:
        raise ValueError(
            f"The image processor's images would be too large for any tower: {'; '.join(wrong)}. "
            "Restore processor_config.json from the original model folder."
        )
    rounding = getattr(image_processor, "crop_rounding", None)
    if rounding is not None:  # only the script of an ONNX folder reads it
        raise ValueError(
            f"The image processor is a {type(image_processor).__name__}, which would ignore "
            f"crop_rounding={rounding!r} and crop differently. Restore processor_config.json from "
            "the original model folder, or build the folder again."
        )
    for name in ("image_mean", "image_std"):
        values = getattr(image_processor, name, None)
        if isinstance(values, list | tuple) and len(values) != 3:
            raise ValueError(
                f"{name}={values} must have three numbers, for red, green and blue. Restore "
                "processor_config.json from the original model folder."
            )


def _check_length(length: Any, name: str) -> int:
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f"{name}={length!r} must be a positive integer (tokens).")
    return length


def clean_texts(text: Any, *, takes_blank: bool = False) -> str | list[str]:
    """Check captions with `check_texts`, and strip them.

    Most tokenizers strip texts as well, but some keep whitespace as tokens.
    """
    if isinstance(text, str):
        check_texts(text, takes_blank=takes_blank)
        return text.strip()
    # Iterating over a table yields column names, and over a set an arbitrary order.
    is_table = isinstance(text, Mapping) or len(getattr(text, "shape", (1,))) != 1
    if is_table or isinstance(text, bytes | Set) or not isinstance(text, Iterable):
        raise ValueError(
            f"text must be one non-blank string or a list of them, not {type(text).__name__}."
        )
    texts = list(text)
    check_texts(texts, takes_blank=takes_blank)
    return [caption.strip() for caption in texts]


def clean_list(texts: Any) -> list[str]:
    """Strip a list of captions; raise ValueError for a single string."""
    if isinstance(texts, str):
        raise ValueError(f"Got one string ({texts[:40]!r}). Pass a list of captions.")
    return list(clean_texts(texts))


def check_texts(text: str | list[str], *, takes_blank: bool = False) -> None:
    """Raise ValueError that names the captions that are blank, not strings or not valid Unicode."""
    errors = []
    for number, caption in enumerate([text] if isinstance(text, str) else text, start=1):
        if not isinstance(caption, str):
            errors.append(f"number {number} is {type(caption).__name__}, not str")
        elif not (takes_blank or caption.strip()):
            errors.append(f"number {number} is blank: {caption!r}")
        elif not _is_unicode(caption):
            errors.append(f"number {number} has an unpaired surrogate: {caption[:40]!r}")
    if not isinstance(text, str) and not text:
        errors.append("the list is empty")
    if errors:
        shown = "; ".join(errors[:8]) + ("; …" if len(errors) > 8 else "")
        raise ValueError(
            f"Every caption must be a non-blank string, but {len(errors)} are not: {shown}. "
            "Pass one string or a flat list of strings."
        )


def _is_unicode(text: str) -> bool:
    """Return whether a text can be encoded as UTF-8, as tokenizers require."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
