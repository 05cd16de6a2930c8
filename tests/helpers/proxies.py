"""What gateways, clients and servers do to inputs and embeddings, in front of a good endpoint.

Each is written as such programs are, not as the checks that look for it.
"""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Callable

import torch
import torch.nn.functional as F
from endpoints import Break, Endpoint, alter_texts
from PIL import Image, ImageOps
from torch import Tensor


def change_texts(change: Callable[[str], str]) -> Break:
    """Change every text."""
    return alter_texts(lambda honest, texts: honest([change(t).strip() or "." for t in texts]))


def change_images(change: Callable[[Image.Image], Image.Image]) -> Break:
    """Change every image after it is decoded, upright and on white."""

    def decode(content: bytes) -> Image.Image:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
        if image.mode == "RGBA":
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return change(image.convert("RGB"))

    def apply(endpoint: Endpoint) -> None:
        endpoint.decode = decode

    return apply


def cache_texts(key: Callable[[str], str]) -> Break:
    """Answer from a cache, in which texts are found by this key."""
    known: dict[str, Tensor] = {}

    def embed(honest: Callable[[list[str]], Tensor], texts: list[str]) -> Tensor:
        for text in texts:
            if key(text) not in known:
                known[key(text)] = honest([text])
        return torch.cat([known[key(text)] for text in texts])

    return alter_texts(embed)


def cache_images(key: Callable[[Image.Image], object]) -> Break:
    """Answer from a cache, in which images are found by this key."""

    def apply(endpoint: Endpoint) -> None:
        known: dict[object, Image.Image] = {}

        def decode(content: bytes) -> Image.Image:
            image = Image.open(io.BytesIO(content))
            image.load()
            return known.setdefault(key(image), image)

        endpoint.decode = decode

    return apply


def look_alike(image: Image.Image) -> bytes:
    """A perceptual hash: which pixels of a thumbnail of 8 × 8 are light."""
    gray = image.convert("L").resize((8, 8), Image.Resampling.BILINEAR)
    mean = sum(gray.tobytes()) / 64
    return bytes(value > mean for value in gray.tobytes())


@alter_texts
def drop_repeated(honest: Callable[[list[str]], Tensor], texts: list[str]) -> Tensor:
    """Encode each distinct text of a request once, and fill the rows up with the last one."""
    distinct = honest(list(dict.fromkeys(texts)))
    return torch.cat([distinct, distinct[-1:].expand(len(texts) - len(distinct), -1)])


def round_weights(endpoint: Endpoint) -> None:
    """Serve the LLM with 8 bits per weight."""
    with torch.no_grad():
        for weight in endpoint.model.text_model.parameters():
            if weight.ndim == 2:
                step = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-9) / 127
                weight.copy_((weight / step).round() * step)


def shrink(side: int, method: Image.Resampling) -> Break:
    """Keep images below a number of pixels a side, as gateways that count tokens do."""

    def apply(image: Image.Image) -> Image.Image:
        if max(image.size) <= side:
            return image
        scale = side / max(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        return image.resize(size, method)

    return change_images(apply)


def recompress(format_name: str, **options: object) -> Break:
    """Save images in a format that loses detail."""

    def apply(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, format=format_name, **options)
        return Image.open(io.BytesIO(file.getvalue())).convert("RGB")

    return change_images(apply)


def pad_square(image: Image.Image) -> Image.Image:
    """Put images on a black square."""
    side = max(image.size)
    square = Image.new("RGB", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def strip_marks(text: str) -> str:
    """Remove accents as search engines do."""
    parts = unicodedata.normalize("NFKD", text)
    return unicodedata.normalize("NFC", re.sub(r"[\u0300-\u036f]", "", parts))


def keep_half(embeds: Tensor) -> Tensor:
    """Answer half of the dimensions, and zeros in place of the others."""
    kept = embeds.clone()
    kept[:, embeds.shape[1] // 2 :] = 0
    return F.normalize(kept, dim=-1)
