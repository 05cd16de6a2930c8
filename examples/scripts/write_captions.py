"""Writes captions for images that have none: from a captioning model, a web page, or file names.

    python examples/scripts/write_captions.py model my-images Qwen/Qwen3-VL-2B-Instruct
    python examples/scripts/write_captions.py alt-texts my-images page.html
    python examples/scripts/write_captions.py file-names my-images

Lines are appended to `captions.jsonl` in the folder of images. Images that already have a line keep
it, so you can combine the methods, and a captioning model resumes where it was stopped. Images
without a caption are counted and listed; `llm2clip` ignores images without a line.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import unicodedata
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from typing import Any, TextIO
from urllib.parse import unquote, urlsplit

import torch
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from modeling_llm2clip.data.images.image_sources import decode_image
from modeling_llm2clip.data.sources.json_files import iterate_lines, parse_object
from modeling_llm2clip.search.image_files import list_images

PROMPT = "Describe this image in one sentence, as a caption."
# Name of each image, and its caption or the reason why it has none.
Captions = Iterator[tuple[str, str | None, str]]
_CAMERA_NAME = re.compile(
    r"(?i)^(img|dsc[fn]?|dcim|pxl|mvimg|wa|fb|screenshot|image|photo|untitled)$"
)
_HASH = re.compile(r"(?i)(?=.*\d)[\da-f]{8,}|[\da-f]{8}(-[\da-f]{4}){3}-[\da-f]{12}")
# Neither the marks of letters, as Hindi has them, nor an apostrophe within a word.
_BETWEEN_WORDS = re.compile(r"(?:[\s\d_.,;:!?()\[\]{}+&=@#~–—-]|(?<!\w)['’]|['’](?!\w))+")
_NAMES_SHOWN = 5


def main() -> int:
    """Add the lines, and return 1 if images got none."""
    arguments = parse()
    images = list_images(arguments.images)
    if skipped := images.describe_skipped():
        print(skipped, file=sys.stderr)
    target = arguments.images / "captions.jsonl"
    have = read_names(target)
    names = [path.relative_to(arguments.images).as_posix() for path in images.readable]
    missing = [name for name in names if name not in have]
    if arguments.way == "model":
        captions = ask_model(arguments, missing)
    elif arguments.way == "alt-texts":
        captions = match_alt_texts(read_alt_texts(arguments.page), missing)
    else:
        captions = ((name, *read_file_name(name)) for name in missing)
    written, without = 0, list[str]()
    with target.open("a", encoding="utf-8") as file:
        end_last_line(target, file)
        for name, caption, reason in captions:
            if caption is None:
                without.append(f"{name}: {reason}")
                continue
            line = {"image": name, "captions": [caption]}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            written += 1
    print(f"Captioned {written} of {len(missing)} images without a caption, in {target}.")
    if without:
        more = f"\nand {len(without) - _NAMES_SHOWN} more" if len(without) > _NAMES_SHOWN else ""
        shown = "\n".join(without[:_NAMES_SHOWN])
        print(f"{len(without)} images have no caption:\n{shown}{more}", file=sys.stderr)
    return bool(without)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    ways = parser.add_subparsers(dest="way", required=True)
    model = ways.add_parser("model", help="ask a vision-language model", allow_abbrev=False)
    model.add_argument("images", type=Path, help="folder of images")
    model.add_argument("captioner", help="folder or Hub id, for image-text-to-text")
    model.add_argument("--prompt", default=PROMPT)
    model.add_argument("--max-new-tokens", type=int, default=80)
    model.add_argument("--device", help="such as cuda or cpu; default: a GPU if there is one")
    alt = ways.add_parser("alt-texts", help="take the alt texts of a page", allow_abbrev=False)
    alt.add_argument("images", type=Path, help="folder of the page's images")
    alt.add_argument("page", type=Path, help="HTML file")
    names = ways.add_parser("file-names", help="take words of file names", allow_abbrev=False)
    names.add_argument("images", type=Path, help="folder of images")
    return parser.parse_args()


def read_names(captions: Path) -> set[str]:
    """Return the images that have a line."""
    if not captions.is_file():
        return set()
    names = set()
    for number, line in iterate_lines(captions):
        fields = parse_object(line)
        if isinstance(fields, str):
            raise ValueError(f"{captions} line {number}: {fields}. Correct or remove it.")
        names.add(str(fields.get("image") or fields.get("file_name")))
    return names


def end_last_line(captions: Path, file: TextIO) -> None:
    """End the last line of a file, which one written by hand may not do."""
    content = captions.read_bytes()
    if content and not content.endswith(b"\n"):
        file.write("\n")


def ask_model(arguments: argparse.Namespace, names: list[str]) -> Captions:
    """Have a model describe each image; a truncated answer is not taken as a caption."""
    captioner = Captioner(arguments)
    for name in tqdm(names, unit=" images", disable=None):
        try:
            image = decode_image(arguments.images / name)
        except ValueError as error:
            yield name, None, str(error)
            continue
        caption, is_truncated = captioner(image)
        if is_truncated:
            yield name, None, f"truncated by --max-new-tokens: {caption[:60]} …"
        elif not caption:
            yield name, None, "the model wrote nothing"
        else:
            yield name, caption, ""


class Captioner:
    """A vision-language model; one without a chat template captions without a prompt."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.processor = AutoProcessor.from_pretrained(arguments.captioner)
        self.model: Any = AutoModelForImageTextToText.from_pretrained(
            arguments.captioner, dtype="auto"
        ).to(device)
        self.prompt = arguments.prompt
        self.max_new_tokens = arguments.max_new_tokens

    @torch.inference_mode()
    def __call__(self, image: Any) -> tuple[str, bool]:
        """Return the answer about an image, and whether it was truncated."""
        inputs = self.prepare(image).to(self.model.device, self.model.dtype)
        ids = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)[0]
        new_ids = ids[inputs["input_ids"].shape[1] if "input_ids" in inputs else 0 :]
        text = self.processor.decode(new_ids, skip_special_tokens=True)
        return " ".join(text.split()), len(new_ids) >= self.max_new_tokens

    def prepare(self, image: Any) -> Any:
        """Return the inputs of the model."""
        if not self.processor.chat_template:
            return self.processor(images=image, return_tensors="pt")
        parts = [{"type": "image", "image": image}, {"type": "text", "text": self.prompt}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True,
            return_dict=True, return_tensors="pt",
        )  # fmt: skip


def read_file_name(name: str) -> tuple[str | None, str]:
    """Return the words of a file's name, or why it says nothing."""
    stem = unicodedata.normalize("NFC", PurePosixPath(name).stem)  # macOS decomposes letters
    words = [] if _HASH.fullmatch(stem) else _BETWEEN_WORDS.split(stem)
    words = [word for word in words if len(word) > 1 and not _CAMERA_NAME.match(word)]
    if not words:
        return None, "its name has no words"
    return " ".join(words), ""


class _AltTexts(HTMLParser):
    """Collects the alt text of each `img`, by the name of its file."""

    def __init__(self) -> None:
        super().__init__()
        self.alt_texts: dict[str, list[str]] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an image; an empty alt text marks decoration."""
        values = dict(attrs)
        alt = " ".join((values.get("alt") or "").split())
        if tag == "img" and alt and values.get("src"):
            file_name = PurePosixPath(unquote(urlsplit(str(values["src"])).path)).name
            self.alt_texts.setdefault(file_name, []).append(alt)


def read_alt_texts(page: Path) -> dict[str, list[str]]:
    """Return the alt texts of a page by the names of the files that it shows."""
    parser = _AltTexts()
    try:
        parser.feed(page.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{page} is not in UTF-8 ({error}). Save it in UTF-8.") from error
    return parser.alt_texts


def match_alt_texts(alt_texts: dict[str, list[str]], names: list[str]) -> Captions:
    """Find the alt text of each image; a file name that is there twice is not decided."""
    file_names = [PurePosixPath(name).name for name in names]
    for name, file_name in zip(names, file_names, strict=True):
        texts = list(dict.fromkeys(alt_texts.get(file_name, [])))
        if not texts:
            yield name, None, "the page has no alt text for it"
        elif len(texts) > 1 or file_names.count(file_name) > 1:
            yield name, None, f"several images or alt texts are of {file_name}"
        else:
            yield name, texts[0], ""


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
