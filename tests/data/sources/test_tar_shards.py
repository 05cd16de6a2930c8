"""Headers of a tar shard that claim sizes which no member has are errors of that shard."""

from __future__ import annotations

import tarfile
from functools import partial
from pathlib import Path

import pytest

from modeling_llm2clip.data.remote.remote_access import RetryPolicy
from modeling_llm2clip.data.remote.remote_files import RemoteFile
from modeling_llm2clip.data.sources.shard_streams import BrokenShardError, read_shard
from modeling_llm2clip.data.sources.tar_shards import read_tar_shard
from modeling_llm2clip.data.validation_errors import ErrorCollector

BROKEN = "not a tar shard, or compressed, or broken"


def make_header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """Make a header of any size, which `tarfile` itself writes from 0 to 8 GiB alone."""
    plain = tarfile.TarInfo(name)
    plain.type = kind
    header = bytearray(plain.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = bytes([0xFF if size < 0 else 0x80]) + (size % 2**88).to_bytes(11, "big")
    header[148:156] = b" " * 8  # in the place of the checksum
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def make_member(name: str, content: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    return make_header(name, len(content), kind) + content + bytes(-len(content) % 512)


def make_pax_member(name: str, size: int) -> bytes:
    """Make a member whose size is in an extended header."""
    record = f" size={size}\n"
    length = next(n for n in range(100) if len(f"{n}{record}") == n)
    return make_member("pax", f"{length}{record}".encode(), tarfile.XHDTYPE) + make_header(name, 0)


EXTENDED = {
    "pax": tarfile.XHDTYPE,
    "global pax": tarfile.XGLTYPE,
    "long name": tarfile.GNUTYPE_LONGNAME,
    "long link": tarfile.GNUTYPE_LONGLINK,
}
MAKERS = {
    **{name: partial(make_header, "2.jpg", kind=kind) for name, kind in EXTENDED.items()},
    **{
        f"{make.__name__} {name}": partial(make, name)
        for make in (make_header, make_pax_member)
        for name in ("2.txt", "2.json", "2.jpg", "2.mp4")
    },
}


@pytest.mark.parametrize("name", MAKERS)
def test_no_claimed_size_is_believed(name: str, tmp_path: Path) -> None:
    """Fake sizes cost neither memory nor time; earlier samples are kept."""
    good = b"".join(make_member(f"{i}.jpg", b"") + make_member(f"{i}.txt", b"a dog") for i in "01")
    shard = tmp_path / "shard.tar"
    for size in (-512, -1024, 2**33, 2**62, 2**80):
        shard.write_bytes(good + MAKERS[name](size) + bytes(1024))
        errors = ErrorCollector()
        records = list(read_tar_shard(shard, "shard.tar", errors))
        assert records[0].fields == {"caption": "a dog"} and len(records) <= 2
        assert errors.places[BROKEN][0].startswith("shard.tar (")
        with pytest.raises(BrokenShardError, match=BROKEN):
            list(read_shard(RemoteFile(str(shard), RetryPolicy()), "shard.tar"))


def test_folders_are_left_out_and_long_names_are_read(tmp_path: Path) -> None:
    shard = tmp_path / "shard.tar"
    folder = make_header("folder", 0, tarfile.DIRTYPE)
    name = "n" * 200  # of more characters than the field of a header has
    long_name = make_member("long", f"{name}.txt".encode(), tarfile.GNUTYPE_LONGNAME)
    shard.write_bytes(folder + long_name + make_member("cut", b"a dog") + bytes(1024))
    errors = ErrorCollector()
    assert [record.place for record in read_tar_shard(shard, "s", errors)] == [f"s: {name}"]
    assert errors.total == 0
