"""Images of Parquet files are read like Arrow does, however the file was written."""

from __future__ import annotations

import shlex
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modeling_llm2clip.data.images import parquet_images
from modeling_llm2clip.data.images.parquet_images import find_column_layout, read_image_bytes
from modeling_llm2clip.data.remote import file_locations


def write_images(
    file: Path, images: list[bytes | None], *, is_struct: bool = True, **options: Any
) -> Path:
    column: Any = images
    if is_struct:
        column = [
            None if image is None and number % 2 else {"bytes": image, "path": "a.png"}
            for number, image in enumerate(images)
        ]
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    else:
        kind = pa.binary()
    pq.write_table(pa.table({"image": pa.array(column, kind)}), file, **options)
    return file


def make_images(count: int, *, seed: int = 0, nulls: float = 0.0) -> list[bytes | None]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 3000, count)
    return [None if rng.random() < nulls else rng.bytes(int(size)) for size in sizes]


@settings(max_examples=75, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_image_is_what_was_written(data: st.DataObject, tmp_path: Path) -> None:
    choose = data.draw
    repeated = make_images(7) * 9
    images = choose(st.sampled_from([make_images(60), make_images(60, nulls=0.3), repeated]))
    if not choose(st.booleans()):
        images = images[: choose(st.integers(1, 9))]
    write_images(
        tmp_path / "0.parquet",
        images,
        is_struct=choose(st.booleans()),
        row_group_size=choose(st.sampled_from([1, 7, 100])),
        compression=choose(st.sampled_from(["none", "snappy", "zstd", "gzip", "lz4", "brotli"])),
        use_dictionary=choose(st.booleans()),
        data_page_version=choose(st.sampled_from(["1.0", "2.0"])),
        data_page_size=choose(st.sampled_from([100, 5000, 2**20])),
        dictionary_pagesize_limit=choose(st.sampled_from([2000, 2**20])),
        write_statistics=choose(st.booleans()),
        write_batch_size=choose(st.sampled_from([1, 4, 1024])),
        write_page_index=choose(st.booleans()),
    )
    clear_caches()
    rows = choose(st.permutations(range(len(images))))
    for row in rows:
        if images[row] is None:
            with pytest.raises(ValueError, match=f"row {row} has no image in 'image'"):
                read_image_bytes(tmp_path / "0.parquet", "image", row)
        else:
            assert read_image_bytes(tmp_path / "0.parquet", "image", row) == images[row]


def clear_caches() -> None:
    """Forget all files, as if another process read the rewritten ones."""
    find_column_layout.cache_clear()
    parquet_images._read_group_column.cache_clear()
    file_locations._states.clear()


def test_a_large_row_group_is_named_once_with_the_command_that_rewrites_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_images, "_LARGE_GROUP", 2 * 10**5)
    images = make_images(200)  # 300 kB
    file = write_images(tmp_path / "old.parquet", images)
    with pytest.warns(UserWarning) as caught:
        assert [read_image_bytes(file, "image", row) for row in range(200)] == images
    [message] = [str(warning.message) for warning in caught]
    assert message.startswith(f"{file}: a row group has ")
    python, _, program = shlex.split(message.partition("100 rows: ")[2])
    assert python == "python"
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    new = tmp_path / "new.parquet"
    assert pq.read_metadata(new).num_row_groups == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [read_image_bytes(new, "image", row) for row in range(200)] == images


def test_images_of_one_length_are_read(tmp_path: Path) -> None:
    table = pa.table({"image": pa.array([b"abc", b"def"], pa.binary(3))})
    pq.write_table(table, tmp_path / "0.parquet")
    assert read_image_bytes(tmp_path / "0.parquet", "image", 1) == b"def"


def test_threads_read_what_one_thread_reads(tmp_path: Path) -> None:
    images = make_images(200)
    file = write_images(tmp_path / "0.parquet", images, row_group_size=20, data_page_size=5000)
    wrong: list[int] = []

    def read(seed: int) -> None:
        for row in np.random.default_rng(seed).permutation(200).tolist():
            if read_image_bytes(file, "image", row) != images[row]:
                wrong.append(row)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(8)))
    assert not wrong


@pytest.mark.parametrize("compression", ["none", "snappy"])
def test_no_damage_gives_another_image_unnoticed(compression: str, tmp_path: Path) -> None:
    """Damage in headers is an error, or Arrow still reads the correct image."""
    images = [b"image %d" % number for number in range(6)]
    file = write_images(
        tmp_path / "0.parquet", images, compression=compression, use_dictionary=False
    )
    whole = file.read_bytes()
    group = pq.read_metadata(file).row_group(0).column(0)
    content_starts = whole.index(b"image 0") if compression == "none" else None
    for offset in range(group.data_page_offset, content_starts or group.data_page_offset + 20):
        file.write_bytes(whole[:offset] + bytes([whole[offset] ^ 0x55]) + whole[offset + 1 :])
        clear_caches()
        try:
            found = read_image_bytes(file, "image", 3)
        except ValueError:
            continue
        assert found == images[3], offset


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    file = write_images(tmp_path / "0.parquet", make_images(9))
    for row in (-1, 9):
        with pytest.raises(ValueError, match=f"has no row {row}"):
            read_image_bytes(file, "image", row)
    with pytest.raises(ValueError, match="no column 'photo' of images"):
        read_image_bytes(file, "photo", 0)
    short = tmp_path / "1.parquet"
    short.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"1\.parquet: not a Parquet file, or broken"):
        read_image_bytes(short, "image", 0)
