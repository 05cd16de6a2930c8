"""Retrieval by short English captions: Flickr30k and COCO."""

from __future__ import annotations

from functools import partial

from ..card import SetCard
from ..readers.coco_captions import read_coco_captions
from ..readers.karpathy import read_karpathy
from ..readers.parquet import Columns, read_either
from ..retrieval import build_retrieval_set

_SALESFORCE = "https://storage.googleapis.com/sfr-vision-language-research/datasets"
_COCO_CITATION = "Lin et al., Microsoft COCO, ECCV 2014, arXiv:1405.0312; captions arXiv:1504.00325"
_COCO_LICENCE = "captions CC BY 4.0 (COCO Consortium); pictures: Flickr terms of use"
_FLICKR30K_COLUMNS = Columns(
    picture="image", name="filename", captions="caption", only={"split": "test"}
)
_FIVE = {"texts": "white space at the ends and line breaks removed; first five of a picture"}

CARDS = (
    SetCard(
        name="flickr30k",
        title="Flickr30k, Karpathy's test split of 1,000",
        kind="retrieval",
        languages=("en",),
        counts={"pictures": 1000, "captions": 5000},
        licence="captions: none with the files; pictures: Flickr terms of use, research only",
        citation="Young et al., TACL 2014; split: Karpathy and Fei-Fei, arXiv:1412.2306",
        source=f"{_SALESFORCE}/flickr30k_test.json; pictures: shannon.cs.illinois.edu/"
        "DenotationGraph; or all of it: "
        "hub:nlphuji/flickr30k@f5fbeaae027ee156ec0e2c6c5317dccc3e758b83",
        files="flickr30k_test.json or dataset_flickr30k.json, and flickr30k-images/*.jpg; or "
        "Parquet files",
        protocol={"split": "test (Karpathy)", **_FIVE},
        captions_per_picture=5,
        build=partial(
            build_retrieval_set,
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
    SetCard(
        name="coco",
        title="COCO, Karpathy's test split of 5,000, first five captions",
        kind="retrieval",
        languages=("en",),
        counts={"pictures": 5000, "captions": 25000},
        licence=_COCO_LICENCE,
        citation=f"{_COCO_CITATION}; split: Karpathy and Fei-Fei, arXiv:1412.2306",
        source=f"{_SALESFORCE}/coco_karpathy_test.json; pictures: val2014.zip of cocodataset.org",
        files="coco_karpathy_test.json or dataset_coco.json, and val2014/*.jpg",
        protocol={"split": "test (Karpathy)", **_FIVE},
        captions_per_picture=5,
        checksums={"coco_karpathy_test.json": "md5:3ff34b0ef2db02d01c37399f6a2a6cd1"},
        build=partial(
            build_retrieval_set,
            read=partial(
                read_karpathy,
                files=("coco_karpathy_test.json", "dataset_coco.json"),
                advice=f"Get it from {_SALESFORCE}/coco_karpathy_test.json.",
            ),
        ),
    ),
    SetCard(
        name="coco-val2017",
        title="COCO val2017 with its official captions, first five",
        kind="retrieval",
        languages=("en",),
        counts={"pictures": 5000, "captions": 25000},
        licence=_COCO_LICENCE,
        citation=_COCO_CITATION,
        source="annotations_trainval2017.zip and val2017.zip of cocodataset.org",
        files="annotations/captions_val2017.json; give val2017 as the folder of pictures",
        protocol={"split": "val2017", **_FIVE},
        captions_per_picture=5,
        build=partial(build_retrieval_set, read=read_coco_captions),
    ),
)
