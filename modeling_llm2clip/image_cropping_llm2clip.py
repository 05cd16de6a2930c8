"""Image processors that crop as torchvision does, one pixel beside those of transformers.

CLIP, EVA and timm train with torchvision's `CenterCrop`. It rounds half of an odd margin to the
even number, transformers rounds it down: of a margin of 3 pixels the one leaves out 2 on the left,
the other 1, which changes every pixel. A folder whose image processor has
`crop_rounding="torchvision"` gets the former.

Uploaded with the weights. The classes have the names of their bases, which files state.
"""

from __future__ import annotations

from typing import Any

import transformers


class _TorchvisionCrop:
    def center_crop(self, image: Any, size: Any, **kwargs: Any) -> Any:
        """Crop the center of images.

        Args:
            image: (…, H, W), an array or a tensor.
            size: height and width; what is smaller is padded, which the base does as torchvision.
            **kwargs: of the base.
        """
        top, left = (
            max(0, round((have - want) / 2))
            for have, want in zip(image.shape[-2:], (size.height, size.width), strict=True)
        )
        image = image[..., top : top + size.height, left : left + size.width]
        return super().center_crop(image, size, **kwargs)  # type: ignore[misc]


class CLIPImageProcessor(_TorchvisionCrop, transformers.CLIPImageProcessor):  # type: ignore[misc]
    """CLIP's, which computes with torchvision."""


class CLIPImageProcessorPil(_TorchvisionCrop, transformers.CLIPImageProcessorPil):  # type: ignore[misc]
    """CLIP's, which computes with Pillow."""


_CLASSES = {cls.__bases__[1]: cls for cls in (CLIPImageProcessor, CLIPImageProcessorPil)}


def set_crop_rounding(image_processor: Any, crop_rounding: str) -> Any:
    """Return an image processor that crops otherwise.

    Args:
        image_processor: any image processor; it stays as it is.
        crop_rounding: `"torchvision"`.

    Raises:
        ValueError: its class cannot crop so, or it is another rounding.
    """
    if type(image_processor) in _CLASSES.values() and crop_rounding == "torchvision":
        return image_processor
    own = _CLASSES.get(type(image_processor))
    if own is None or crop_rounding != "torchvision":
        raise ValueError(
            f"A {type(image_processor).__name__} cannot have crop_rounding={crop_rounding!r}: a "
            "CLIPImageProcessor can have 'torchvision'. Take a version of this package that knows "
            "it."
        )
    return own.from_dict({**image_processor.to_dict(), "crop_rounding": crop_rounding})
