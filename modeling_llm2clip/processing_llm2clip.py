"""Images and texts into what the model takes; bad ones are refused by name.

Travels to the Hub beside the weights. The prompt around every caption is not here but in the saved
tokenizer, so that a bare tokenizer and a pipeline give the same ids as this processor.
"""

from __future__ import annotations

import http.client
import io
import os
import threading
import urllib.request
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import BatchFeature, PreTrainedConfig, ProcessorMixin
from transformers.processing_utils import ImagesKwargs, TextKwargs

from .loading_llm2clip import naming_code

# What Pillow's decoders raise, each in its own way.
_DECODER_ERRORS = (OSError, SyntaxError, ValueError, RuntimeError, EOFError)
# What urllib, http and sockets raise; ValueError for an address that is none.
_FETCH_ERRORS = (OSError, http.client.HTTPException, ValueError)
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
_SIXTEEN_BIT_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I")
_UNSCALED = "do_rescale=False is for floats in [0, 1]; leave it out, or give those."
_MOST_SHOWN = 200  # characters of what was given for a path
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

    Raises: ValueError when `max_text_length` is no positive integer.
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

        Raises: ValueError naming the file that names code without which nothing can be loaded.
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

        Raises: ValueError when it has no `max_text_length`, misspelt or lost: a default in its
            place would cut texts elsewhere than the checkpoint does.
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
        Returns: `pixel_values` (B, 3, H, W) float32, `input_ids` and `attention_mask` (B, L).
        Raises: ValueError naming every blank or non-text caption, the image that is broken, or
            the option that is not known.
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

    def list_ids(self, texts: Iterable[str]) -> tuple[list[list[int]], int]:
        """Return the token ids of each text as calling would, unpadded, and how many were cut.

        Raises: ValueError naming every blank or non-text caption.
        """
        texts = clean_list(texts)
        with _tokenizing:
            encoded = self.tokenizer(
                texts, truncation=True, max_length=self.longest_text, padding=False
            )
        return encoded["input_ids"], sum(bool(row.overflowing) for row in encoded.encodings)

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

    Raises: ValueError for what is neither, or naming every caption that is not text or is blank.
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


def load_images(images: Any, *, rescales: bool | None = True) -> Any:
    """Turn an image or a list of images into RGB PIL images; arrays and tensors stay such.

    Args:
        rescales: whether pixels will be divided by 255. If not, only floats in [0, 1] are taken;
            None: nor would they be for any image, so floats in [0, 1] are taken too.
    Raises: ValueError naming every image that is missing, broken, too large or of an unknown
        range.
    """
    if len(getattr(images, "shape", ())) == 4:
        images = list(images)
    if not isinstance(images, list | tuple):
        return _load_image(images, 0, rescales=rescales)
    if not images:
        raise ValueError("images is an empty list; give at least one image.")
    loaded, errors = [], []
    for number, image in enumerate(images):
        try:
            loaded.append(_load_image(image, number, rescales=rescales))
        except ValueError as error:
            errors.append(str(error))
    if errors:
        more = f"\nand {len(errors) - 8} more" if len(errors) > 8 else ""
        raise ValueError("\n".join(errors[:8]) + more)
    return loaded


def _load_image(image: Any, number: int, *, rescales: bool | None) -> Any:
    if hasattr(image, "shape") and hasattr(image, "dtype"):
        return _check_array(image, f"image number {number}", rescales=rescales)
    if isinstance(image, str | os.PathLike):
        loaded = _open_image(os.fspath(image))
    elif isinstance(image, Image.Image):
        loaded = _decode(image, getattr(image, "filename", "") or f"image number {number}")
    else:
        held = isinstance(image, bytes | memoryview | io.IOBase)
        way_out = " Open it with PIL.Image.open, bytes as io.BytesIO." if held else ""
        raise ValueError(
            f"Image number {number} is {type(image).__name__}; give a PIL image, a path, a URL, "
            f"an array or a tensor.{way_out}"
        )
    if rescales is False:
        raise ValueError(f"Image number {number} has 8 bits a color. {_UNSCALED}")
    return loaded


def _check_array(image: Any, name: str, *, rescales: bool | None) -> Any:
    """Refuse pixels whose place or range is not known, and make 16 bit 8 bit.

    A float's range cannot be told from its values: a dark image in 0 to 255 is a bright one in
    0 to 1.
    """
    shape = tuple(image.shape)
    if len(shape) != 3 or 0 in shape or (shape[0] == 3) == (shape[2] == 3):
        raise ValueError(
            f"{name} is an array of shape {shape}; give RGB as (H, W, 3) or (3, H, W). Of another "
            "array, Image.fromarray makes an image that is taken, gray or with transparency too."
        )
    image = image.detach() if hasattr(image, "detach") else image
    dtype = getattr(image.dtype, "name", str(image.dtype).removeprefix("torch."))
    if dtype in ("uint8", "uint16") and rescales is False:
        raise ValueError(f"{name} has {dtype} pixels. {_UNSCALED}")
    if dtype not in ("uint8", "uint16"):
        _check_floats(image, dtype, name, rescales=rescales)
    if dtype == "bfloat16":  # which NumPy has not
        image = image.float()
    if dtype == "uint16":
        pixels = np.asarray(image.cpu() if hasattr(image, "cpu") else image)
        image = (pixels // 257).astype(np.uint8)
    if shape[0] == 1:  # one row of pixels would be taken for one channel
        image = image.permute(2, 0, 1) if hasattr(image, "permute") else image.transpose(2, 0, 1)
    return image


def _check_floats(image: Any, dtype: str, name: str, *, rescales: bool | None) -> None:
    if "float" not in dtype or rescales:
        raise ValueError(
            f"{name} has {dtype} pixels, whose range is not known. Give uint8 (0 to 255), uint16 "
            "(0 to 65535), or floats in [0, 1] together with do_rescale=False."
        )
    low, high = float(image.min()), float(image.max())
    if not (low >= 0 and high <= 1):  # NaN fails both
        raise ValueError(
            f"{name} has pixels from {low:g} to {high:g}; with do_rescale=False they must be in "
            "[0, 1]."
        )


def _open_image(path: str) -> Image.Image:
    if path.startswith("data:"):
        raise ValueError(
            f"{path[:40]}…: data URIs are not read. Decode it (base64.b64decode), and open "
            "the bytes with PIL.Image.open(io.BytesIO(…))."
        )
    # Not transformers' load_image, which turns transparency black and clips 16 bit.
    source = _fetch(path) if path.lower().startswith(("http://", "https://")) else path
    if source is path and not os.path.isfile(path):  # noqa: PTH113  # False for what is no path
        raise ValueError(f"{path[:_MOST_SHOWN]}: no such image. Correct the path.")
    with read_header(source, name=path) as image:
        return _decode(image, path)


def read_header(source: Any, *, name: str) -> Image.Image:
    """Open an image without decoding it.

    Args:
        source: what Pillow opens: a path, or a file of bytes.
    Raises: ValueError with the name: not an image, broken within its header, or too large.
    """
    try:
        return Image.open(source)
    except UnidentifiedImageError as error:
        raise ValueError(f"{name}: not an image that Pillow reads, or empty.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: {error} Shrink the image first.") from error
    except _DECODER_ERRORS as error:
        from_system = getattr(error, "errno", None) is not None  # no permission, for one
        problem = "cannot be read" if from_system else "the image is truncated or corrupt"
        raise ValueError(f"{name}: {problem} ({error}).") from error


def _fetch(address: str) -> io.BytesIO:
    request = urllib.request.Request(address, headers={"User-Agent": "modeling_llm2clip"})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return io.BytesIO(response.read())
    except _FETCH_ERRORS as error:
        raise ValueError(f"{address}: the image cannot be fetched ({error}).") from error


def _decode(image: Image.Image, name: str) -> Image.Image:
    """Decode fully, turn upright, and make it RGB on white."""
    if 0 in image.size:
        raise ValueError(f"{name}: the image has no pixels ({image.size}).")
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
    except _DECODER_ERRORS as error:
        raise ValueError(f"{name}: the image is truncated or corrupt ({error}).") from error
    except (AssertionError, AttributeError) as error:  # how Pillow says it
        raise ValueError(f"{name}: the image's file is closed. Open it anew.") from error
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in _SIXTEEN_BIT_MODES:
        return _scale_sixteen_bit(image, name)
    if image.mode == "F":
        raise ValueError(f"{name}: float pixels have no known range. Convert it to 8 or 16 bit.")
    if image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _scale_sixteen_bit(image: Image.Image, name: str) -> Image.Image:
    # Pillow's own conversion clips at 255 and would turn almost every image white.
    pixels = np.asarray(image).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError(f"{name}: pixels outside 0 to 65535. Convert it to 8 or 16 bit.")
    pixels[pixels == image.info.get("transparency", -1)] = 65535  # the one transparent gray
    return Image.fromarray((pixels // 257).astype(np.uint8)).convert("RGB")
