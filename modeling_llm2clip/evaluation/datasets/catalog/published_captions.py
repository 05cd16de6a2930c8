"""Published captions that retrieve images: short and long English ones, and other languages.

Karpathy's split comes in two forms: a list of `{"image", "caption": […]}`, only the test split
(Salesforce, for ALBEF and BLIP; what upstream downloads), and his own `{"images": [{"split",
"filename", "filepath", "sentences": [{"raw"}]}]}` with all splits. COCO has more than five captions
for some images: 25,010 for 5,000.

There are two packages of Flickr30k-CN: in that of `cross-lingual-cap` the captions are split into
words with their parts of speech (`一个:m 男人:n`), for another task; Flickr30k-CNA has them whole.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from ..dataset_spec import CLEANED_TEXTS, DatasetSpec
from .caption_readers import (
    JsonCaptions,
    ParquetCaptions,
    read_coco_captions,
    read_coco_cn,
    read_emoji,
    read_flickr30k_cn,
    read_multi30k,
    read_urban1k,
)

_SALESFORCE = "https://storage.googleapis.com/sfr-vision-language-research/datasets"
_COCO_CITATION = "Lin et al., Microsoft COCO, ECCV 2014, arXiv:1405.0312; captions arXiv:1504.00325"
_COCO_LICENSE = "captions CC BY 4.0 (COCO Consortium); images: Flickr terms of use"
_FIRST_FIVE = {"texts": "whitespace at the ends and line breaks removed; first five of an image"}
_SHAREGPT4V_FILE = "share-captioner_coco_lcs_sam_1246k_1107.json"
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
# Captions of each language, of 261,375 in all (Thapliyal et al., EMNLP 2022).
_XM3600_CAPTIONS = {
    "ar": 7367, "bn": 3600, "cs": 7207, "da": 7264, "de": 8643, "el": 7204, "en": 7200, "es": 8614,
    "fa": 7245, "fi": 7127, "fil": 7109, "fr": 8562, "he": 7200, "hi": 8503, "hr": 7280, "hu": 7216,
    "id": 7126, "it": 8471, "ja": 7185, "ko": 7650, "mi": 4732, "nl": 8059, "no": 7213, "pl": 7141,
    "pt": 7243, "quz": 7200, "ro": 7123, "ru": 7200, "sv": 7273, "sw": 7046, "te": 7200, "th": 7200,
    "tr": 7233, "uk": 7215, "vi": 7350, "zh": 7174,
}  # fmt: skip


def _read_karpathy(*files: str) -> JsonCaptions:
    return JsonCaptions(
        files=(files,),
        advice=f"Get it from {_SALESFORCE}/{files[0]}.",
        image=("image", "filename"),
        captions=("caption.*", "sentences.*.raw"),
        items="images",
        parent="filepath",
        other_splits=("train", "restval", "val"),
    )


def _read_iiw(
    *subsets: str,
    captions: tuple[str, ...] = ("IIW", "DOCCI", "IIW-P5B"),
    name: str = "{folder}{name}",  # the same name may recur in another subset
    **options: Any,
) -> JsonCaptions:
    return JsonCaptions(
        files=tuple((f"{name}/data.jsonl", f"datasets/{name}/data.jsonl") for name in subsets),
        advice="Give the folder `datasets` of github.com/google/imageinwords.",
        image=("image/key", "image"),
        captions=captions,
        name=name,
        lacking="no 'image/key' or 'image', or captions that are not texts",
        **options,
    )


def _make_multi30k(split: str, year: int, languages: tuple[str, ...]) -> DatasetSpec:
    return DatasetSpec(
        name="multi30k" if year == 2016 else f"multi30k-{year}",
        title=f"Multi30k, task 1, test of {year} (Flickr)",
        languages=languages,
        counts={"images": 1000, "captions": 1000},
        license="Flickr terms of use; images for research only",
        citation="Elliott et al., Multi30K, VL 2016; French and Czech: WMT 2017 and 2018",
        source="github.com/multi30k/dataset, folder data/task1; images as its README says",
        files=f"raw/{split}.<lang>.gz and image_splits/{split}.txt; name the folder of images",
        protocol={"split": split, **CLEANED_TEXTS},
        read=partial(read_multi30k, split=split),
    )


DATASETS = (
    DatasetSpec(
        name="flickr30k",
        title="Flickr30k, Karpathy's test split of 1,000",
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
        read=ParquetCaptions(
            columns={"image": "image", "file_name": "filename", "captions": "caption"},
            only={"split": "test"},
            otherwise=_read_karpathy("flickr30k_test.json", "dataset_flickr30k.json"),
        ),
    ),
    DatasetSpec(
        name="coco",
        title="COCO, Karpathy's test split of 5,000, first five captions",
        counts={"images": 5000, "captions": 25000},
        license=_COCO_LICENSE,
        citation=f"{_COCO_CITATION}; split: Karpathy and Fei-Fei, arXiv:1412.2306",
        source=f"{_SALESFORCE}/coco_karpathy_test.json; images: val2014.zip of cocodataset.org",
        files="coco_karpathy_test.json or dataset_coco.json, and val2014/*.jpg",
        protocol={"split": "test (Karpathy)", **_FIRST_FIVE},
        captions_per_image=5,
        checksums={"coco_karpathy_test.json": "md5:3ff34b0ef2db02d01c37399f6a2a6cd1"},
        read=_read_karpathy("coco_karpathy_test.json", "dataset_coco.json"),
    ),
    DatasetSpec(
        name="coco-val2017",
        title="COCO val2017 with its official captions, first five",
        counts={"images": 5000, "captions": 25000},
        license=_COCO_LICENSE,
        citation=_COCO_CITATION,
        source="annotations_trainval2017.zip and val2017.zip of cocodataset.org",
        files="annotations/captions_val2017.json; name val2017 as the folder of images",
        protocol={"split": "val2017", **_FIRST_FIVE},
        captions_per_image=5,
        read=read_coco_captions,
    ),
    DatasetSpec(
        name="sharegpt4v-1k",
        title="ShareGPT4V, the first 1,000 records of Share-Captioner",
        counts={"images": 1000, "captions": 1000},
        license="captions CC BY-NC 4.0; images: SAM's own terms",
        citation="Chen et al., ShareGPT4V, ECCV 2024, arXiv:2311.12793",
        source="huggingface.co/datasets/Lin-Chen/ShareGPT4V; images: as its dataset card says",
        files=f"{_SHAREGPT4V_FILE}, and the images at the paths that it names, such as "
        "sam/images/*.jpg",
        protocol={"split": "first 1000 records", **CLEANED_TEXTS},
        read=JsonCaptions(
            files=((_SHAREGPT4V_FILE,),),
            advice="Get it from huggingface.co/datasets/Lin-Chen/ShareGPT4V.",
            image=("image",),
            captions=("conversations.1.value",),
            first=1000,  # of 1.2 million in 1.5 GB
            lacking="no 'image', or no answer in 'conversations'",
        ),
    ),
    DatasetSpec(
        name="urban1k",
        title="Urban1k of Long-CLIP",
        counts={"images": 1000, "captions": 1000},
        license="CC BY-NC 4.0",
        citation="Zhang et al., Long-CLIP, ECCV 2024, arXiv:2403.15378",
        source="huggingface.co/datasets/BeichenZhang/Urban1k, Urban1k.zip",
        files="caption/1.txt … caption/1000.txt and image/1.jpg … image/1000.jpg",
        protocol={"split": "all", "texts": "first line of the file, without whitespace around it"},
        read=read_urban1k,
    ),
    DatasetSpec(
        name="docci",
        title="DOCCI, test split",
        counts={"images": 5000, "captions": 5000},
        license="CC BY 4.0",
        citation="Onoe et al., DOCCI, ECCV 2024, arXiv:2404.19753",
        source="google.github.io/docci",
        files="docci_descriptions.jsonlines, and images/*.jpg of docci_images.tar.gz",
        protocol={"split": "test", **CLEANED_TEXTS},
        read=JsonCaptions(
            files=(("docci_descriptions.jsonlines",),),
            advice="Get it and docci_images.tar.gz from google.github.io/docci.",
            image=("image_file",),
            captions=("description",),
            subfolder="images",
            other_splits=("train", "qual_dev", "qual_test"),
            lacking="no 'split', 'image_file' and 'description'",
        ),
    ),
    DatasetSpec(
        name="iiw-400",
        title="ImageInWords, IIW-400 with its images, captions by people",
        counts={"images": 400, "captions": 400},
        license="CC BY 4.0",
        citation=_IIW_CITATION,
        source=f"{_IIW_SOURCE}; images: docci_images_aar.tar.gz of google.github.io/docci",
        files="IIW-400/data.jsonl; name the folder of the unpacked images",
        protocol={"split": "IIW-400", "fields": "IIW", **CLEANED_TEXTS},
        checksums=_IIW_CHECKSUMS,
        read=_read_iiw("IIW-400", captions=("IIW",), name="{name}.jpg"),
    ),
    DatasetSpec(
        name="iiw",
        title="ImageInWords, the texts of all five evaluation sets",
        dataset_type="captions",
        counts={"images": 2612, "captions": 2812},
        license="CC BY 4.0",
        citation=_IIW_CITATION,
        source=_IIW_SOURCE,
        files="IIW-400, DOCCI_Test, DCI_Test, CM_3600 and LocNar_Eval, each with data.jsonl",
        protocol={"split": "all", "fields": "IIW, DOCCI, IIW-P5B", **CLEANED_TEXTS},
        checksums=_IIW_CHECKSUMS,
        read=_read_iiw("IIW-400", "DOCCI_Test", "DCI_Test", "CM_3600", "LocNar_Eval"),
    ),
    DatasetSpec(
        name="iiw-pairs",
        title="ImageInWords, the images that have two long captions",
        dataset_type="captions",
        counts={"images": 200, "captions": 400},
        license="CC BY 4.0",
        citation=_IIW_CITATION,
        source=_IIW_SOURCE,
        files="IIW-400 and DOCCI_Test, each with data.jsonl",
        protocol={
            "split": "images with two captions",
            "fields": "IIW, DOCCI, IIW-P5B",
            **CLEANED_TEXTS,
        },
        checksums=_IIW_CHECKSUMS,
        read=_read_iiw("IIW-400", "DOCCI_Test", min_captions=2),
    ),
    DatasetSpec(
        name="flickr30k-cn",
        title="Flickr30k-CN, test split, translated by people",
        languages=("zh",),
        counts={"images": 1000, "captions": 5000},
        license="captions MIT (repository of Flickr30k-CN), research only (Flickr30k-CNA); "
        "images: Flickr terms of use, research only",
        citation="Lan, Li, Dong, Fluency-Guided Cross-Lingual Image Captioning, ACM MM 2017",
        source="Flickr30k-CNA of zero.so.com/download.html, folder test (the captions of "
        "github.com/li-xirong/cross-lingual-cap, not split into words); images: as flickr30k",
        files="flickr30k_cn_test.txt; name flickr30k-images as the folder of images",
        # 29,783 images to train on, where Karpathy's split has 29,000.
        protocol={"split": "test (its own, not Karpathy's)", **CLEANED_TEXTS},
        captions_per_image=5,
        read=read_flickr30k_cn,
    ),
    DatasetSpec(
        name="coco-cn",
        title="COCO-CN, test split, captions written by people",
        languages=("zh",),
        counts={"images": 1000, "captions": 1053},
        license="captions MIT; images: Flickr terms of use",
        citation="Li et al., COCO-CN, IEEE T-MM 2019, arXiv:1805.08661",
        source="huggingface.co/datasets/AIMClab/COCO-CN; images: COCO 2014",
        files="coco-cn_test.txt and imageid.human-written-caption.txt, train2014/*.jpg and "
        "val2014/*.jpg",
        protocol={"split": "test", "fields": "human-written-caption", **CLEANED_TEXTS},
        read=read_coco_cn,
    ),
    DatasetSpec(
        name="xm3600",
        title="Crossmodal-3600, all captions of a language",
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
        protocol={"split": "all", **CLEANED_TEXTS},
        read=ParquetCaptions(
            columns={"image": "image", "file_name": "image_id", "captions": "captions"},
            files="**/{lang}-*.parquet",
            otherwise=JsonCaptions(
                files=(("captions.jsonl",),),
                advice="Unpack captions.zip and images.tgz from google.github.io/crossmodal-3600.",
                image=("image/key",),
                captions=("{lang}.caption.*",),
                name="{name}.jpg",
                subfolder="images",
                lacking="no 'image/key', or no captions in {lang!r}",
            ),
        ),
        # The files of each language contain the images once more.
        hub_files="*/{lang}-*.parquet",
    ),
    _make_multi30k("test_2016_flickr", 2016, ("en", "de", "fr", "cs")),
    _make_multi30k("test_2017_flickr", 2017, ("en", "de", "fr")),
    DatasetSpec(
        name="emoji",
        title="The package's emoji that its demo holds out with seed 0, with their names",
        languages=("en", "de", "fr", "es", "it", "pt", "ru", "ar", "hi", "zh", "ja", "ko"),
        counts={"images": 300, "captions": 300},
        license="images Apache-2.0 (Noto) and MIT (Fluent); names Unicode-3.0",
        citation="Noto Emoji (Google); CLDR annotations (Unicode)",
        source="in the package",
        files="none",
        protocol={"split": "held out by the demo", "texts": "CLDR short name"},
        read=read_emoji,
        origin="package",
    ),
)
