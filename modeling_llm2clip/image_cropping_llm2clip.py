"""Image processors that crop as torchvision does, one pixel beside transformers' crop.

CLIP, EVA and timm train with torchvision's `CenterCrop`. torchvision rounds half of an odd margin
to the even number, transformers rounds it down. Of a margin of 3 pixels, torchvision cuts 2 on the
left and transformers 1, which changes every pixel.

Uploaded with the weights. transformers has no classes of these names, so a program that lacks this
code refuses the image processor. A setting of transformers' own class would be ignored there.
"""

from __future__ import annotations

from typing import Any

from transformers import CLIPImageProcessor, CLIPImageProcessorPil


class _TorchvisionCrop:
    _auto_class = "AutoImageProcessor"  # makes save_pretrained copy the code

    def center_crop(self, image: Any, size: Any, **kwargs: Any) -> Any:
        """Crop the center of images.

        Args:
            image: (…, H, W), an array or a tensor.
            size: Height and width. Smaller images are padded; the base pads as torchvision does.
            **kwargs: Further arguments of the base.
        """
        top, left = (
            max(0, round((have - want) / 2))
            for have, want in zip(image.shape[-2:], (size.height, size.width), strict=True)
        )
        image = image[..., top : top + size.height, left : left + size.width]
        return super().center_crop(image, size, **kwargs)  # type: ignore[misc]

    def to_dict(self) -> dict[str, Any]:
        """Return the settings, with the classes that a program without this package loads."""
        classes = [f"{cls.__module__.split('.')[-1]}.{cls.__name__}" for cls in _CLASSES]
        settings: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        return settings | {"auto_map": {"AutoImageProcessor": classes}}


class LLM2CLIPImageProcessor(_TorchvisionCrop, CLIPImageProcessor):  # type: ignore[misc]
    """CLIP's image processor, which computes with torchvision."""


class LLM2CLIPImageProcessorPil(_TorchvisionCrop, CLIPImageProcessorPil):  # type: ignore[misc]
    """CLIP's image processor, which computes with Pillow."""


_CLASSES = (LLM2CLIPImageProcessorPil, LLM2CLIPImageProcessor)  # transformers wants this order
