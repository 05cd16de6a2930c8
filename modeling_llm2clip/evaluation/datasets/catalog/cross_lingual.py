"""Retrieval in other languages: Flickr30k-CN, COCO-CN, Crossmodal-3600, Multi30k, the emoji."""

from __future__ import annotations

from functools import partial

from ..dataset_spec import DatasetSpec
from ..readers.json_records import read_xm3600
from ..readers.numbered_lines import read_coco_cn, read_flickr30k_cn
from ..readers.own_records import read_emoji
from ..readers.parallel_lines import read_multi30k
from ..readers.parquet_columns import Columns, read_either
from ..retrieval_dataset import build_retrieval_dataset

_WHOLE = {"texts": "white space at the ends removed, line breaks made spaces"}
_MULTI30K_CITATION = "Elliott et al., Multi30K, VL 2016; French and Czech: WMT 2017 and 2018"
_MULTI30K_LICENSE = "Flickr terms of use; images for research only"

# Captions of each language, of 261,375 in all (Thapliyal et al., EMNLP 2022).
_XM3600_CAPTIONS = {
    "ar": 7367, "bn": 3600, "cs": 7207, "da": 7264, "de": 8643, "el": 7204, "en": 7200, "es": 8614,
    "fa": 7245, "fi": 7127, "fil": 7109, "fr": 8562, "he": 7200, "hi": 8503, "hr": 7280, "hu": 7216,
    "id": 7126, "it": 8471, "ja": 7185, "ko": 7650, "mi": 4732, "nl": 8059, "no": 7213, "pl": 7141,
    "pt": 7243, "quz": 7200, "ro": 7123, "ru": 7200, "sv": 7273, "sw": 7046, "te": 7200, "th": 7200,
    "tr": 7233, "uk": 7215, "vi": 7350, "zh": 7174,
}  # fmt: skip
_XM3600_COLUMNS = Columns(
    image="image", name="image_id", captions="captions", files="**/{lang}-*.parquet"
)


def _multi30k(split: str, year: int, languages: tuple[str, ...]) -> DatasetSpec:
    return DatasetSpec(
        name="multi30k" if year == 2016 else f"multi30k-{year}",
        title=f"Multi30k, task 1, test of {year} (Flickr)",
        kind="retrieval",
        languages=languages,
        counts={"images": 1000, "captions": 1000},
        license=_MULTI30K_LICENSE,
        citation=_MULTI30K_CITATION,
        source="github.com/multi30k/dataset, folder data/task1; images as its README says",
        files=f"raw/{split}.<lang>.gz and image_splits/{split}.txt; give the folder of images",
        protocol={"split": split, **_WHOLE},
        build=partial(build_retrieval_dataset, read=partial(read_multi30k, split=split)),
    )


DATASETS = (
    DatasetSpec(
        name="flickr30k-cn",
        title="Flickr30k-CN, test split, translated by people",
        kind="retrieval",
        languages=("zh",),
        counts={"images": 1000, "captions": 5000},
        license="captions MIT (repository of Flickr30k-CN), research only (Flickr30k-CNA); "
        "images: Flickr terms of use, research only",
        citation="Lan, Li, Dong, Fluency-Guided Cross-Lingual Image Captioning, ACM MM 2017",
        source="Flickr30k-CNA of zero.so.com/download.html, folder test (the captions of "
        "github.com/li-xirong/cross-lingual-cap, not cut into words); images: as flickr30k",
        files="flickr30k_cn_test.txt; give flickr30k-images as the folder of images",
        # 29,783 images to train on, where Karpathy's split has 29,000.
        protocol={"split": "test (its own, not Karpathy's)", **_WHOLE},
        captions_per_image=5,
        build=partial(build_retrieval_dataset, read=read_flickr30k_cn),
    ),
    DatasetSpec(
        name="coco-cn",
        title="COCO-CN, test split, captions written by people",
        kind="retrieval",
        languages=("zh",),
        counts={"images": 1000, "captions": 1053},
        license="captions MIT; images: Flickr terms of use",
        citation="Li et al., COCO-CN, IEEE T-MM 2019, arXiv:1805.08661",
        source="huggingface.co/datasets/AIMClab/COCO-CN; images: COCO 2014",
        files="coco-cn_test.txt and imageid.human-written-caption.txt, train2014/*.jpg and "
        "val2014/*.jpg",
        protocol={"split": "test", "fields": "human-written-caption", **_WHOLE},
        build=partial(build_retrieval_dataset, read=read_coco_cn),
    ),
    DatasetSpec(
        name="xm3600",
        title="Crossmodal-3600, all captions of a language",
        kind="retrieval",
        languages=tuple(_XM3600_CAPTIONS),
        counts={"images": 3600},
        counts_of_language={
            lang: {"captions": captions} for lang, captions in _XM3600_CAPTIONS.items()
        },
        license="captions CC BY 4.0; images CC BY 2.0, as their attribution file says",
        citation="Thapliyal et al., Crossmodal-3600, EMNLP 2022, arXiv:2205.12522",
        source="google.github.io/crossmodal-3600; "
        "hub:mteb/xm3600@536cd45bbfe53de9b08c0483bb4a76a4bd3673fa",
        files="captions.jsonl and images/*.jpg, or Parquet files <lang>-*.parquet",
        protocol={"split": "all", **_WHOLE},
        build=partial(
            build_retrieval_dataset,
            read=partial(read_either, columns=_XM3600_COLUMNS, other=read_xm3600),
        ),
        # Each language has the images in it once more.
        hub_files="*/{lang}-*.parquet",
    ),
    _multi30k("test_2016_flickr", 2016, ("en", "de", "fr", "cs")),
    _multi30k("test_2017_flickr", 2017, ("en", "de", "fr")),
    DatasetSpec(
        name="emoji",
        title="The package's emoji that its demo holds out (with seed 0), with their names",
        kind="retrieval",
        languages=("en", "de", "fr", "es", "it", "pt", "ru", "ar", "hi", "zh", "ja", "ko"),
        counts={"images": 300, "captions": 300},
        license="images Apache-2.0 (Noto) and MIT (Fluent); names Unicode-3.0",
        citation="Noto Emoji (Google); CLDR annotations (Unicode)",
        source="in the package",
        files="none are needed",
        protocol={"split": "held out by the demo", "texts": "CLDR short name"},
        build=partial(build_retrieval_dataset, read=read_emoji),
        is_embedded=True,
    ),
)
