"""Prompts that a class name is put into.

The eighty of ImageNet are those that CLIP's authors published with their results (arXiv:2103.00020;
github.com/openai/CLIP, `notebooks/Prompt_Engineering_for_ImageNet.ipynb`). They are facts of the
protocol: another spelling is another score. The order does not matter, since their embeddings are
averaged.
"""

from __future__ import annotations

SIMPLE_TEMPLATE = "a photo of a {}."

# Each of these stands there with "a" and with "the".
_WITH_BOTH_ARTICLES = (
    "a bad photo of {}.",
    "a low resolution photo of {}.",
    "a rendering of {}.",
    "graffiti of {}.",
    "a cropped photo of {}.",
    "a tattoo of {}.",
    "a bright photo of {}.",
    "a dark photo of {}.",
    "a drawing of {}.",
    "a close-up photo of {}.",
    "a black and white photo of {}.",
    "a painting of {}.",
    "a pixelated photo of {}.",
    "a sculpture of {}.",
    "a jpeg corrupted photo of {}.",
    "a blurry photo of {}.",
    "a photo of {}.",
    "a good photo of {}.",
    "a doodle of {}.",
    "a sketch of {}.",
    "a rendition of {}.",
    "art of {}.",
    "itap of {}.",
)
# Of these, the article stands before the adjective.
_ADJECTIVES_AFTER_ARTICLE = (
    "hard to see",
    "clean",
    "dirty",
    "cool",
    "nice",
    "weird",
    "large",
    "small",
)
_KINDS = ("embroidered", "plastic", "origami", "toy", "cartoon", "plushie")
_OTHERS = (
    "a photo of many {}.",
    "a photo of my {}.",
    "a photo of one {}.",
    "a {} in a video game.",
    "the {} in a video game.",
    "itap of my {}.",
)

IMAGENET_TEMPLATES: tuple[str, ...] = (
    *(
        text.replace("{}", f"{article} {{}}")
        for text in _WITH_BOTH_ARTICLES
        for article in ("a", "the")
    ),
    *(
        f"a photo of {article} {adjective} {{}}."
        for adjective in _ADJECTIVES_AFTER_ARTICLE
        for article in ("a", "the")
    ),
    *(f"{article} {kind} {{}}." for kind in _KINDS for article in ("a", "the")),
    *_OTHERS,
)
