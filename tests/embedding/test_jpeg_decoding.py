"""Large JPEGs decoded at a fraction of their size: when, how small, and where it is recorded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from embedding_runs import IMAGE, read_embeddings
from extracting import EXACT
from indexes import build
from interruptions import read_bytes
from PIL import Image
from shared_models import ROUNDING
from tiny import IMAGE_SIZE

from modeling_llm2clip.data.images.image_sources import EncodedImage, decode_image
from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.data.store.embedding_store import EmbeddingStore
from modeling_llm2clip.data.store.store_manifest import StoreManifest
from modeling_llm2clip.embedding import shard_encoding
from modeling_llm2clip.embedding.embed import embed
from modeling_llm2clip.embedding.embedding_manifest import EmbeddingManifest
from modeling_llm2clip.embedding.extract import extract
from modeling_llm2clip.encoding.batches import find_min_jpeg_side
from modeling_llm2clip.image_loading_llm2clip import get_image_limits, load_images
from modeling_llm2clip.search.image_index import ImageIndex

_ORIENTATION = 0x0112
_WIDTH, _HEIGHT = 602, 401  # no multiples of what libjpeg divides by
# Whether an embedding stays, which is computed in batches of the same images.
SAME = {"large.jpg": False, "large.png": True, "small.jpg": True, "turned.jpg": False}
RECORD = {"jpeg decoding": f"scaled, at least {3 * IMAGE_SIZE} pixels a side"}


class Output:
    """An output of `extract` or `embed` of all images."""

    def __init__(self, function: Any, model: Path, records: Any, folder: Path) -> None:
        self.folder, self._records, self._model = folder, records, model
        self._function = function
        self._config: Any = EXACT if function is extract else IMAGE

    def write(self, **options: Any) -> dict[str, str]:
        """Begin or continue it; returns its plan."""
        config = replace(self._config, **options)
        self._function(self._model, self._records, self.folder, config, modality="image")
        manifest: Any = StoreManifest if self._function is extract else EmbeddingManifest
        plan: dict[str, str] = manifest.read(self.folder).plan
        return plan

    def read(self) -> list[list[float]]:
        """Read its embeddings."""
        if self._function is extract:
            store = EmbeddingStore.open(self.folder)
            return np.asarray(store.read(range(len(self._records)))).tolist()
        return read_embeddings(self.folder)[1].tolist()


def draw_photo(seed: int = 0) -> Image.Image:
    """Shapes of 50 pixels, with noise."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(40, 215, (8, 12, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((_WIDTH, _HEIGHT), Image.Resampling.BICUBIC), np.int16)
    return Image.fromarray((smooth + random.integers(-20, 21, smooth.shape)).astype(np.uint8))


def save_photo(file: Path, mode: str = "RGB", orientation: int = 1, **options: Any) -> Path:
    exif = Image.Exif()
    exif[_ORIENTATION] = orientation
    draw_photo().convert(mode).save(file, exif=exif, quality=95, **options)
    return file


def count_distance(first: Image.Image, second: Image.Image) -> float:
    """Mean difference of two images of the first one's size, in levels of 255."""
    resized = (np.asarray(image.resize((24, 24)), np.int16) for image in (first, second))
    return float(np.abs(np.subtract(*resized)).mean())


def iterate_rows(index: ImageIndex) -> Iterator[tuple[str, list[float]]]:
    for paths, embeds in index.iterate_embeddings():
        yield from zip([path.name for path in paths], embeds.tolist(), strict=True)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[CaptionedImage]:
    """A large JPEG, one that is turned, a small one, and a large PNG."""
    folder = tmp_path_factory.mktemp("photos")
    draw_photo(1).resize((90, 70)).save(folder / "small.jpg")
    draw_photo(2).save(folder / "large.png")
    save_photo(folder / "large.jpg")
    save_photo(folder / "turned.jpg", orientation=6)
    return [
        CaptionedImage(name=file.name, image=file, group_id=file.name, captions=("it",))
        for file in sorted(folder.iterdir())
    ]


@pytest.mark.parametrize(
    ("mode", "orientation"), [*(("RGB", turn) for turn in range(1, 9)), ("L", 6), ("CMYK", 7)]
)
def test_sides_never_fall_below_the_minimum_and_the_image_stays_upright(
    mode: str, orientation: int, tmp_path: Path
) -> None:
    file = save_photo(tmp_path / "a.jpg", mode, orientation, progressive=orientation % 2 == 0)
    full = load_images(file)
    for least, divisor in ((500, 1), (201, 1), (200, 2), (101, 2), (100, 4), (50, 8), (1, 8)):
        scaled = load_images(file, min_jpeg_side=least)
        assert scaled.mode == "RGB" and min(scaled.size) >= min(least, *full.size)
        assert scaled.size == tuple(-(-side // divisor) for side in full.size)
        # Noise of 20 levels is averaged by either way of making an image smaller; an image that is
        # turned or mirrored otherwise, or of inverted colors, differs by more than 25 levels.
        assert count_distance(full, scaled) < 10
    assert load_images(file, min_jpeg_side=500).tobytes() == full.tobytes()


def test_only_encoded_jpegs_are_decoded_smaller(tmp_path: Path) -> None:
    file = save_photo(tmp_path / "a.jpg")
    full = load_images(file)
    packed = EncodedImage("packed", file.read_bytes())
    for image in (file, packed):
        assert decode_image(image).tobytes() == full.tobytes()
        assert decode_image(image, min_jpeg_side=64).size == (151, 101)
    with Image.open(file) as opened:
        crop = opened.crop((10, 10, 500, 390))  # which decodes it
        for decoded in (crop, opened):
            assert load_images(decoded, min_jpeg_side=1).tobytes() == decoded.tobytes()
    for other in ("a.png", "a.webp", "a.bmp"):
        draw_photo().save(tmp_path / other)
        scaled = load_images(tmp_path / other, min_jpeg_side=1)
        assert scaled.tobytes() == load_images(tmp_path / other).tobytes()


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("progressive", [False, True])
def test_truncated_jpegs_are_named_as_in_full(
    share: float, progressive: bool, tmp_path: Path
) -> None:
    file = save_photo(tmp_path / "a.jpg", progressive=progressive)
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    errors = []
    for least in (None, 64):
        with pytest.raises(ValueError, match="the image is truncated or corrupt") as error:
            load_images(file, min_jpeg_side=least)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_limits_are_of_the_full_size(tmp_path: Path) -> None:
    file = save_photo(tmp_path / "a.jpg")
    limits = get_image_limits(max_megapixels=0.1)
    with pytest.raises(ValueError, match=r"602 × 401 pixels are more than 0\.1 million"):
        load_images(file, min_jpeg_side=8, limits=limits)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("CLIPImageProcessor", {}),
        ("CLIPImageProcessorPil", {"size": {"shortest_edge": 40}}),
        ("SiglipImageProcessor", {}),
        ("ConvNextImageProcessor", {}),  # resizes to more than its size, and crops
        ("LevitImageProcessor", {}),  # and so does this
        ("DINOv3ViTImageProcessor", {}),
        ("EfficientNetImageProcessor", {}),
    ],
)
def test_processors_never_enlarge_what_was_decoded_smaller(
    name: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(transformers, name):
        pytest.skip(f"this transformers has no {name}")
    processor = getattr(transformers, name)(**options)
    least = find_min_jpeg_side(processor, "scaled")
    assert least is not None and find_min_jpeg_side(processor, "full") is None
    sizes: list[tuple[Any, Any]] = []
    resize = processor.resize

    def note(image: Any, *args: Any, **kwargs: Any) -> Any:
        resized = resize(image, *args, **kwargs)
        sizes.append((image.shape[-2:], resized.shape[-2:]))
        return resized

    monkeypatch.setattr(processor, "resize", note)
    for width, height in ((8 * least, 9 * least), (3 * least, 2 * least), (5 * least, least)):
        file = tmp_path / "a.jpg"
        Image.new("RGB", (width, height), "red").save(file)
        processor(load_images(file, min_jpeg_side=least), return_tensors="pt")
    assert sizes and all(
        a >= b for before, after in sizes for a, b in zip(before, after, strict=True)
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Siglip2ImageProcessorPil", {"patch_size": 8, "max_num_patches": 16}),
        ("CLIPImageProcessorPil", {"do_resize": False}),
    ],
)
def test_processors_without_a_size_are_refused(name: str, options: dict[str, Any]) -> None:
    processor = getattr(transformers, name)(**options)
    with pytest.raises(ValueError, match=r"jpeg_decoding=scaled: .* resizes to no fixed size"):
        find_min_jpeg_side(processor, "scaled")


@pytest.mark.parametrize("function", [extract, embed])
def test_outputs_record_jpeg_decoding_and_continue_only_with_the_same(
    function: Any, model: Path, records: list[CaptionedImage], tmp_path: Path
) -> None:
    full, stated, scaled = (
        Output(function, model, records, tmp_path / name) for name in ("full", "stated", "scaled")
    )
    plan = full.write()
    assert stated.write(jpeg_decoding="full") == plan and "jpeg decoding" not in plan
    assert read_bytes(stated.folder) == read_bytes(full.folder)
    assert scaled.write(jpeg_decoding="scaled") == {**plan, **RECORD}
    assert scaled.write(jpeg_decoding="scaled") == {**plan, **RECORD}  # continued
    both, stated_value = "jpeg decoding: {} in the store, {} now", repr(RECORD["jpeg decoding"])
    with pytest.raises(ValueError, match=both.format(stated_value, None)):
        scaled.write()
    with pytest.raises(ValueError, match=both.format(None, stated_value)):
        full.write(jpeg_decoding="scaled")
    rows = zip(records, full.read(), scaled.read(), strict=True)
    assert {record.name: first == second for record, first, second in rows} == SAME


def test_int8_ranges_are_of_embeddings_of_the_same_decoding(
    model: Path, records: list[CaptionedImage], tmp_path: Path
) -> None:
    first, other, same = (
        Output(embed, model, records, tmp_path / name) for name in ("first", "other", "same")
    )
    first.write(dtype="int8", jpeg_decoding="scaled")
    with pytest.raises(
        ValueError, match="was measured on different embeddings: jpeg decoding: 'scaled"
    ):
        other.write(dtype="int8", int8_ranges=first.folder)
    same.write(dtype="int8", jpeg_decoding="scaled", int8_ranges=first.folder)


@pytest.mark.parametrize("function", [extract, embed])
def test_a_processor_without_a_size_is_refused_before_weights_are_read(
    function: Any,
    model: Path,
    records: list[CaptionedImage],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shard_encoding, "load_in_precision", lambda *_: pytest.fail("loaded"))
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    file = next(copy.glob("*processor*.json"))
    content = json.loads(file.read_text())
    content.get("image_processor", content)["do_resize"] = False
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="resizes to no fixed size"):
        Output(function, copy, records, tmp_path / "output").write(jpeg_decoding="scaled")


def test_an_index_and_its_queries_decode_alike(
    model: Path, records: list[CaptionedImage], tmp_path: Path
) -> None:
    pytest.importorskip("lancedb")
    folder = Path(str(records[0].image)).parent
    images, path = Path(shutil.copytree(folder, tmp_path / "images")), tmp_path / "index"
    index, _ = build(model, images, path, jpeg_decoding="scaled")
    assert index.about.precision == RECORD
    exact, _ = build(model, images, tmp_path / "exact")
    assert not exact.about.precision
    for which in (ImageIndex.open(path, device="cpu"), exact):
        for name, sides in (("large.jpg", (_WIDTH, _HEIGHT)), ("turned.jpg", (_HEIGHT, _WIDTH))):
            result = which.search(images / name, top_k=1)
            ((file, cosine),), (row,) = result.hits, result.columns
            assert file.name == name and cosine > 1 - ROUNDING
            assert (row["width"], row["height"]) == sides
    with Image.open(images / "large.jpg") as opened:  # whose owner may go on using it
        assert index.search(opened, top_k=1).hits[0][1] < 1 - ROUNDING
        assert opened.size == (_WIDTH, _HEIGHT)
    scaled_rows, exact_rows = (dict(iterate_rows(which)) for which in (index, exact))
    assert {name: scaled_rows[name] == row for name, row in exact_rows.items()} == SAME
    draw_photo(5).save(images / "new.jpg")
    # The command is named because `tag`, which updates an index too, has no such option.
    refusal = f"{RECORD['jpeg decoding']}' in the store, None now. Run llm2clip index with the"
    with pytest.raises(ValueError, match=refusal):
        build(model, images, path)
    (images / "new.jpg").unlink()
    unchanged, _ = build(model, images, path)
    assert unchanged.search(images / "large.jpg", top_k=1).hits[0][1] > 1 - ROUNDING
