"""Zero-shot classification: ImageNet-1k, and any folder of class folders."""

from __future__ import annotations

from functools import partial

from ..classification_dataset import build_classification_dataset
from ..dataset_spec import DatasetSpec
from ..readers.labeled_folders import read_image_folder, read_imagenet
from ..templates import IMAGENET_TEMPLATES, SIMPLE_TEMPLATE

DATASETS = (
    DatasetSpec(
        name="imagenet",
        title="ImageNet-1k, validation images, the 80 templates of CLIP",
        kind="classification",
        languages=("en",),
        counts={"images": 50000, "classes": 1000},
        license="ImageNet's terms of access: research only",
        citation="Russakovsky et al., IJCV 2015, arXiv:1409.0575; templates arXiv:2103.00020",
        source="image-net.org, or the Kaggle competition imagenet-object-localization-challenge",
        files="val/<synset>/*.JPEG, or LOC_val_solution.csv and ILSVRC/Data/CLS-LOC/val/*.JPEG; "
        "names: class_names.txt with `<synset> <name>` lines, or LOC_synset_mapping.txt",
        protocol={"split": "validation"},
        build=partial(
            build_classification_dataset, read=read_imagenet, templates=IMAGENET_TEMPLATES
        ),
    ),
    DatasetSpec(
        name="image-folder",
        title="Your own images, one folder a class",
        kind="classification",
        languages=(),
        counts={},
        license="yours",
        citation="none",
        source="your disk",
        files="<class>/*.jpg; class_names.txt with `<class> <name>` lines, where names differ",
        protocol={"split": "all"},
        build=partial(
            build_classification_dataset, read=read_image_folder, templates=(SIMPLE_TEMPLATE,)
        ),
    ),
)
