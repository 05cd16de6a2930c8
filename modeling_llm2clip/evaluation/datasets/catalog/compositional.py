"""Compositional sets: SugarCrepe, with images and as texts, and Winoground."""

from __future__ import annotations

from functools import partial

from ..choice_dataset import build_choice_dataset
from ..dataset_spec import DatasetSpec
from ..readers.sugarcrepe import read_sugarcrepe, read_sugarcrepe_text
from ..readers.winoground import read_winoground

_SUGARCREPE_CITATION = "Hsieh et al., SugarCrepe, NeurIPS 2023, arXiv:2306.14610"
_SUGARCREPE_CHECKSUMS = {
    "add_att.json": "sha256:012d88d729693d193760e6f3393b06a1cf874380a9db0062e937201199fe044d",
    "add_obj.json": "sha256:1b9d76b93139a937b8dc1ada92a4f05ecc821bb3c291d752428bafadd4bb0682",
    "replace_att.json": "sha256:9fe55fd4c0a9ad1f85d486d9f6d0215b41f867eb025026e7f7b5ce44352545ee",
    "replace_obj.json": "sha256:9d299600639947e9d15281a9ded1382b376cf4ea088a8d08a1314bfe76e81898",
    "replace_rel.json": "sha256:356bcc2fc4c6aed3f4d9fd50acc58489bb1fe70c28791f9368d4cbf9ea39cdc9",
    "swap_att.json": "sha256:7a7ce04e5c4c80412b48c6f0c1347fb1a2f5d54c0be6aa429b64d390e442f8d0",
    "swap_obj.json": "sha256:073cdb8e253d053614e80710834d9773b09dbc1dd0a412f6f9492262caa1dcad",
}
_WHOLE = {"texts": "white space at the ends removed, line breaks made spaces"}

DATASETS = (
    DatasetSpec(
        name="sugarcrepe",
        title="SugarCrepe: a caption and a hard negative of an image",
        kind="choice",
        languages=("en",),
        counts={"items": 7511},
        license="texts MIT; images: COCO val2017, Flickr terms of use",
        citation=_SUGARCREPE_CITATION,
        source="github.com/RAIVNLab/sugar-crepe, folder data; images: val2017.zip of "
        "cocodataset.org",
        files="add_att.json … swap_obj.json; give val2017 as the folder of images",
        protocol={"split": "all seven categories", **_WHOLE},
        checksums=_SUGARCREPE_CHECKSUMS,
        build=partial(build_choice_dataset, form="image", read=read_sugarcrepe),
    ),
    DatasetSpec(
        name="sugarcrepe-text",
        title="SugarCrepe as texts: another caption stands for the image",
        kind="choice",
        languages=("en",),
        counts={"items": 7511},
        license="texts MIT; other captions CC BY 4.0 (COCO Consortium)",
        citation=f"{_SUGARCREPE_CITATION}; COCO captions, arXiv:1504.00325",
        source="github.com/RAIVNLab/sugar-crepe, folder data, and annotations_trainval2017.zip of "
        "cocodataset.org",
        files="add_att.json … swap_obj.json and captions_val2017.json",
        protocol={
            "split": "all seven categories",
            "anchor": "first COCO caption of the image that is not the true caption",
            **_WHOLE,
        },
        checksums=_SUGARCREPE_CHECKSUMS,
        build=partial(build_choice_dataset, form="text", read=read_sugarcrepe_text),
    ),
    DatasetSpec(
        name="winoground",
        title="Winoground: two images, two captions of the same words",
        kind="choice",
        languages=("en",),
        counts={"items": 400},
        license="Winoground's own agreement (Getty Images), accepted on the Hub",
        citation="Thrush et al., Winoground, CVPR 2022, arXiv:2204.03162",
        source="hub:facebook/winoground@b400e173549071916ad1b3d449293bc8d8b4b763",
        files="Parquet files, or examples.jsonl and images/ of images.zip",
        protocol={"split": "test", **_WHOLE},
        build=partial(build_choice_dataset, form="images", read=read_winoground),
    ),
)
