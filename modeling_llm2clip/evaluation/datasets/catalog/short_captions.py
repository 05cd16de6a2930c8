"""Retrieval by short English captions: Flickr30k and COCO.

Karpathy's split comes in two forms:

| form | file |
| --- | --- |
| a list of `{"image", "caption": […]}`, only the test split (Salesforce, for ALBEF and BLIP; what
upstream downloads) | `flickr30k_test.json`, `coco_karpathy_test.json` |
| `{"images": [{"split", "filename", "filepath", "sentences": [{"raw"}]}]}`, all splits (Karpathy's
own) | `dataset_flickr30k.json`, `dataset_coco.json` |

COCO has more than five captions for some images: 25,010 for 5,000.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from ....data.sources.coco import read_coco
from ....data.sources.json_files import read_json
from ..dataset_spec import DatasetSpec, ReadRequest
from ..retrieval_dataset import PublishedRecord, build_retrieval_dataset, read_parquet_or
from ..validation import DatasetValidator

COCO_FILES = ("captions_val2017.json", "annotations/captions_val2017.json")
COCO_ADVICE = (
    "Give the folder that contains annotations/captions_val2017.json, from "
    "annotations_trainval2017.zip of cocodataset.org."
)
_SALESFORCE = "https://storage.googleapis.com/sfr-vision-language-research/datasets"
_COCO_CITATION = "Lin et al., Microsoft COCO, ECCV 2014, arXiv:1405.0312; captions arXiv:1504.00325"
_COCO_LICENSE = "captions CC BY 4.0 (COCO Consortium); images: Flickr terms of use"
_FLICKR30K_COLUMNS = {"image": "image", "file_name": "filename", "captions": "caption"}
_FIRST_FIVE = {"texts": "whitespace at the ends and line breaks removed; first five of an image"}


def read_karpathy(
    request: ReadRequest, validator: DatasetValidator, *, files: tuple[str, ...], advice: str
) -> Iterator[PublishedRecord]:
    """Yield a record per image of the test split, in the file's order.

    Args:
        request: How the dataset is to be read.
        validator: Collects the errors.
        files: Names that the file may have.
        advice: Where to get it.

    Raises:
        ValueError: The file is missing or has another form.
    """
    file = validator.find_file(request.data_folder, *files, advice=advice)
    content = read_json(file)
    is_list = isinstance(content, list)
    items = content if is_list else content.get("images") if isinstance(content, dict) else None
    if not isinstance(items, list):
        raise ValueError(f"{file}: neither a list nor an object with 'images'. {advice}")
    for index, item in enumerate(items):
        place = f"{file.name} [{index}]"
        fields: dict[str, Any] = item if isinstance(item, dict) else {}
        if not is_list and fields.get("split") in ("train", "restval", "val"):
            continue
        if not is_list and fields.get("split") != "test":
            validator.errors.add("no split, or an unknown one", place)
            continue
        name, captions = _read_flat(fields) if is_list else _read_original(fields)
        if isinstance(name, str) and all(isinstance(caption, str) for caption in captions):
            yield PublishedRecord(place, name, tuple(captions))
        else:
            validator.errors.add("no name of an image, or captions that are not texts", place)


def _read_flat(fields: dict[str, Any]) -> tuple[Any, list[Any]]:
    captions = fields.get("caption")
    return fields.get("image"), captions if isinstance(captions, list) else [captions]


def _read_original(fields: dict[str, Any]) -> tuple[Any, list[Any]]:
    sentences = fields.get("sentences")
    captions = [
        sentence.get("raw") if isinstance(sentence, dict) else None
        for sentence in (sentences if isinstance(sentences, list) else [None])
    ]
    parts = [fields.get("filepath"), fields.get("filename")]
    name = "/".join(part for part in parts if isinstance(part, str) and part)
    return (name if isinstance(parts[1], str) and parts[1] else None), captions


def read_coco_captions(
    request: ReadRequest, validator: DatasetValidator
) -> Iterator[PublishedRecord]:
    """Yield a record per image of COCO's own caption file, in the order of its `images`.

    Args:
        request: How the dataset is to be read.
        validator: Collects the errors.
    """
    file = validator.find_file(request.data_folder, *COCO_FILES, advice=COCO_ADVICE)
    for raw in read_coco(file, validator.errors):
        name = raw.fields.get("file_name", raw.default_name)
        yield PublishedRecord(raw.place, str(name), tuple(raw.fields["captions"]))


DATASETS = (
    DatasetSpec(
        name="flickr30k",
        title="Flickr30k, Karpathy's test split of 1,000",
        dataset_type="retrieval",
        languages=("en",),
        counts={"images": 1000, "captions": 5000},
        license="captions: none with the files; images: Flickr terms of use, research only",
        citation="Young et al., TACL 2014; split: Karpathy and Fei-Fei, arXiv:1412.2306",
        source=f"{_SALESFORCE}/flickr30k_test.json; images: shannon.cs.illinois.edu/"
        "DenotationGraph; or all of it: "
        "hub:nlphuji/flickr30k@f5fbeaae027ee156ec0e2c6c5317dccc3e758b83",
        files="flickr30k_test.json or dataset_flickr30k.json, and flickr30k-images/*.jpg; or "
        "Parquet files",
        protocol={"split": "test (Karpathy)", **_FIRST_FIVE},
        captions_per_image=5,
        build=partial(
            build_retrieval_dataset,
            read=partial(
                read_parquet_or,
                columns=_FLICKR30K_COLUMNS,
                only={"split": "test"},
                otherwise=partial(
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
        dataset_type="retrieval",
        languages=("en",),
        counts={"images": 5000, "captions": 25000},
        license=_COCO_LICENSE,
        citation=f"{_COCO_CITATION}; split: Karpathy and Fei-Fei, arXiv:1412.2306",
        source=f"{_SALESFORCE}/coco_karpathy_test.json; images: val2014.zip of cocodataset.org",
        files="coco_karpathy_test.json or dataset_coco.json, and val2014/*.jpg",
        protocol={"split": "test (Karpathy)", **_FIRST_FIVE},
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
        dataset_type="retrieval",
        languages=("en",),
        counts={"images": 5000, "captions": 25000},
        license=_COCO_LICENSE,
        citation=_COCO_CITATION,
        source="annotations_trainval2017.zip and val2017.zip of cocodataset.org",
        files="annotations/captions_val2017.json; name val2017 as the folder of images",
        protocol={"split": "val2017", **_FIRST_FIVE},
        captions_per_image=5,
        build=partial(build_retrieval_dataset, read=read_coco_captions),
    ),
)
