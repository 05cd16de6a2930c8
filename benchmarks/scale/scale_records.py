"""Records to measure with: captions of the embedded emoji, made different by numbers."""

from __future__ import annotations

import json
from pathlib import Path

PAPER_FIELDS = ("shortSV_captions", "longSV_captions")


def write_records(folder: Path, count: int, *, of_paper: bool = False) -> None:
    """Write captions of the embedded emoji, as many as asked for, beside the emoji's images.

    Args:
        folder: new folder.
        count: how many records, of two captions each.
        of_paper: whether every record has its own image, and captions in the fields that the
            recipes of the paper choose; otherwise, an image has a record per language.
    """
    from modeling_llm2clip.data.records.record_loading import find_example_data, load_records

    emoji = find_example_data() / "emoji"
    records = [record for record in load_records(emoji) if record.lang == "en"]
    texts = [text for record in records for text in (*record.captions, *record.long_captions)]
    folder.mkdir(parents=True)
    for turn in range(-(-count // len(records)) if of_paper else 1):
        images = folder / f"images{turn or ''}"
        images.symlink_to((emoji / "images").resolve())
    with (folder / "captions.jsonl").open("w", encoding="utf-8") as file:
        for number in range(count):
            # One image has a record per language; here are more of them than languages.
            turn, row = divmod(number, len(records))
            first, second = texts[number % len(texts)], texts[(7 * number + 3) % len(texts)]
            captions = [f"{first}, number {number}", f"{second} ({number})"]
            record = {"file_name": records[row].name, "lang": f"x-{turn}", "captions": captions}
            if of_paper:
                fields = dict(zip(PAPER_FIELDS, captions, strict=True))
                name = records[row].name.replace("images", f"images{turn or ''}", 1)
                record = {"file_name": name, **fields}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
