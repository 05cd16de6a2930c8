"""Retrieval by short English captions: Flickr30k and COCO."""

from __future__ import annotations

from functools import partial

from ..dataset_spec import DatasetSpec
from ..readers.coco_captions import read_coco_captions
from ..readers.karpathy import read_karpathy
from ..readers.parquet_columns import Columns, read_either
from ..retrieval_dataset import build_retrieval_dataset

_SALESFORCE = "https://storage.googleapis.com/sfr-vision-language-research/datasets"
_COCO_CITATION = "Lin et al., Microsoft COCO, ECCV 2014, arXiv:1405.0312; captions arXiv:1504.00325"
_COCO_LICENSE = "captions CC BY 4.0 (COCO Consortium); images: Flickr terms of use"
_FLICKR30K_COLUMNS = Columns(
    image="image", name="filename", captions="caption", only={"split": "test"}
)
_FIVE = {"texts": "white space at the ends and line breaks removed; first five of an image"}

DATASETS = (
    DatasetSpec(
        name="flickr30k",
        title="Flickr30k, Karpathy's test split of 1,000",
        kind="retrieval",
        languages=("en",),
        counts={"images": 1000, "captions": 5000},
        license="captions: none with the files; images: Flickr terms of use, research only",
        citation="Young et al., TACL 2014; split: Karpathy and Fei-Fei, arXiv:1412.2306",
        source=f"{_SALESFORCE}/flickr30k_test.json; images: shannon.cs.illinois.edu/"
        "DenotationGraph; or all of it: "
        "hub:nlphuji/flickr30k@f5fbeaae027ee156ec0e2c6c5317dccc3e758b83",
        files="flickr30k_test.json or dataset_flickr30k.json, and flickr30k-images/*.jpg; or "
        "Parquet files",
        protocol={"split": "test (Karpathy)", **_FIVE},
        captions_per_image=5,
        build=partial(
            build_retrieval_dataset,
            read=partial(
                read_either,
                columns=_FLICKR30K_COLUMNS,
                other=partial(
                    read_karpathy,
                    files=("flickr30k_test.json", "dataset_flickr30k.json"),
                    advice=f"Get it from {_SALESFORCE}/flickr30k_test.json.",
                ),
            ),
        ),
    ),
    DatasetSpec(
        name="coco",
        title="COCO, Karpathy's test split of 5,000, first five captions",
        kind="retrieval",
        languages=("en",),
        counts={"images": 5000, "captions": 25000},
        license=_COCO_LICENSE,
        citation=f"{_COCO_CITATION}; split: Karpathy and Fei-Fei, arXiv:1412.2306",
        source=f"{_SALESFORCE}/coco_karpathy_test.json; images: val2014.zip of cocodataset.org",
        files="coco_karpathy_test.json or dataset_coco.json, and val2014/*.jpg",
        protocol={"split": "test (Karpathy)", **_FIVE},
        captions_per_image=5,
        checksums={"coco_karpathy_test.json": "md5:3ff34b0ef2db02d01c37399f6a2a6cd1"},
        build=partial(
            build_retrieval_dataset,
            read=partial(
                read_karpathy,
                files=("coco_karpathy_test.json", "dataset_coco.json"),
                advice=f"Get it from {_SALESFORCE}/coco_karpathy_test.json.",
            ),
        ),
    ),
    DatasetSpec(
        name="coco-val2017",
        title="COCO val2017 with its official captions, first five",
        kind="retrieval",
        languages=("en",),
        counts={"images": 5000, "captions": 25000},
        license=_COCO_LICENSE,
        citation=_COCO_CITATION,
        source="annotations_trainval2017.zip and val2017.zip of cocodataset.org",
        files="annotations/captions_val2017.json; give val2017 as the folder of images",
        protocol={"split": "val2017", **_FIVE},
        captions_per_image=5,
        build=partial(build_retrieval_dataset, read=read_coco_captions),
    ),
)
