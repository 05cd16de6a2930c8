"""Image processors that crop like torchvision, up to one pixel off from transformers' crop.

CLIP, EVA and timm train with torchvision's `CenterCrop`. torchvision rounds half of an odd margin
to the nearest even number, whereas transformers rounds down. From a margin of 3 pixels, torchvision
cuts 2 on the left and transformers 1, which changes every pixel.

Uploaded with the weights. transformers has no classes with these names, so a program without this
code fails to load the image processor instead of silently ignoring an extra setting.
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
            size: Height and width. The base class pads smaller images like torchvision.
            **kwargs: Further arguments for the base class.
        """
        top, left = (
            max(0, round((have - want) / 2))
            for have, want in zip(image.shape[-2:], (size.height, size.width), strict=True)
        )
        image = image[..., top : top + size.height, left : left + size.width]
        return super().center_crop(image, size, **kwargs)  # type: ignore[misc]

    def to_dict(self) -> dict[str, Any]:
        """Return the settings, which name the classes to load for programs without this package."""
        classes = [f"{cls.__module__.split('.')[-1]}.{cls.__name__}" for cls in _CLASSES]
        settings: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        return settings | {"auto_map": {"AutoImageProcessor": classes}}


class LLM2CLIPImageProcessor(_TorchvisionCrop, CLIPImageProcessor):  # type: ignore[misc]
    """CLIP's image processor with the torchvision backend."""


class LLM2CLIPImageProcessorPil(_TorchvisionCrop, CLIPImageProcessorPil):  # type: ignore[misc]
    """CLIP's image processor with the Pillow backend."""


_CLASSES = (LLM2CLIPImageProcessorPil, LLM2CLIPImageProcessor)  # transformers requires this order
