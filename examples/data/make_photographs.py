"""Make the folder `photographs`: fifteen photographs with captions written for this project.

The images are sample data inside the wheels of scikit-image and scikit-learn. Only those are
used whose license is stated there and allows it. Fetch the two packages and run:

    pip install scikit-image==0.26.0 scikit-learn==1.9.1
    python make_photographs.py --output photographs

The same packages and the same version of Pillow give the same bytes.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from PIL import Image

LONG_SIDE = 256
JPEG_QUALITY = 90
SCIKIT_IMAGE = "skimage/data"
SCIKIT_LEARN = "sklearn/datasets/images"
CC_BY = "CC BY 2.0"
CC0 = "CC0 1.0"
PUBLIC_DOMAIN = "public domain"
NO_RESTRICTIONS = "no known copyright restrictions"


class Photograph(NamedTuple):
    """An image from a wheel, who made it, and two captions: one short, one of 40 to 60 words."""

    group_id: str
    path: str
    license: str
    source: str
    short: str
    long: str


PHOTOGRAPHS = (
    Photograph(
        "astronaut",
        f"{SCIKIT_IMAGE}/astronaut.png",
        PUBLIC_DOMAIN,
        "NASA, Great Images database, https://flic.kr/p/r9qvLn (via scikit-image)",
        "A smiling astronaut in an orange space suit.",
        "A woman with short fair hair smiles at the camera in an orange space suit with a wide "
        "dark neck ring and a round blue mission patch. Her black and white helmet rests before "
        "her. Behind her stand an American flag on the left and a model of the space shuttle on "
        "the right.",
    ),
    Photograph(
        "brick",
        f"{SCIKIT_IMAGE}/brick.png",
        CC0,
        "CC0Textures, Bricks25, https://cc0textures.com/view.php?tex=Bricks25 (via scikit-image)",
        "A grey surface of long bricks with pale joints.",
        "A black and white close view of smooth dark bricks that run up the picture in upright "
        "columns. Pale joints of mortar outline every brick, and the short joints are staggered "
        "from column to column. Toward the right the columns lean outwards, as if the surface were "
        "seen at a slant.",
    ),
    Photograph(
        "camera",
        f"{SCIKIT_IMAGE}/camera.png",
        CC0,
        "Lav Varshney (via scikit-image)",
        "A man in a dark coat looks through a camera on a tripod.",
        "In this black and white photograph a dark-haired man in a long black coat and gloves "
        "bends forward to look into a small camera on a metal tripod. He stands on the left of a "
        "wide lawn. Low buildings, a dome and one tall tower line the horizon under a clear sky.",
    ),
    Photograph(
        "cat",
        f"{SCIKIT_IMAGE}/chelsea.png",
        CC0,
        "Stefan van der Walt (via scikit-image)",
        "A close view of a tabby cat's face.",
        "The face of a ginger and grey tabby cat fills the frame, turned a little to the right. It "
        "has green eyes with dark slits, a reddish nose and long white whiskers. Dark stripes run "
        "up its forehead between ears that the edge of the picture cuts off. The background is "
        "blurred.",
    ),
    Photograph(
        "clock",
        f"{SCIKIT_IMAGE}/clock_motion.png",
        PUBLIC_DOMAIN,
        "Stefan van der Walt (via scikit-image)",
        "A wall clock blurred by the movement of the camera.",
        "A pale round shape floats in the middle of an even grey background. It is a wall clock, "
        "but the camera moved sideways while the shutter was open, so that its rim is smeared into "
        "a wide oval and its dial into level streaks. No hands or numbers can be read on it.",
    ),
    Photograph(
        "coffee",
        f"{SCIKIT_IMAGE}/coffee.png",
        CC0,
        "Rachel Michetti, courtesy of Pikolo Espresso Bar (via scikit-image)",
        "A red cup of espresso on a saucer with a spoon.",
        "A red cup, white inside, is about half full of espresso with a golden brown foam. It "
        "stands on a shiny red saucer, seen from above at a slant, with a small steel spoon lying "
        "to the right of its handle. The saucer rests on a worn table of reddish brown wood.",
    ),
    Photograph(
        "coins",
        f"{SCIKIT_IMAGE}/coins.png",
        NO_RESTRICTIONS,
        "Brooklyn Museum, "
        "https://www.brooklynmuseum.org/opencollection/archives/image/51611 (via scikit-image)",
        "Four rows of ancient coins on a dark background.",
        "Twenty-four old coins lie in four rows of six on a dark background in a black and white "
        "photograph. They are worn, uneven in outline and of different sizes. Most show a head in "
        "profile, and a few show standing or seated figures. Two of the largest lie at the right "
        "end of the first and third rows.",
    ),
    Photograph(
        "galaxies",
        f"{SCIKIT_IMAGE}/hubble_deep_field.jpg",
        PUBLIC_DOMAIN,
        "NASA, Hubble eXtreme Deep Field, "
        "http://hubblesite.org/newscenter/archive/releases/2012/37/image/a/ (via scikit-image)",
        "Countless galaxies scattered over black space.",
        "A view of deep space, black and strewn with hundreds of galaxies. Most are mere specks, "
        "and some are large enough to show an oval, a spiral or a thin streak. They glow in white, "
        "orange, red and blue. A bright star with crossed spikes of light shines to the lower "
        "right.",
    ),
    Photograph(
        "grass",
        f"{SCIKIT_IMAGE}/grass.png",
        CC0,
        "linolafett, https://www.deviantart.com/linolafett/art/Grass-01-434853879 "
        "(via scikit-image)",
        "A patch of lawn with clover, seen from above.",
        "A black and white photograph looks straight down on a lawn. Short blades of grass lie "
        "across each other in every direction and fill the whole frame. Among them grow small "
        "three-leaved clovers and a few broader, slightly crumpled leaves. No path, flower or edge "
        "can be seen anywhere.",
    ),
    Photograph(
        "gravel",
        f"{SCIKIT_IMAGE}/gravel.png",
        CC0,
        "CC0Textures, Gravel04, https://cc0textures.com/view.php?tex=Gravel04 (via scikit-image)",
        "Grey gravel that fills the whole picture.",
        "Sharp-edged pieces of crushed stone cover the ground from edge to edge in this black and "
        "white photograph taken from above. The stones are of similar size, in lighter and darker "
        "greys, with black shadows in the gaps. A few thin dry stalks lie between them, and "
        "nothing else is in sight.",
    ),
    Photograph(
        "pagoda",
        f"{SCIKIT_LEARN}/china.jpg",
        CC_BY,
        "danielbuechele, https://www.flickr.com/photos/danielbuechele/6061409035/ "
        "(via scikit-learn; made smaller)",
        "A Chinese tower with tiled roofs above a lake.",
        "A many-sided Chinese tower rises above green treetops. Its storeys of red columns and "
        "dark windows are set off by curved roofs of orange tiles with green edges, and a round "
        "knob crowns the top. Behind it a wide pale lake dotted with boats stretches to a hazy "
        "horizon under a light sky.",
    ),
    Photograph(
        "dahlia",
        f"{SCIKIT_LEARN}/flower.jpg",
        CC_BY,
        "vultilion, https://www.flickr.com/photos/vultilion/6056698931/ "
        "(via scikit-learn; made smaller)",
        "An orange dahlia in front of dark green leaves.",
        "A round orange dahlia in full bloom stands in the middle of the picture. Its many cupped "
        "petals are arranged in rings, pale at the rim and deeper orange toward the tightly closed "
        "centre. The top of a second bloom shows at the lower edge. The leaves behind are dark, "
        "bluish green and blurred.",
    ),
    Photograph(
        "retina",
        f"{SCIKIT_IMAGE}/retina.jpg",
        CC0,
        "Mikael Häggström, "
        "https://commons.wikimedia.org/wiki/File:Fundus_photograph_of_normal_left_eye.jpg "
        "(via scikit-image)",
        "The inside of a human eye with its blood vessels.",
        "A medical photograph of the back of a human eye shows an orange-red disc on black, with a "
        "small square tab at its upper right. Dark red blood vessels branch out from a bright "
        "yellow spot on the left, curving above and below the centre, where there is a darker, "
        "hazy spot without vessels.",
    ),
    Photograph(
        "rocket",
        f"{SCIKIT_IMAGE}/rocket.jpg",
        PUBLIC_DOMAIN,
        "SpaceX, https://www.flickr.com/photos/spacexphotos/16511594820/ (via scikit-image)",
        "A white rocket on its launch pad at dusk.",
        "A slim white rocket stands upright on its launch pad against a deep blue evening sky. Two "
        "lattice masts flank it, and two larger steel towers frame the picture at the edges. Near "
        "the ground several floodlights shine as yellow and white stars in front of a band of low "
        "dark clouds.",
    ),
    Photograph(
        "tissue",
        f"{SCIKIT_IMAGE}/ihc.png",
        NO_RESTRICTIONS,
        "Center for Microscopy and Molecular Imaging (via scikit-image)",
        "Stained tissue under a microscope, brown and blue.",
        "A microscope view of stained tissue. Large rounded glands, made of long cells packed side "
        "by side, are coloured brown and cover the top and left, with a smaller one at the bottom. "
        "Between them lies pale, loose tissue sprinkled with small blue-violet cell nuclei. A few "
        "gaps are white.",
    ),
)


def find_packages() -> dict[str, Path]:
    """Return the folders of the two packages that hold the images."""
    folders, missing = {}, []
    for name in ("skimage", "sklearn"):
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            missing.append(name)
        else:
            folders[name] = Path(spec.origin).parent
    if missing:
        raise ValueError(
            f"Not installed: {', '.join(missing)}. Run the `pip install` line at the top of this "
            "script first."
        )
    return folders


def write_image(source: Path, target: Path) -> None:
    """Write an RGB JPEG of at most 256 pixels on the long side, without EXIF data."""
    with Image.open(source) as opened:
        image = opened.convert("RGB")
    image.thumbnail((LONG_SIDE, LONG_SIDE), Image.Resampling.LANCZOS)
    # A new image of the pixels alone: no EXIF, comment or color profile comes along.
    clean = Image.frombytes("RGB", image.size, image.tobytes())
    clean.save(target, quality=JPEG_QUALITY, optimize=True)


def make_line(photograph: Photograph) -> str:
    """Make the line of captions.jsonl for one photograph."""
    line = {
        "image": f"images/{photograph.group_id}.jpg",
        "group_id": photograph.group_id,
        "captions": [photograph.short, photograph.long],
        "lang": "en",
        "license": photograph.license,
        "source": photograph.source,
    }
    return json.dumps(line, ensure_ascii=False) + "\n"


def write_readme(photographs: list[Photograph], output: Path) -> None:
    """Write README.md with the count and the attribution of every image."""
    rows = "\n".join(
        f"| `images/{photograph.group_id}.jpg` | {photograph.license} | {photograph.source} |"
        for photograph in photographs
    )
    text = README.format(
        count=len(photographs),
        rows=rows,
        long_side=LONG_SIDE,
        scikit_image=version("scikit-image"),
        scikit_learn=version("scikit-learn"),
    )
    (output / "README.md").write_text(text, encoding="utf-8", newline="\n")


README = """\
# Photographs with a short and a long caption each

Use these photographs to try a model, and as an example of the data format. They are too few for
measurements.

| content | count |
| --- | --- |
| images in `images` | {count} |
| lines in `captions.jsonl` | {count} |

Every image is an RGB JPEG of at most {long_side} pixels on its long side, without EXIF data.

## A line

    {{"image": "images/cat.jpg", "group_id": "cat", "captions": ["short", "long"], "lang": "en",
     "license": "CC0 1.0", "source": "Stefan van der Walt (via scikit-image)"}}

`captions` has one short sentence and one description of 40 to 60 words. Both were written for this
project by looking at the images, and have the project's license. `license` and `source` describe
the image.

## Sources and licenses

All images come from the wheels of scikit-image {scikit_image} and scikit-learn {scikit_learn},
and were made smaller and compressed again. Those packages state for each:

| image | license | source |
| --- | --- | --- |
{rows}

For the two CC BY 2.0 images the license is at https://creativecommons.org/licenses/by/2.0/. The
text that comes with scikit-learn names the same author for both images but links each to its own
page; the authors given here are those of the pages.

These images of the packages were left out: images without a stated license (moon, page,
motorcycle), drawings and synthetic images (horse, logo, color wheel, chessboard, phantom, text), a
hologram of a cell and a very small detail of a retina.

## How it was made

`make_photographs.py`, one folder up, has the captions and makes this folder.
"""


def main() -> None:
    """Make the folder and print its counts."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to make; new or empty")
    output: Path = parser.parse_args().output
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty; remove it or give another --output.")
    packages = find_packages()
    (output / "images").mkdir(parents=True)
    photographs = sorted(PHOTOGRAPHS, key=lambda photograph: photograph.group_id)
    for photograph in photographs:
        package, path = photograph.path.split("/", 1)
        write_image(packages[package] / path, output / "images" / f"{photograph.group_id}.jpg")
    text = "".join(make_line(photograph) for photograph in photographs)
    (output / "captions.jsonl").write_text(text, encoding="utf-8", newline="\n")
    write_readme(photographs, output)
    print(f"images: {len(photographs)}")


if __name__ == "__main__":
    main()
