"""Retrieval by long English captions: ShareGPT4V, Urban1k, DOCCI, ImageInWords."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from ....data.images.image_sources import IMAGE_SUFFIXES
from ....data.sources.json_files import iterate_json_list, read_json_lines
from ..dataset_spec import CLEANED_TEXTS, DatasetSpec, ReadRequest
from ..retrieval_dataset import PublishedRecord, build_retrieval_dataset
from ..validation import DatasetValidator, read_lines

_SHAREGPT4V_FILE = "share-captioner_coco_lcs_sam_1246k_1107.json"
_IIW_SUBSETS = ("IIW-400", "DOCCI_Test", "DCI_Test", "CM_3600", "LocNar_Eval")
_IIW_NAMES = ("image/key", "image")
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


def read_sharegpt4v(
    request: ReadRequest, validator: DatasetValidator, *, records: int
) -> Iterator[PublishedRecord]:
    """Yield the first records of a list of conversations: the image, and the model's description.

    The file has 1.2 million records in 1.5 GB, so it is read record by record, and not beyond the
    last one that is wanted.

    Args:
        request: How the dataset is to be read.
        validator: Collects the errors.
        records: Number of records.
    """
    file = validator.find_file(
        request.data_folder,
        _SHAREGPT4V_FILE,
        advice="Get it from huggingface.co/datasets/Lin-Chen/ShareGPT4V.",
    )
    for index, record in enumerate(islice(iterate_json_list(file), records)):
        place = f"{file.name} [{index}]"
        fields: dict[str, Any] = record if isinstance(record, dict) else {}
        turns = fields.get("conversations")
        answer = turns[1] if isinstance(turns, list) and len(turns) > 1 else None
        caption = answer.get("value") if isinstance(answer, dict) else None
        name = fields.get("image")
        if isinstance(name, str) and isinstance(caption, str):
            yield PublishedRecord(place, name, (caption,))
        else:
            validator.errors.add("no 'image', or no answer in 'conversations'", place)


def read_urban1k(request: ReadRequest, validator: DatasetValidator) -> Iterator[PublishedRecord]:
    """Yield a record per name that has a caption or an image, in the order of the numbers.

    `caption/17.txt` describes `image/17.jpg`; its first line is the caption.

    Args:
        request: How the dataset is to be read.
        validator: Collects the errors.

    Raises:
        ValueError: There is no folder of captions.
    """
    folder = request.data_folder
    root = next((r for r in (folder, folder / "Urban1k") if (r / "caption").is_dir()), None)
    if root is None:
        raise ValueError(
            f"{validator.source}: {folder} has no folder 'caption'. Unpack Urban1k.zip from "
            "huggingface.co/datasets/BeichenZhang/Urban1k and give the folder that contains "
            "'caption' and 'image'."
        )
    captions = {file.stem: file for file in (root / "caption").glob("*.txt")}
    found = _list_images(request.image_dir or root / "image")
    images = {name: files[0] for name, files in found.items()}
    num_longer = 0
    for name in sorted(captions.keys() | images.keys(), key=_number_first):
        place, lines, is_valid = f"caption/{name}.txt", [], True
        if name in captions:
            try:
                lines = read_lines(captions[name])
            except ValueError:
                validator.errors.add("not UTF-8", place)
                validator.num_errors_of_yielded += 1
                is_valid = False
        if len(found.get(name, ())) > 1:
            shown = ", ".join(file.name for file in found[name])
            validator.errors.add("several images of one name", f"{place}: {shown}")
            validator.num_errors_of_yielded += 1
            is_valid = False
        num_longer += any(line.strip() for line in lines[1:])
        yield PublishedRecord(
            place,
            f"{name}.jpg",
            tuple(lines[:1]),
            image=images.get(name),
            is_valid=is_valid,
        )
    validator.notes["captions_truncated_to_first_line"] = num_longer


def _list_images(image_dir: Path) -> dict[str, list[Path]]:
    """List the files of each name without its suffix, in order."""
    found: dict[str, list[Path]] = {}
    for file in sorted(image_dir.iterdir()) if image_dir.is_dir() else []:
        if file.suffix.lower().removeprefix(".") in IMAGE_SUFFIXES:
            found.setdefault(file.stem, []).append(file)
    return found


def _number_first(name: str) -> tuple[bool, int, str]:
    return (not name.isdigit(), int(name) if name.isdigit() else 0, name)


def read_docci(request: ReadRequest, validator: DatasetValidator) -> Iterator[PublishedRecord]:
    """Yield the test split of `docci_descriptions.jsonlines`; images are in `images`.

    Args:
        request: How the dataset is to be read.
        validator: Collects the errors.
    """
    file = validator.find_file(
        request.data_folder,
        "docci_descriptions.jsonlines",
        advice="Get it and docci_images.tar.gz from google.github.io/docci.",
    )
    for raw in read_json_lines(file, validator.errors):
        if raw.fields.get("split") in ("train", "qual_dev", "qual_test"):
            continue
        name, text = raw.fields.get("image_file"), raw.fields.get("description")
        if raw.fields.get("split") == "test" and isinstance(name, str) and isinstance(text, str):
            image = find_in_subfolder(request, "images", name)
            yield PublishedRecord(raw.place, name, (text,), image)
        else:
            validator.errors.add("no 'split', 'image_file' and 'description'", raw.place)


def read_iiw(
    request: ReadRequest,
    validator: DatasetValidator,
    *,
    subsets: tuple[str, ...] = _IIW_SUBSETS,
    fields: tuple[str, ...] = ("IIW", "DOCCI", "IIW-P5B"),
    only_pairs: bool = False,
) -> Iterator[PublishedRecord]:
    """Yield ImageInWords' records, with the captions of some fields in their order.

    Args:
        request: How the dataset is to be read.
        validator: Collects the errors.
        subsets: Folders of the dataset.
        fields: Fields of the captions.
        only_pairs: Skip images with a single caption, which no other caption matches.
    """
    for subset in subsets:
        file = validator.find_file(
            request.data_folder,
            f"{subset}/data.jsonl",
            f"datasets/{subset}/data.jsonl",
            advice="Give the folder `datasets` of github.com/google/imageinwords.",
        )
        for raw in read_json_lines(file, validator.errors):
            place = f"{subset}/{raw.place}"
            stem = next((raw.fields[name] for name in _IIW_NAMES if name in raw.fields), None)
            captions = [raw.fields[field] for field in fields if field in raw.fields]
            if not isinstance(stem, str) or not are_texts(captions):
                validator.errors.add(
                    "no 'image/key' or 'image', or captions that are not texts", place
                )
            elif len(captions) > 1 or not only_pairs:
                # Only one subset has images; in the texts of several, the same name may recur.
                name = f"{stem}.jpg" if len(subsets) == 1 else f"{subset}/{stem}"
                yield PublishedRecord(place, name, tuple(captions))


def find_in_subfolder(request: ReadRequest, subfolder: str, name: str) -> Path | None:
    """Find an image in the publisher's own subfolder, unless the request names another folder.

    Args:
        request: How the dataset is to be read.
        subfolder: Name of the subfolder.
        name: Name of the image.
    """
    image = request.data_folder / subfolder / name
    return image if request.image_dir is None and image.is_file() else None


def are_texts(value: Any) -> bool:
    """Return whether a JSON value is a list of texts, and not empty.

    Args:
        value: The value.
    """
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


DATASETS = (
    DatasetSpec(
        name="sharegpt4v-1k",
        title="ShareGPT4V, the first 1,000 records of Share-Captioner",
        dataset_type="retrieval",
        languages=("en",),
        counts={"images": 1000, "captions": 1000},
        license="captions CC BY-NC 4.0; images: SAM's own terms",
        citation="Chen et al., ShareGPT4V, ECCV 2024, arXiv:2311.12793",
        source="huggingface.co/datasets/Lin-Chen/ShareGPT4V; images: as its dataset card says",
        files=f"{_SHAREGPT4V_FILE}, and the images at the paths that it names, such as "
        "sam/images/*.jpg",
        protocol={"split": "first 1000 records", **CLEANED_TEXTS},
        build=partial(build_retrieval_dataset, read=partial(read_sharegpt4v, records=1000)),
    ),
    DatasetSpec(
        name="urban1k",
        title="Urban1k of Long-CLIP",
        dataset_type="retrieval",
        languages=("en",),
        counts={"images": 1000, "captions": 1000},
        license="CC BY-NC 4.0",
        citation="Zhang et al., Long-CLIP, ECCV 2024, arXiv:2403.15378",
        source="huggingface.co/datasets/BeichenZhang/Urban1k, Urban1k.zip",
        files="caption/1.txt … caption/1000.txt and image/1.jpg … image/1000.jpg",
        protocol={"split": "all", "texts": "first line of the file, without whitespace around it"},
        build=partial(build_retrieval_dataset, read=read_urban1k),
    ),
    DatasetSpec(
        name="docci",
        title="DOCCI, test split",
        dataset_type="retrieval",
        languages=("en",),
        counts={"images": 5000, "captions": 5000},
        license="CC BY 4.0",
        citation="Onoe et al., DOCCI, ECCV 2024, arXiv:2404.19753",
        source="google.github.io/docci",
        files="docci_descriptions.jsonlines, and images/*.jpg of docci_images.tar.gz",
        protocol={"split": "test", **CLEANED_TEXTS},
        build=partial(build_retrieval_dataset, read=read_docci),
    ),
    DatasetSpec(
        name="iiw-400",
        title="ImageInWords, IIW-400 with its images, captions by people",
        dataset_type="retrieval",
        languages=("en",),
        counts={"images": 400, "captions": 400},
        license="CC BY 4.0",
        citation=_IIW_CITATION,
        source=f"{_IIW_SOURCE}; images: docci_images_aar.tar.gz of google.github.io/docci",
        files="IIW-400/data.jsonl; name the folder of the unpacked images",
        protocol={"split": "IIW-400", "fields": "IIW", **CLEANED_TEXTS},
        checksums=_IIW_CHECKSUMS,
        build=partial(
            build_retrieval_dataset,
            read=partial(read_iiw, subsets=("IIW-400",), fields=("IIW",)),
        ),
    ),
    DatasetSpec(
        name="iiw",
        title="ImageInWords, the texts of all five evaluation sets",
        dataset_type="captions",
        languages=("en",),
        counts={"images": 2612, "captions": 2812},
        license="CC BY 4.0",
        citation=_IIW_CITATION,
        source=_IIW_SOURCE,
        files="IIW-400, DOCCI_Test, DCI_Test, CM_3600 and LocNar_Eval, each with data.jsonl",
        protocol={"split": "all", "fields": "IIW, DOCCI, IIW-P5B", **CLEANED_TEXTS},
        checksums=_IIW_CHECKSUMS,
        build=partial(build_retrieval_dataset, read=read_iiw),
    ),
    DatasetSpec(
        name="iiw-pairs",
        title="ImageInWords, the images that have two long captions",
        dataset_type="captions",
        languages=("en",),
        counts={"images": 200, "captions": 400},
        license="CC BY 4.0",
        citation=_IIW_CITATION,
        source=_IIW_SOURCE,
        files="IIW-400 and DOCCI_Test, each with data.jsonl",
        protocol={
            "split": "images with two captions", "fields": "IIW, DOCCI, IIW-P5B", **CLEANED_TEXTS,
        },
        checksums=_IIW_CHECKSUMS,
        build=partial(
            build_retrieval_dataset,
            read=partial(read_iiw, subsets=("IIW-400", "DOCCI_Test"), only_pairs=True),
        ),
    ),
)  # fmt: skip
