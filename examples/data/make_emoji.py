"""Make the folder `emoji`: emoji images in two drawing styles with names in twelve languages.

The images and the texts come from four npm packages. Fetch exactly these versions into an empty
folder (other versions are refused, because the counts and the bytes would differ):

    npm install --ignore-scripts --no-audit --no-fund --prefix PACKAGES \
        emoji-datasource-google@16.0.0 @lobehub/fluent-emoji-3d@1.1.0 \
        cldr-annotations-full@48.2.0 cldr-annotations-derived-full@48.2.0

then make the data from them:

    python make_emoji.py --npm-packages PACKAGES/node_modules --output emoji

Any folder that holds the unpacked packages under their names will do. The same packages and the
same version of Pillow give the same bytes.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

EMOJI_PACKAGE = "emoji-datasource-google"
FLUENT_PACKAGE = "@lobehub/fluent-emoji-3d"
NAMES_PACKAGE = "cldr-annotations-full"
DERIVED_NAMES_PACKAGE = "cldr-annotations-derived-full"
VERSIONS = {
    EMOJI_PACKAGE: "16.0.0",
    FLUENT_PACKAGE: "1.1.0",
    NAMES_PACKAGE: "48.2.0",
    DERIVED_NAMES_PACKAGE: "48.2.0",
}
LANGUAGES = ("en", "de", "fr", "es", "it", "pt", "ru", "ar", "hi", "zh", "ja", "ko")
IMAGE_SIZE = 64
PALETTE_COLORS = 64
VARIATION_SELECTOR = "\ufe0f"
FLUENT_COPYRIGHT = "Copyright (c) Microsoft Corporation.\nCopyright (c) 2023 LobeHub"

Names = dict[str, dict[str, list[str]]]


@dataclass
class Report:
    """Counts of the emoji that were made, and of those left out by reason."""

    images: Counter[str] = field(default_factory=Counter)
    lines: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)


def check_packages(packages: Path) -> None:
    """Raise a ValueError that names every package that is missing or of another version."""
    errors = []
    for name, expected in VERSIONS.items():
        manifest = packages / name / "package.json"
        if not manifest.is_file():
            errors.append(f"{name}: no {manifest}")
            continue
        installed = json.loads(manifest.read_text(encoding="utf-8"))["version"]
        if installed != expected:
            errors.append(f"{name}: found version {installed}, wanted {expected}")
    if errors:
        raise ValueError(
            "The npm packages are not the ones this data is made from:\n  "
            + "\n  ".join(errors)
            + "\nRun the `npm install` line at the top of this script in an empty folder."
        )


def read_names(packages: Path, language: str) -> Names:
    """Read the CLDR names and keywords of one language, derived ones (flags, families) included."""
    names: Names = {}
    for package, folder, root in (
        (DERIVED_NAMES_PACKAGE, "annotationsDerived", "annotationsDerived"),
        (NAMES_PACKAGE, "annotations", "annotations"),
    ):
        path = packages / package / folder / language / "annotations.json"
        names.update(json.loads(path.read_text(encoding="utf-8"))[root]["annotations"])
    return names


def list_keywords(entry: dict[str, list[str]], name: str) -> list[str]:
    """Return the keywords of a CLDR entry without the name itself and without duplicates."""
    seen = {name.casefold()}
    keywords = []
    for keyword in entry.get("default", []):
        if keyword.casefold() not in seen:
            seen.add(keyword.casefold())
            keywords.append(keyword)
    return keywords


def decode_characters(group_id: str) -> str:
    """Turn `0023-fe0f-20e3` into the characters, without the selector that CLDR leaves out."""
    characters = "".join(chr(int(point, 16)) for point in group_id.split("-"))
    return characters.replace(VARIATION_SELECTOR, "")


def list_emoji(packages: Path, english: Names, report: Report) -> list[dict[str, Any]]:
    """List the emoji to draw, the older and shorter named first; count those left out."""
    path = packages / EMOJI_PACKAGE / "emoji.json"
    kept = []
    for emoji in json.loads(path.read_text(encoding="utf-8")):
        emoji["group_id"] = emoji["unified"].lower()
        report.left_out["skin-tone variants"] += len(emoji.get("skin_variations", {}))
        if emoji["category"] == "Component":
            report.left_out["bare skin-tone swatches"] += 1
        elif not emoji["has_img_google"]:
            report.left_out["emoji without a Noto image"] += 1
        elif not english.get(decode_characters(emoji["group_id"]), {}).get("tts"):
            report.left_out["emoji without an English name"] += 1
        else:
            kept.append(emoji)
    return sorted(
        kept, key=lambda entry: (float(entry["added_in"]), len(entry["name"]), entry["group_id"])
    )


def prepare_image(source: Path) -> Image.Image:
    """Load an image onto white, 64 pixels high and wide, and reduce it to a palette."""
    with Image.open(source) as opened:
        image = opened.convert("RGBA")
    if image.size != (IMAGE_SIZE, IMAGE_SIZE):
        image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return white.convert("RGB").quantize(PALETTE_COLORS, dither=Image.Dither.NONE)


def is_new(image: Image.Image, seen: set[bytes]) -> bool:
    """Return whether these pixels were not seen before, and remember them."""
    pixels = image.convert("RGB").tobytes()
    new = pixels not in seen
    seen.add(pixels)
    return new


def prepare_images(
    packages: Path, emoji: dict[str, Any], *, seen: dict[str, set[bytes]], report: Report
) -> dict[str, Image.Image]:
    """Prepare an emoji in each style that really has it; nothing if its Noto image is a repeat.

    The Fluent package fills Fluent's gap of country flags with Noto's own flags. A second copy of
    the same drawing is not a second style, and its license is not Fluent's, so those are left out.
    """
    folder = packages / EMOJI_PACKAGE / "img" / "google" / str(IMAGE_SIZE)
    noto = prepare_image(folder / emoji["image"])
    if not is_new(noto, seen["noto"]):
        report.left_out["emoji whose Noto image repeats another's"] += 1
        return {}
    fluent = packages / FLUENT_PACKAGE / "assets" / f"{emoji['group_id']}.webp"
    if not fluent.is_file():
        report.left_out["Fluent images: none in the package"] += 1
        return {"noto": noto}
    if emoji["subcategory"] == "country-flag":
        report.left_out["Fluent images: country flags that are Noto's drawings"] += 1
        return {"noto": noto}
    second = prepare_image(fluent)
    if not is_new(second, seen["fluent3d"]):
        report.left_out["Fluent images: repeats of another emoji's"] += 1
        return {"noto": noto}
    return {"noto": noto, "fluent3d": second}


def make_lines(
    emoji: dict[str, Any], styles: list[str], *, names: dict[str, Names], report: Report
) -> list[dict[str, Any]]:
    """Make the lines of one emoji: every style in English, the Noto image in each language."""
    group_id = emoji["group_id"]
    lines: list[dict[str, Any]] = []
    for language in LANGUAGES:
        entry = names[language].get(decode_characters(group_id), {})
        if not entry.get("tts"):
            report.left_out[f"names in {language}: none in CLDR"] += 1
            continue
        name = entry["tts"][0]
        for style in styles if language == "en" else ["noto"]:
            line = {
                "image": f"images/{style}/{group_id}.png",
                "group_id": group_id,
                "captions": [name],
                "keywords": list_keywords(entry, name),
                "lang": language,
            }
            if language == "en":
                line |= {"style": style, "group": emoji["category"]}
            lines.append(line)
            report.lines[language] += 1
    return lines


def make_data(packages: Path, output: Path) -> Report:
    """Write the images and captions.jsonl, and return the counts."""
    report = Report()
    names = {language: read_names(packages, language) for language in LANGUAGES}
    lines: list[dict[str, Any]] = []
    seen: dict[str, set[bytes]] = {"noto": set(), "fluent3d": set()}
    for style in seen:
        (output / "images" / style).mkdir(parents=True)
    for emoji in list_emoji(packages, names["en"], report):
        images = prepare_images(packages, emoji, seen=seen, report=report)
        for style, image in images.items():
            image.save(output / "images" / style / f"{emoji['group_id']}.png", optimize=True)
            report.images[style] += 1
        if images:
            lines += make_lines(emoji, list(images), names=names, report=report)
    lines.sort(key=lambda line: (line["group_id"], line["lang"], line["image"]))
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (output / "captions.jsonl").write_text(text, encoding="utf-8", newline="\n")
    return report


def write_licenses(packages: Path, output: Path, *, apache_license: Path) -> None:
    """Write the license texts; where a package brings none, the standard text with its holders."""
    mit = (packages / EMOJI_PACKAGE / "LICENSE").read_text(encoding="utf-8")
    holder = next(line for line in mit.splitlines() if line.startswith("Copyright"))
    if not apache_license.is_file():
        raise ValueError(
            f"No Apache-2.0 text at {apache_license}; give the path of one with --apache-license."
        )
    texts = {
        "noto-emoji-Apache-2.0.txt": apache_license.read_text(encoding="utf-8"),
        "fluent-emoji-MIT.txt": mit.replace(holder, FLUENT_COPYRIGHT),
        "emoji-datasource-MIT.txt": mit,
        "cldr-Unicode-3.0.txt": (packages / NAMES_PACKAGE / "LICENSE").read_text(encoding="utf-8"),
    }
    folder = output / "LICENSES"
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


def write_readme(report: Report, output: Path) -> None:
    """Write README.md with the counts of this run."""
    languages = "\n".join(f"| {name} | {report.lines[name]} |" for name in LANGUAGES)
    left_out = "\n".join(f"| {why} | {n} |" for why, n in sorted(report.left_out.items()) if n)
    text = README.format(
        noto=report.images["noto"],
        fluent3d=report.images["fluent3d"],
        lines=report.lines.total(),
        languages=languages,
        left_out=left_out,
        size=IMAGE_SIZE,
        colors=PALETTE_COLORS,
    )
    (output / "README.md").write_text(text, encoding="utf-8", newline="\n")


README = """\
# Emoji in two drawing styles, with names in twelve languages

Use these small images and their names to train, search and measure without a download.

| content | count |
| --- | --- |
| images in `images/noto` | {noto} |
| images in `images/fluent3d` | {fluent3d} |
| lines in `captions.jsonl` | {lines} |

Every image is a palette PNG on white, {size} x {size} pixels, at most {colors} colors.

## A line

    {{"image": "images/noto/1f34e.png", "group_id": "1f34e", "captions": ["red apple"],
     "keywords": ["apple", "diet", "food", "fruit", "health", "red", "ripe"], "lang": "en",
     "style": "noto", "group": "Food & Drink"}}

- There is one line per image and language, sorted by group, language and image. English lines name
  both styles, and other languages only the Noto image.
- `group_id` has the code points. Lines with the same `group_id` show the same thing in any style.
  Keep them on the same side of a split between training and test.
- `captions` has the CLDR short name. `keywords` has the CLDR keywords without that name, and may be
  empty.
- Only English lines have `style` and `group`.

| lang | lines |
| --- | --- |
{languages}

## Left out

| reason | count |
| --- | --- |
{left_out}

Within a style no two images are the same, and within a language no two groups have the same name.
Some are hard to distinguish at this size, such as the flags of Chad and Romania. If Noto draws
several emoji alike, such as the flags of Norway and Bouvet Island, this folder has the oldest, or
the one with the shortest name among equally old ones.

The Fluent package uses Noto's drawings for country flags. A copy is not a second style, so this
folder has the flags of countries and regions once, as Noto images.

## Sources and licenses

| content | from (npm) | by | license |
| --- | --- | --- | --- |
| `images/noto` | emoji-datasource-google 16.0.0 | Google, Noto Emoji 2.048 | Apache-2.0 |
| `images/fluent3d` | @lobehub/fluent-emoji-3d 1.1.0 | Microsoft; packed by LobeHub | MIT |
| `group_id`, `group` | emoji-datasource-google 16.0.0 | Cal Henderson | MIT |
| `captions`, `keywords` | cldr-annotations-full and -derived-full 48.2.0 | Unicode | Unicode-3.0 |

The Noto Emoji project considers its flag images to be in the public domain or otherwise exempt from
copyright. The license texts are in `LICENSES/`. All images were put on white and reduced to a
palette, and the Fluent images were also made smaller. Names and keywords are unchanged.

## How it was made

`make_emoji.py`, one folder up, lists the packages to download and makes this folder from them.
"""


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--npm-packages", type=Path, required=True, help="folder of the packages")
    parser.add_argument("--output", type=Path, required=True, help="folder to make; new or empty")
    parser.add_argument(
        "--apache-license",
        type=Path,
        default=Path("/usr/share/common-licenses/Apache-2.0"),
        help="file with the text of the Apache License 2.0 (default: where Debian keeps it)",
    )
    return parser.parse_args()


def main() -> None:
    """Make the folder and print both counts."""
    arguments = parse_arguments()
    output: Path = arguments.output
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty; remove it or give another --output.")
    check_packages(arguments.npm_packages)
    report = make_data(arguments.npm_packages, output)
    write_licenses(arguments.npm_packages, output, apache_license=arguments.apache_license)
    write_readme(report, output)
    print(f"images: {dict(report.images)}")
    print(f"lines: {report.lines.total()}, {dict(report.lines)}")
    for reason, count in sorted(report.left_out.items()):
        print(f"left out, {reason}: {count}")


if __name__ == "__main__":
    main()
