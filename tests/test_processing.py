"""What pictures and texts become, and which are refused, by name."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model, tiny_pictures, tiny_tokenizer
from transformers import AutoProcessor, AutoTokenizer, CLIPImageProcessor

from modeling_llm2clip import LLM2CLIPProcessor
from modeling_llm2clip.processing_llm2clip import load_pictures

WHITE, RED = (255, 255, 255), (255, 0, 0)
LONG_TEXT = " ".join(["dog"] * 50)  # 32 tokens are the most


@pytest.fixture
def processor() -> LLM2CLIPProcessor:
    """A fresh processor, because it counts."""
    shared = shared_processor()
    return LLM2CLIPProcessor(shared.image_processor, shared.tokenizer, shared.max_text_length)


@cache
def shared_processor() -> LLM2CLIPProcessor:
    return tiny_model()[1]


@cache
def prompt() -> tuple[list[int], list[int]]:
    config = tiny_model()[0].config
    return config.prompt_prefix_ids, config.prompt_suffix_ids


def load(picture: Any) -> Image.Image:
    loaded: Image.Image = load_pictures(picture)
    assert loaded.mode == "RGB"
    return loaded


def draw_noise(height: int = 40, width: int = 56) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# Texts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"number 0 is blank: ''"),
        (" \n\t", r"number 0 is blank"),
        (["a dog", "  "], r"1 are not: number 1 is blank: '  '"),
        (["a dog", None], r"number 1 is NoneType, not str"),
        ([b"a dog"], r"number 0 is bytes, not str"),
        ([["a dog"], ["a cat"]], r"2 are not: number 0 is list, not str; number 1 is list"),
        ([1.5], r"number 0 is float, not str"),
        ([], r"the list is empty"),
    ],
)
def test_what_is_not_a_caption_is_named(
    processor: LLM2CLIPProcessor, text: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        processor(text=text)


def test_all_bad_captions_are_counted_and_the_first_ones_named(
    processor: LLM2CLIPProcessor,
) -> None:
    with pytest.raises(ValueError, match=r"20 are not: number 0 is blank.*number 7 is blank.*; …"):
        processor(text=[""] * 20)


def test_nothing_at_all_is_refused(processor: LLM2CLIPProcessor) -> None:
    with pytest.raises(ValueError, match="neither images nor text"):
        processor()


def test_one_string_and_an_iterable_of_strings_are_taken(processor: LLM2CLIPProcessor) -> None:
    one = processor(text="a dog")["input_ids"]
    assert torch.equal(one, processor(text=["a dog"])["input_ids"])
    assert torch.equal(one, processor(text=(t for t in ["a dog"]))["input_ids"])  # type: ignore[arg-type]


def test_blanks_around_a_caption_do_not_count(processor: LLM2CLIPProcessor) -> None:
    plain = processor(text="a dog")["input_ids"]
    assert torch.equal(plain, processor(text=" \n a dog\t ")["input_ids"])


def test_texts_are_padded_right_to_the_longest(processor: LLM2CLIPProcessor) -> None:
    batch = processor(text=["a dog", "two red apples on a wooden table"])
    lengths = batch["attention_mask"].sum(dim=1)
    assert lengths[0] < lengths[1] == batch["input_ids"].shape[1]
    assert batch["attention_mask"][0, : lengths[0]].all()
    assert (batch["input_ids"][0, lengths[0] :] == processor.tokenizer.pad_token_id).all()


def test_a_long_caption_is_cut_before_the_suffix_and_counted(
    processor: LLM2CLIPProcessor,
) -> None:
    prefix, suffix = prompt()
    ids = processor(text=[LONG_TEXT, "a dog"])["input_ids"][0].tolist()
    assert len(ids) == processor.max_text_length == 32
    assert ids[: len(prefix)] == prefix and ids[-len(suffix) :] == suffix
    whole = processor.tokenizer(LONG_TEXT, truncation=False, verbose=False)["input_ids"]
    assert ids[: -len(suffix)] == whole[: 32 - len(suffix)]
    assert processor.num_truncated_texts == 1
    processor(text=[LONG_TEXT, "a dog", LONG_TEXT])
    assert processor.num_truncated_texts == 3


def test_a_caption_that_just_fits_is_not_counted(processor: LLM2CLIPProcessor) -> None:
    prefix, suffix = prompt()
    room = processor.max_text_length - len(prefix) - len(suffix)
    text = "x" + "~" * (room - 1)  # characters that no merge joins
    assert processor(text=text)["input_ids"].shape == (1, 32)
    assert processor.num_truncated_texts == 0
    processor(text=text + "~")
    assert processor.num_truncated_texts == 1


def test_a_long_caption_can_be_an_error_that_names_it(processor: LLM2CLIPProcessor) -> None:
    with pytest.raises(ValueError, match=r"1 of 3 texts have more than 32 tokens .*number 1"):
        processor(text=["a dog", LONG_TEXT, "a cat"], on_long_text="error")
    processor(text=["a dog", "a cat"], on_long_text="error")


@pytest.mark.parametrize("kwargs", [{"max_length": 14}, {"text_kwargs": {"max_length": 14}}])
def test_cutting_to_a_callers_own_length_counts_too(
    processor: LLM2CLIPProcessor, kwargs: Any
) -> None:
    text = "two red apples on a wooden table"
    assert processor(text=[text, "a dog"], **kwargs)["input_ids"].shape == (2, 14)
    assert processor.num_truncated_texts == 1
    with pytest.raises(ValueError, match="more than 14 tokens"):
        processor(text=[text, "a dog"], on_long_text="error", **kwargs)


def test_an_unknown_way_with_long_captions_is_refused(processor: LLM2CLIPProcessor) -> None:
    with pytest.raises(ValueError, match=r"'truncate' or 'error', got 'ignore'"):
        processor(text="a dog", on_long_text="ignore")


def test_settings_may_be_flat_or_nested(processor: LLM2CLIPProcessor) -> None:
    flat = processor(text=["a dog", "x"], padding="max_length", return_tensors="np")
    nested = processor(
        text=["a dog", "x"],
        text_kwargs={"padding": "max_length"},
        common_kwargs={"return_tensors": "np"},
    )
    for batch in (flat, nested):
        assert type(batch["input_ids"]) is np.ndarray
        assert batch["input_ids"].shape == (2, 32)
    assert (flat["input_ids"] == nested["input_ids"]).all()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"on_long_texts": "error"}, "on_long_texts"),
        ({"max_lenght": 20}, "max_lenght"),
        ({"text_kwargs": {"max_lenght": 20}}, "max_lenght"),
        ({"txt_kwargs": {"max_length": 20}}, "txt_kwargs"),
        ({"images_kwargs": {"do_resise": False}}, "do_resise"),
        ({"images_kwargs": {"truncation": False}}, "truncation"),  # right, in the wrong place
        ({"common_kwargs": {"return_tensor": "np"}}, "return_tensor"),
        ({"pad": None}, "pad"),
    ],
)
def test_an_unknown_option_is_refused_with_the_known_ones(
    processor: LLM2CLIPProcessor, settings: Any, named: str
) -> None:
    with pytest.raises(ValueError, match=rf"know \['{named}'\].*Known: .*'max_length', .*'on_long"):
        processor(text="a dog", images=draw_noise(), **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"text_pair": "a cat"},
        {"text_kwargs": {"is_split_into_words": True}},
        {"return_overflowing_tokens": True},
        {"videos": [draw_noise()]},
    ],
)
def test_what_makes_no_row_of_one_caption_is_refused(
    processor: LLM2CLIPProcessor, settings: Any
) -> None:
    with pytest.raises(ValueError, match="a row is one caption or one picture"):
        processor(text="a dog", **settings)


def test_what_callers_of_every_kind_of_processor_say_changes_nothing(
    processor: LLM2CLIPProcessor,
) -> None:
    wanted = processor(text=["a dog", "a cat on a mat"], images=[draw_noise()] * 2)
    found = processor(
        text=["a dog", "a cat on a mat"],
        images=[draw_noise()] * 2,
        videos=None,
        audio=None,
        text_pair=None,
        text_kwargs={"padding": True, "truncation": "longest_first", "max_length": None},
        images_kwargs={"do_resize": True},
        audio_kwargs={"padding": True, "sampling_rate": 16000},
        videos_kwargs={"fps": 2},
        common_kwargs={"return_tensors": "pt"},
        add_special_tokens=True,
        padding_side="right",
        return_attention_mask=True,
    )
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_an_image_processors_own_options_are_taken() -> None:
    processor = tiny_model("siglip2")[1]
    patches = processor(images=draw_noise(), max_num_patches=4)["pixel_values"]
    assert patches.shape[1] == 4 < processor(images=draw_noise())["pixel_values"].shape[1]


@pytest.mark.parametrize("text", [5, {"a": 1}, 1.5, b"a dog", object()])
def test_what_is_neither_a_caption_nor_a_list_is_refused_by_its_kind(
    processor: LLM2CLIPProcessor, text: Any
) -> None:
    kind = type(text).__name__
    with pytest.raises(ValueError, match=f"text is {kind}; give one non-blank string or a list"):
        processor(text=text)


def test_a_length_without_room_for_a_caption_is_refused(processor: LLM2CLIPProcessor) -> None:
    prefix, suffix = prompt()
    least = len(prefix) + len(suffix) + 1
    for length in (2, least - 1):
        with pytest.raises(ValueError, match=rf"max_length={length} leaves no room.* {least}\."):
            processor(text=LONG_TEXT, max_length=length)
    assert processor(text=LONG_TEXT, max_length=least)["input_ids"].shape == (1, least)


def test_without_padding_rows_keep_their_lengths(processor: LLM2CLIPProcessor) -> None:
    texts = ["a dog", "two red apples", LONG_TEXT]
    rows = processor(text=texts, padding=False, return_tensors=None)["input_ids"]
    padded = processor(text=texts)["attention_mask"].sum(dim=1).tolist()
    assert [len(row) for row in rows] == padded


# Pictures


def test_pictures_come_as_float32_tensors_of_the_towers_size(
    processor: LLM2CLIPProcessor,
) -> None:
    pixel_values = processor(images=tiny_pictures(3))["pixel_values"]
    assert pixel_values.shape == (3, 3, 32, 32) and pixel_values.dtype == torch.float32
    assert processor(images=tiny_pictures(1)[0])["pixel_values"].shape == (1, 3, 32, 32)


def save_rotated(path: Path) -> None:
    upright = Image.new("RGB", (4, 2), "white")
    upright.putpixel((0, 0), RED)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side; to be turned right by a quarter
    upright.rotate(90, expand=True).save(path, exif=exif)


def save_animated(path: Path) -> None:
    frames = [Image.new("RGB", (4, 2), color) for color in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def save_sixteen_bit(path: Path) -> None:
    values = np.array([[0, 257, 256 * 128 + 128, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(path)


def save_palette_with_alpha(path: Path) -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([*RED, 0, 0, 255])
    picture.putpixel((1, 0), 1)
    picture.save(path, transparency=1)


def save_color_key(path: Path) -> None:
    picture = Image.new("RGB", (2, 1), RED)
    picture.putpixel((1, 0), (0, 0, 255))
    picture.save(path, transparency=(0, 0, 255))


def save_as(mode: str, colors: list[Any], path: Path) -> None:
    picture = Image.new(mode, (len(colors), 1))
    for column, color in enumerate(colors):
        picture.putpixel((column, 0), color)
    picture.save(path)


def grey(value: int) -> tuple[int, int, int]:
    return (value, value, value)


# Name of the file, how it is saved, and the RGB values that its first row must have.
ODD_PICTURES: dict[str, tuple[Any, list[tuple[int, int, int]]]] = {
    "rotated.png": (save_rotated, [RED, WHITE, WHITE, WHITE]),
    "animated.gif": (save_animated, [RED] * 4),
    # 65535 / 257 = 255, so 257 is one step and 256 · 128 + 128 = 257 · 128 the middle.
    "sixteen_bit.png": (save_sixteen_bit, [grey(0), grey(1), grey(128), grey(255)]),
    "palette_with_alpha.png": (save_palette_with_alpha, [RED, WHITE]),
    "color_key.png": (save_color_key, [RED, WHITE]),
    "grey.png": (partial(save_as, "L", [0, 100]), [grey(0), grey(100)]),
    "one_bit.png": (partial(save_as, "1", [0, 1]), [grey(0), grey(255)]),
    "grey_with_alpha.png": (
        partial(save_as, "LA", [(0, 255), (0, 0), (100, 255)]),
        [grey(0), WHITE, grey(100)],
    ),
    "alpha.png": (
        # A fifth of red on white: 255, and 255 · 4 / 5 = 204.
        partial(save_as, "RGBA", [(*RED, 255), (*RED, 0), (*RED, 51)]),
        [RED, WHITE, (255, 204, 204)],
    ),
    # Full cyan absorbs red, no ink is white, black is black.
    "cmyk.tif": (
        partial(save_as, "CMYK", [(255, 0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 255)]),
        [(0, 255, 255), WHITE, (0, 0, 0)],
    ),
}


@pytest.fixture
def odd_picture(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Any]:
    """An odd picture's file and what its first row must be."""
    save, wanted = ODD_PICTURES[request.param]
    save(tmp_path / request.param)
    return tmp_path / request.param, wanted


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Address of a web server on this machine that serves the test's folder."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    handler = partial(Quiet, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


@pytest.mark.parametrize("odd_picture", ODD_PICTURES, indirect=True)
@pytest.mark.parametrize("given_as", ["path", "string", "PIL", "URL"])
def test_odd_pictures_have_the_right_pixels_however_they_are_given(
    odd_picture: Any, given_as: str, server: str
) -> None:
    path, wanted = odd_picture
    picture: Any = {
        "path": lambda: path,
        "string": lambda: str(path),
        "PIL": lambda: Image.open(path),
        "URL": lambda: f"{server}/{path.name}",
    }[given_as]()
    pixels = np.asarray(load(picture))
    found = [tuple(int(value) for value in pixel) for pixel in pixels[0]]
    assert found == wanted


def save_broken(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.jpg"
    if kind == "truncated":
        draw_noise().save(path)
        path.write_bytes(path.read_bytes()[:-800])
    elif kind == "headless":
        draw_noise().save(path)
        path.write_bytes(path.read_bytes()[:300])
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("<html>not found</html>")
    return path


BROKEN = {
    "truncated": "the picture is truncated or corrupt",
    "headless": "the picture is truncated or corrupt",
    "empty": "not a picture that Pillow reads, or empty",
    "text": "not a picture that Pillow reads",
    "missing": "no such picture",
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("kind_of_path", [Path, str])
def test_a_broken_picture_is_named_by_its_path(
    processor: LLM2CLIPProcessor, kind: str, kind_of_path: Any, tmp_path: Path
) -> None:
    path = kind_of_path(save_broken(tmp_path, kind))
    with pytest.raises(ValueError, match=rf"{kind}\.jpg: {BROKEN[kind]}"):
        processor(images=[draw_noise(), path])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "PPM"])
def test_a_picture_cut_anywhere_is_named_by_its_path(kind: str, tmp_path: Path) -> None:
    whole, path = io.BytesIO(), tmp_path / "cut"
    draw_noise(8, 8).save(whole, kind)
    content = whole.getvalue()
    last = len(content) - (20 if kind == "PNG" else 0)  # checksums and end mark hold no pixels
    for length in range(0, last, 7 if kind == "JPEG" else 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=rf"^{path}: (not a picture|the picture is truncated)"):
            load_pictures([path])


def test_a_broken_picture_opened_elsewhere_is_named_by_its_path(
    processor: LLM2CLIPProcessor, tmp_path: Path
) -> None:
    picture = Image.open(save_broken(tmp_path, "truncated"))
    with pytest.raises(ValueError, match=r"truncated\.jpg: the picture is truncated"):
        processor(images=picture)


@pytest.mark.parametrize("kind", ["truncated", "text", "missing"])
def test_a_broken_picture_on_the_web_is_named_by_its_address(
    processor: LLM2CLIPProcessor, kind: str, server: str, tmp_path: Path
) -> None:
    save_broken(tmp_path, kind)
    with pytest.raises(ValueError, match=rf"{server}/{kind}\.jpg"):
        processor(images=f"{server}/{kind}.jpg")


def test_all_broken_pictures_are_named_at_once(
    processor: LLM2CLIPProcessor, tmp_path: Path
) -> None:
    paths = [save_broken(tmp_path, kind) for kind in ("truncated", "missing")]
    with pytest.raises(ValueError, match=r"truncated\.jpg(.|\n)*missing\.jpg"):
        processor(images=[*paths, draw_noise()])


def test_a_decompression_bomb_is_refused_by_its_path(
    processor: LLM2CLIPProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bomb.png"
    draw_noise(40, 56).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow refuses twice as many
    with pytest.raises(ValueError, match=r"bomb\.png: .*2240 pixels.*Shrink"):
        processor(images=path)


def test_float_pixels_are_refused_by_path(processor: LLM2CLIPProcessor, tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match=r"float\.tif: float pixels have no known range"):
        processor(images=tmp_path / "float.tif")


@pytest.mark.parametrize("value", [-1, 65536])
def test_integers_beyond_sixteen_bits_are_refused(value: int) -> None:
    pixels = np.full((2, 2), value, dtype=np.int32)
    with pytest.raises(ValueError, match="picture number 0: pixels outside 0 to 65535"):
        load_pictures([Image.fromarray(pixels)])


@pytest.mark.parametrize("picture", [None, b"bytes", 3, ["nested.png"]])
def test_what_is_not_a_picture_is_refused_with_its_number(picture: Any) -> None:
    name = type(picture).__name__
    with pytest.raises(ValueError, match=rf"Picture number 1 is {name}; give a PIL image"):
        load_pictures([draw_noise(), picture])


@pytest.mark.parametrize("picture", [b"bytes", io.BytesIO(b"bytes"), "data:image/png;base64,AA"])
def test_a_picture_in_memory_is_refused_with_the_way_to_open_it(picture: Any) -> None:
    with pytest.raises(ValueError, match=r"PIL\.Image\.open.*BytesIO"):
        load_pictures([picture])


def test_an_empty_list_of_pictures_is_refused(processor: LLM2CLIPProcessor) -> None:
    with pytest.raises(ValueError, match="images is an empty list"):
        processor(images=[])


def test_arrays_and_pictures_give_equal_pixels(processor: LLM2CLIPProcessor) -> None:
    picture = draw_noise()
    from_picture = processor(images=picture)["pixel_values"]
    assert torch.equal(from_picture, processor(images=np.asarray(picture))["pixel_values"])


def as_tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.copy()).permute(2, 0, 1)


@pytest.mark.parametrize("make", [np.asarray, as_tensor], ids=["array", "tensor"])
def test_sixteen_bit_arrays_are_scaled_as_sixteen_bit_pictures_are(
    processor: LLM2CLIPProcessor, make: Any
) -> None:
    eight = np.asarray(draw_noise())
    wanted = processor(images=make(eight))["pixel_values"]
    # 257 times 0 … 255 is 0 … 65535; anything short of the next step is the same step.
    sixteen = eight.astype(np.uint16) * 257
    sixteen[sixteen < 65535] += 256
    assert torch.equal(processor(images=make(sixteen))["pixel_values"], wanted)


@pytest.mark.parametrize("make", [np.asarray, as_tensor], ids=["array", "tensor"])
@pytest.mark.parametrize(
    "settings",
    [
        {"do_rescale": False},
        {"images_kwargs": {"do_rescale": False}},
        {"common_kwargs": {"do_rescale": False}},
        {"images_kwargs": {"do_rescale": False}, "common_kwargs": {"do_rescale": True}},
    ],
)
def test_floats_are_taken_when_said_to_be_from_0_to_1(
    processor: LLM2CLIPProcessor, settings: Any, make: Any
) -> None:
    flat = np.full((32, 32, 3), 102, dtype=np.uint8)  # no resampling: size and colour stay
    wanted = processor(images=flat)["pixel_values"]
    found = processor(images=make(flat.astype(np.float32) / 255), **settings)["pixel_values"]
    # The same numbers, divided by 255 here or there, around one.
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


FLOAT_RANGE = r"whose range is not known\. Give uint8.*do_rescale=False"
ODD_ARRAYS: dict[str, tuple[Any, str]] = {
    "float in 0 to 1": (np.full((8, 8, 3), 0.5, dtype=np.float32), f"float32.*{FLOAT_RANGE}"),
    "float in 0 to 255": (np.full((8, 8, 3), 128.0), f"float64.*{FLOAT_RANGE}"),
    "half tensor": (torch.full((3, 8, 8), 0.5, dtype=torch.bfloat16), f"bfloat16.*{FLOAT_RANGE}"),
    "NaN": (np.full((8, 8, 3), np.nan, dtype=np.float32), f"float32.*{FLOAT_RANGE}"),
    "whole numbers": (np.full((8, 8, 3), 128), f"int64.*{FLOAT_RANGE}"),
    "empty": (np.zeros((0, 0, 3), dtype=np.uint8), r"shape \(0, 0, 3\)"),
    "grey": (np.zeros((8, 9), dtype=np.uint8), r"shape \(8, 9\); .*Image\.fromarray"),
    "transparency": (np.zeros((8, 9, 4), dtype=np.uint8), r"shape \(8, 9, 4\)"),
    "colours first or last": (np.zeros((3, 9, 3), dtype=np.uint8), r"shape \(3, 9, 3\)"),
}


@pytest.mark.parametrize("kind", ODD_ARRAYS)
def test_an_array_of_unknown_range_or_place_is_refused_by_its_number(
    processor: LLM2CLIPProcessor, kind: str
) -> None:
    array, fault = ODD_ARRAYS[kind]
    with pytest.raises(ValueError, match=rf"picture number 1 .*{fault}"):
        processor(images=[np.zeros((8, 9, 3), dtype=np.uint8), array])


@pytest.mark.parametrize("value", [np.nan, -0.1, 1.5, 128.0])
def test_floats_outside_0_to_1_are_refused_where_nothing_rescales(
    processor: LLM2CLIPProcessor, value: float
) -> None:
    with pytest.raises(ValueError, match=r"picture number 0 has pixels from .*must be in \[0, 1\]"):
        processor(images=np.full((8, 8, 3), value), do_rescale=False)


def test_a_batch_in_one_array_is_its_pictures(processor: LLM2CLIPProcessor) -> None:
    pictures = np.stack([np.asarray(draw_noise()), np.asarray(draw_noise())[::-1]])
    wanted = processor(images=list(pictures))["pixel_values"]
    assert torch.equal(processor(images=pictures)["pixel_values"], wanted)
    with pytest.raises(ValueError, match="picture number 0 has float64"):
        processor(images=pictures / 255)


def test_a_picture_without_pixels_is_refused(processor: LLM2CLIPProcessor) -> None:
    with pytest.raises(ValueError, match="picture number 0: the picture has no pixels"):
        processor(images=Image.new("RGB", (0, 4)))


# Saving and loading


def test_saved_and_loaded_gives_equal_inputs(tmp_path: Path) -> None:
    before = LLM2CLIPProcessor(
        CLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False),
        shared_processor().tokenizer,
        20,
    )
    before.save_pretrained(tmp_path)
    after = AutoProcessor.from_pretrained(tmp_path)
    assert type(after) is LLM2CLIPProcessor and after.max_text_length == 20
    inputs = {"text": ["a dog", LONG_TEXT], "images": [draw_noise(), draw_noise(33, 64)]}
    wanted, found = before(**inputs), after(**inputs)
    assert wanted.keys() == found.keys() == {"input_ids", "attention_mask", "pixel_values"}
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert after.num_truncated_texts == 1


def test_the_count_of_cut_texts_is_not_saved(tmp_path: Path, processor: LLM2CLIPProcessor) -> None:
    processor(text=LONG_TEXT)
    processor.save_pretrained(tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path).num_truncated_texts == 0
    assert "num_truncated_texts" not in (tmp_path / "processor_config.json").read_text()


def test_a_bare_tokenizer_gives_the_processors_ids(
    tmp_path: Path, processor: LLM2CLIPProcessor
) -> None:
    processor.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    texts = ["  a dog ", LONG_TEXT, '東京 "x"']
    ids = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")["input_ids"]
    assert torch.equal(ids, processor(text=texts)["input_ids"])


def test_a_processor_without_its_tokenizers_prompt_differs() -> None:
    # The prompt lives in the tokenizer, so this shows that the equalities above can fail.
    bare = LLM2CLIPProcessor(shared_processor().image_processor, tiny_tokenizer(), 32)
    assert (
        bare(text="a dog")["input_ids"].shape != shared_processor()(text="a dog")["input_ids"].shape
    )
