"""Zero-shot classification: ImageNet-1k, and any folder of class folders."""

from __future__ import annotations

from functools import partial

from ..card import SetCard
from ..classification import build_classification_set
from ..readers.labelled_folders import read_image_folder, read_imagenet
from ..templates import IMAGENET_TEMPLATES, SIMPLE_TEMPLATE

CARDS = (
    SetCard(
        name="imagenet",
        title="ImageNet-1k, validation pictures, the 80 templates of CLIP",
        kind="classification",
        languages=("en",),
        counts={"pictures": 50000, "classes": 1000},
        licence="ImageNet's terms of access: research only",
        citation="Russakovsky et al., IJCV 2015, arXiv:1409.0575; templates arXiv:2103.00020",
        source="image-net.org, or the Kaggle competition imagenet-object-localization-challenge",
        files="val/<synset>/*.JPEG, or LOC_val_solution.csv and ILSVRC/Data/CLS-LOC/val/*.JPEG; "
        "names: class_names.txt with `<synset> <name>` lines, or LOC_synset_mapping.txt",
        protocol={"split": "validation"},
        build=partial(build_classification_set, read=read_imagenet, templates=IMAGENET_TEMPLATES),
    ),
    SetCard(
        name="image-folder",
        title="Your own pictures, one folder a class",
        kind="classification",
        languages=(),
        counts={},
        licence="yours",
        citation="none",
        source="your disk",
        files="<class>/*.jpg; class_names.txt with `<class> <name>` lines, where names differ",
        protocol={"split": "all"},
        build=partial(
            build_classification_set, read=read_image_folder, templates=(SIMPLE_TEMPLATE,)
        ),
    ),
)
