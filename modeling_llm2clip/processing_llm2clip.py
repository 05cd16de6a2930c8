"""Images and texts into what the model takes; bad ones are refused by name.

Travels to the Hub beside the weights. The prompt around every caption is not here but in the saved
tokenizer, so that a bare tokenizer and a pipeline give the same ids as this processor.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
from transformers import BatchFeature, PreTrainedConfig, ProcessorMixin
from transformers.processing_utils import ImagesKwargs, TextKwargs

from .image_loading_llm2clip import load_images
from .loading_llm2clip import naming_code

# Options of any processor that make something else of a row than one caption or one image; a
# caller of many kinds of processors may name them, but not use them.
_NOT_TAKEN = {
    "text_pair", "text_target", "text_pair_target", "is_split_into_words",
    "return_overflowing_tokens", "audio", "videos",
}  # fmt: skip
_NOT_READ = ("audio_kwargs", "videos_kwargs")  # sentence-transformers gives all kinds, always
# Where a file of a model is looked for.
_PLACE_OPTIONS = (
    "cache_dir", "force_download", "proxies", "token", "local_files_only", "revision", "subfolder",
)  # fmt: skip
# What transformers puts into a processor's dictionary beside processor_config.json.
_FROM_OTHER_FILES = {"chat_template", "audio_tokenizer"}
# A tokenizer keeps truncation and padding as its state between being told and reading a text, so
# threads that share one would get each other's lengths.
_tokenizing = threading.RLock()


class LLM2CLIPProcessor(ProcessorMixin):
    """Image processor and tokenizer of one checkpoint.

    Args:
        image_processor: any transformers image processor.
        tokenizer: the LLM's tokenizer with the checkpoint's prompt written into it.
        max_text_length: most tokens of a text, prompt included.

    Attributes:
        num_truncated_texts: how many texts were cut so far, ever; set it to 0 at will.

    Threads may share it. Beside them, leave its tokenizer alone: a bare tokenizer is not safe.

    Raises:
        ValueError: `max_text_length` is no positive integer.
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
        super().__init__(image_processor, tokenizer, **kwargs)  # type: ignore[no-untyped-call]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does, but never ask whether to run code of the folder.

        Raises:
            ValueError: naming the file that names code without which nothing can be loaded.
        """
        if kwargs.get("trust_remote_code"):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        kwargs["trust_remote_code"] = False
        with naming_code(pretrained_model_name_or_path, revision=kwargs.get("revision")):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def get_processor_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read `processor_config.json`; without that file take the text length from `config.json`.

        A folder lacks it where model, tokenizer and image processor were saved one by one.
        """
        place = {name: kwargs[name] for name in _PLACE_OPTIONS if name in kwargs}
        found: dict[str, Any]
        found, unused = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if set(found) <= _FROM_OTHER_FILES:
            config, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **place)
            if "max_text_length" in config:
                found["max_text_length"] = config["max_text_length"]
        return found, unused

    @classmethod
    def from_args_and_dict(
        cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any
    ) -> LLM2CLIPProcessor:
        """Build from the dictionary of a saved `processor_config.json`.

        Raises:
            ValueError: it has no `max_text_length`, misspelt or lost: a default in its place would
                cut texts elsewhere than the checkpoint does.
        """
        if "max_text_length" not in {*processor_dict, *kwargs}:
            raise ValueError(
                f"processor_config.json lacks max_text_length, and nothing is guessed; it has "
                f"{sorted(processor_dict)}. Restore it from the original checkpoint, or pass "
                "max_text_length."
            )
        return super().from_args_and_dict(args, processor_dict, **kwargs)  # type: ignore[no-any-return]

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
            images: an image or a list of them: PIL, path, URL, or RGB arrays and tensors,
                (H, W, 3) or (3, H, W): uint8, uint16 (scaled), or floats in [0, 1] together with
                `do_rescale=False`; a batch of them as one. Transparency becomes white, EXIF
                rotation is applied, of an animation the first frame counts.
            text: a caption or a list of them. Defaults: padding, truncation before the prompt's
                suffix, PyTorch tensors.
            on_long_text: `"truncate"` and count in `num_truncated_texts`, or `"error"`.
            **kwargs: for the tokenizer and the image processor, flat or as `text_kwargs`,
                `images_kwargs`, `common_kwargs`.

        Returns:
            `pixel_values` (B, 3, H, W) float32, `input_ids` and `attention_mask` (B, L).

        Raises:
            ValueError: naming every blank or non-text caption, the image that is broken, or the
                option that is not known.
        """
        if on_long_text not in ("truncate", "error"):
            raise ValueError(f"on_long_text must be 'truncate' or 'error', got {on_long_text!r}.")
        if images is None and text is None:
            raise ValueError("Got neither images nor text; give one of them, or both.")
        _refuse_options(kwargs, self.image_processor)
        if text is not None:
            text = clean_texts(text)
        if images is not None:
            images = load_images(images, rescales=self._rescales(kwargs))
        filled = self._fill_defaults(kwargs)
        if text is not None:
            self._require_room(filled["text_kwargs"])
        batch = BatchFeature()
        if images is not None:
            batch.update(super().__call__(images=images, **filled))
        if text is not None:
            limit = filled["text_kwargs"]["max_length"]
            with _tokenizing:
                batch.update(super().__call__(text=text, **filled))
                self._count_truncated(text, batch, limit=limit, on_long_text=on_long_text)
        return batch

    def list_ids(self, texts: Iterable[str]) -> tuple[list[list[int]], list[bool]]:
        """Return the token ids of each text as calling would, unpadded.

        Args:
            texts: non-blank texts, N of them.

        Returns:
            Ids of each text, and whether it was truncated, N of each.

        Raises:
            ValueError: a text is blank or not a string; all of them are named.
        """
        texts = clean_list(texts)
        with _tokenizing:
            encoded = self.tokenizer(
                texts, truncation=True, max_length=self.longest_text, padding=False
            )
        return encoded["input_ids"], [bool(row.overflowing) for row in encoded.encodings]

    @property
    def longest_text(self) -> int:
        """Most tokens of a text: by `max_text_length`, and by the tokenizer's own length."""
        # The latter is what sentence-transformers' max_seq_length sets.
        return min(self.max_text_length, int(self.tokenizer.model_max_length))

    def _rescales(self, kwargs: dict[str, Any]) -> bool | None:
        """Whether the image processor will divide pixels by 255; None if it never does."""
        nested = [kwargs.get(name) or {} for name in ("images_kwargs", "common_kwargs")]
        given = next((p["do_rescale"] for p in (kwargs, *nested) if "do_rescale" in p), None)
        if given:
            return True
        own = getattr(self.image_processor, "do_rescale", True)
        return (True if given is None else False) if own else None

    def _fill_defaults(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Sort the tokenizer's settings, wherever they were given, and add our defaults.

        Sorted here, because the oldest transformers we support loses some that are given flat.
        """
        common = dict(kwargs.pop("common_kwargs", None) or {})
        nested = dict(kwargs.pop("text_kwargs", None) or {})
        known = set(TextKwargs.__annotations__)
        flat = {name: kwargs.pop(name) for name in known & set(kwargs)}
        if twice := sorted(set(flat) & set(nested)):
            raise ValueError(f"Given twice, flat and in text_kwargs: {twice}. Give each once.")
        given = {**common, **nested, **flat}
        tensors = given.pop("return_tensors", "pt")
        if given.get("max_length", 0) is None:  # as in tokenizers: none of one's own
            del given["max_length"]
        defaults = {"padding": True, "truncation": True, "max_length": self.longest_text}
        text_kwargs = {k: v for k, v in {**defaults, **given}.items() if k in known}
        common = {k: v for k, v in common.items() if k not in text_kwargs}
        common["return_tensors"] = tensors
        return {**kwargs, "text_kwargs": text_kwargs, "common_kwargs": common}

    def _require_room(self, text_kwargs: dict[str, Any]) -> None:
        """Raise ValueError for a length that leaves a caption no token, which would cut nothing."""
        length = _check_length(text_kwargs["max_length"], "max_length")
        num_prompt = self.tokenizer.num_special_tokens_to_add()
        if text_kwargs["truncation"] and length <= num_prompt:
            raise ValueError(
                f"max_length={length} leaves no room for a caption: the prompt alone has "
                f"{num_prompt} tokens. Give at least {num_prompt + 1}."
            )

    def _count_truncated(
        self, text: str | list[str], batch: BatchFeature, *, limit: int, on_long_text: str
    ) -> None:
        texts = [text] if isinstance(text, str) else text
        mask = batch["attention_mask"]
        rows = [mask] if np.ndim(mask[0]) == 0 else mask  # rows may be unequally long lists
        lengths = [int(sum(row)) for row in rows]
        # Only a text of the greatest length, or beyond it untruncated, can have been longer.
        least = min(limit, self.tokenizer.model_max_length)
        full = [number for number, length in enumerate(lengths) if length >= least]
        if not full:
            return
        whole = self.tokenizer([texts[i] for i in full], truncation=False, verbose=False)
        length_of = {i: len(ids) for i, ids in zip(full, whole["input_ids"], strict=True)}
        long = [number for number, length in length_of.items() if length > limit]
        if long and on_long_text == "error":
            raise ValueError(
                f"{len(long)} of {len(texts)} texts have more than {limit} tokens (first: number "
                f"{long[0]}). Shorten them, or pass on_long_text='truncate'."
            )
        self.num_truncated_texts += sum(length_of[i] > lengths[i] for i in full)


def _refuse_options(kwargs: Mapping[str, Any], image_processor: Any) -> None:
    """Raise ValueError for options that nothing would read: transformers drops them."""
    own = getattr(getattr(image_processor, "valid_kwargs", None), "__annotations__", ())
    of_texts, of_images = set(TextKwargs.__annotations__), {*ImagesKwargs.__annotations__, *own}
    either = of_texts | of_images
    known = {"text_kwargs": of_texts, "images_kwargs": of_images, "common_kwargs": either}
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
            f"LLM2CLIPProcessor does not know {unknown}, at least not there. Known: {taken}. "
            "Correct the spelling, or leave them out."
        )
    if refused:
        raise ValueError(f"{refused}: a row is one caption or one image. Leave them out.")
    if any(options.get("return_attention_mask") is False for options in places.values()):
        raise ValueError("return_attention_mask=False: the model needs the mask. Leave it out.")


def _check_length(length: Any, name: str) -> int:
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f"{name}={length!r} is no length; give a positive integer of tokens.")
    return length


def clean_texts(text: Any) -> str | list[str]:
    """Return a caption, or a list of them, as the tokenizer is to get it: no blanks around it.

    The tokenizer strips too, but not blanks that are tokens of their own in some.

    Raises:
        ValueError: what is neither, or naming every caption that is not text or is blank.
    """
    if isinstance(text, str):
        check_texts(text)
        return text.strip()
    # An iteration over a table gives the names of its columns, over a set any order.
    is_table = isinstance(text, Mapping) or len(getattr(text, "shape", (1,))) != 1
    if is_table or isinstance(text, bytes | Set) or not isinstance(text, Iterable):
        raise ValueError(
            f"text is {type(text).__name__}; give one non-blank string or a list of them."
        )
    texts = list(text)
    check_texts(texts)
    return [caption.strip() for caption in texts]


def clean_list(texts: Any) -> list[str]:
    """Do the same where only a list will do: one string would be a list of letters."""
    if isinstance(texts, str):
        raise ValueError(f"Got one string ({texts[:40]!r}); give a list of captions.")
    return list(clean_texts(texts))


def check_texts(text: str | list[str]) -> None:
    """Raise ValueError naming every caption that is not text or is blank."""
    errors = []
    for number, caption in enumerate([text] if isinstance(text, str) else text):
        if not isinstance(caption, str):
            errors.append(f"number {number} is {type(caption).__name__}, not str")
        elif not caption.strip():
            errors.append(f"number {number} is blank: {caption!r}")
        elif not _is_unicode(caption):
            errors.append(f"number {number} has half a surrogate pair: {caption[:40]!r}")
    if not isinstance(text, str) and not text:
        errors.append("the list is empty")
    if errors:
        shown = "; ".join(errors[:8]) + ("; …" if len(errors) > 8 else "")
        raise ValueError(
            f"Every caption must be a non-blank string, {len(errors)} are not: {shown}. "
            "Give one string or a flat list of strings."
        )


def _is_unicode(text: str) -> bool:
    """Whether it can be written as UTF-8, which tokenizers read."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
