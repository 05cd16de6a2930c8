"""Retrieval by long English captions: ShareGPT4V, Urban1k, DOCCI, ImageInWords."""

from __future__ import annotations

from functools import partial

from ..dataset_spec import DatasetSpec
from ..readers.json_records import read_docci, read_iiw
from ..readers.sharegpt4v import FILE, read_sharegpt4v
from ..readers.urban1k import read_urban1k
from ..retrieval_dataset import build_retrieval_dataset

_WHOLE = {"texts": "white space at the ends removed, line breaks made spaces"}
_IIW_CITATION = "Garg et al., ImageInWords, EMNLP 2024, arXiv:2405.02793"
_IIW_SOURCE = "github.com/google/imageinwords, folder `datasets`"
_IIW_CHECKSUMS = {
    "CM_3600/data.jsonl": "sha256:f96bb2736d9e5b63022b516f374fba1546f1a4ae2576d54f51dacfd257fcd093",
    "DCI_Test/data.jsonl": (
        "sha256:59ec2a3b5c3885a3313b73656d57db2bf9861d48e4414b0692833ba9380a2cf1"
    ),
    "DOCCI_Test/data.jsonl": (
        "sha256:f422b726c1af21a5154282cf8790ce110e03d5c94457d77d7002a50f17c984d1"
    ),
    "IIW-400/data.jsonl": "sha256:88809dde73731208fa98f72430225a9122c8f7e3c4ebcde98e255d62c5f203f2",
    "LocNar_Eval/data.jsonl": (
        "sha256:8c88e9007e412b5972b94697b338d16a80424158cb66a05c83f7844280a50c6c"
    ),
}

DATASETS = (
    DatasetSpec(
        name="sharegpt4v-1k",
        title="ShareGPT4V, the first 1,000 records of Share-Captioner",
        kind="retrieval",
        languages=("en",),
        counts={"images": 1000, "captions": 1000},
        license="captions CC BY-NC 4.0; images: SAM's own terms",
        citation="Chen et al., ShareGPT4V, ECCV 2024, arXiv:2311.12793",
        source="huggingface.co/datasets/Lin-Chen/ShareGPT4V; images: as its card says",
        files=f"{FILE}, and the images at the paths that it names, such as sam/images/*.jpg",
        protocol={"split": "first 1000 records", **_WHOLE},
        build=partial(build_retrieval_dataset, read=partial(read_sharegpt4v, records=1000)),
    ),
    DatasetSpec(
        name="urban1k",
        title="Urban1k of Long-CLIP",
        kind="retrieval",
        languages=("en",),
        counts={"images": 1000, "captions": 1000},
        license="CC BY-NC 4.0",
        citation="Zhang et al., Long-CLIP, ECCV 2024, arXiv:2403.15378",
        source="huggingface.co/datasets/BeichenZhang/Urban1k, Urban1k.zip",
        files="caption/1.txt … caption/1000.txt and image/1.jpg … image/1000.jpg",
        protocol={"split": "all", "texts": "first line of the file, without white space around it"},
        build=partial(build_retrieval_dataset, read=read_urban1k),
    ),
    DatasetSpec(
        name="docci",
        title="DOCCI, test split",
        kind="retrieval",
        languages=("en",),
        counts={"images": 5000, "captions": 5000},
        license="CC BY 4.0",
        citation="Onoe et al., DOCCI, ECCV 2024, arXiv:2404.19753",
        source="google.github.io/docci",
        files="docci_descriptions.jsonlines, and images/*.jpg of docci_images.tar.gz",
        protocol={"split": "test", **_WHOLE},
        build=partial(build_retrieval_dataset, read=read_docci),
    ),
    DatasetSpec(
        name="iiw-400",
        title="ImageInWords, IIW-400 with its images, captions by people",
        kind="retrieval",
        languages=("en",),
        counts={"images": 400, "captions": 400},
        license="CC BY 4.0",
        citation=_IIW_CITATION,
        source=f"{_IIW_SOURCE}; images: docci_images_aar.tar.gz of google.github.io/docci",
        files="IIW-400/data.jsonl; give the unpacked images as the folder of images",
        protocol={"split": "IIW-400", "fields": "IIW", **_WHOLE},
        checksums=_IIW_CHECKSUMS,
        build=partial(
            build_retrieval_dataset,
            read=partial(read_iiw, subsets=("IIW-400",), fields=("IIW",)),
        ),
    ),
    DatasetSpec(
        name="iiw",
        title="ImageInWords, the texts of all five evaluation sets",
        kind="captions",
        languages=("en",),
        counts={"images": 2612, "captions": 2812},
        license="CC BY 4.0",
        citation=_IIW_CITATION,
        source=_IIW_SOURCE,
        files="IIW-400, DOCCI_Test, DCI_Test, CM_3600 and LocNar_Eval, each with data.jsonl",
        protocol={"split": "all", "fields": "IIW, DOCCI, IIW-P5B", **_WHOLE},
        checksums=_IIW_CHECKSUMS,
        build=partial(build_retrieval_dataset, read=read_iiw),
    ),
    DatasetSpec(
        name="iiw-pairs",
        title="ImageInWords, the images that have two long captions",
        kind="captions",
        languages=("en",),
        counts={"images": 200, "captions": 400},
        license="CC BY 4.0",
        citation=_IIW_CITATION,
        source=_IIW_SOURCE,
        files="IIW-400 and DOCCI_Test, each with data.jsonl",
        protocol={"split": "images with two captions", "fields": "IIW, DOCCI, IIW-P5B", **_WHOLE},
        checksums=_IIW_CHECKSUMS,
        build=partial(
            build_retrieval_dataset,
            read=partial(read_iiw, subsets=("IIW-400", "DOCCI_Test"), only_pairs=True),
        ),
    ),
)
