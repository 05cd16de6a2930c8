"""Weight files are read lazily and without running code, or refused by name."""

from __future__ import annotations

import pickle
import re
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import pytest
import torch
from converting import read_checkpoint, save_checkpoint

from modeling_llm2clip.model_folders.weights import count_changed, open_weights, warn_of_rounding


def wrap(state: dict[str, Any], *, under: str | None, prefix: str) -> dict[str, Any]:
    wrapped = {f"{prefix}{name}": value for name, value in state.items()}
    return wrapped if under is None else {under: wrapped, "epoch": 1, "optimizer": {"lr": 1e-5}}


@pytest.mark.parametrize("under", [None, "model", "module", "state_dict"])
def test_names_may_be_nested_and_wrapped(tmp_path, under) -> None:
    state = read_checkpoint("eva02")
    for prefix in ("", "module."):
        torch.save(wrap(state, under=under, prefix=prefix), tmp_path / "c.pt")
        opened = open_weights(tmp_path / "c.pt")
        assert set(opened) == set(state)
        assert all(torch.equal(opened[name].read(), state[name]) for name in state)


@pytest.mark.parametrize("content", [b"", b"hello", b"version https://git-lfs.github.com/spec/v1"])
def test_a_file_that_is_not_a_pytorch_file(tmp_path, content) -> None:
    (tmp_path / "c.pt").write_bytes(content)
    error = f"c.pt is not a PyTorch weight file: it begins with {content[:40]!r}"
    with pytest.raises(ValueError, match=re.escape(error)):
        open_weights(tmp_path / "c.pt")


def test_a_broken_pytorch_file(tmp_path) -> None:
    source = save_checkpoint("openai", tmp_path)
    whole = source.read_bytes()
    number = len(whole) // 2  # in a weight
    flipped = whole[:number] + bytes([whole[number] ^ 1]) + whole[number + 1 :]
    for content in (b"PK\x03\x04 broken zip", b"\x80\x02 broken pickle", whole[:-1000], flipped):
        source.write_bytes(content)
        with pytest.raises(ValueError, match=r"\.pt (is not a complete|contains more than)"):
            open_weights(source)


def test_an_archive_without_checksums_is_refused_with_the_cause(tmp_path) -> None:
    computes = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"weight": torch.ones(3)}, tmp_path / "c.pt")
    finally:
        torch.serialization.set_crc32_options(computes)
    with pytest.raises(ValueError, match=r"c\.pt .*saved without CRC-32.*save it again without"):
        open_weights(tmp_path / "c.pt")


class _Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (self.path, "w")


@pytest.mark.parametrize("legacy", [True, False])
def test_a_pickle_with_code_in_it_is_refused_and_does_not_run(tmp_path, legacy) -> None:
    mark = tmp_path / "was-run"
    content = {"state_dict": read_checkpoint("openai"), "hook": _Payload(str(mark))}
    torch.save(content, tmp_path / "c.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"contains more than weights .*could run code"):
        open_weights(tmp_path / "c.pt")
    assert not mark.exists()
    with (tmp_path / "plain.pt").open("wb") as file:
        pickle.dump(_Payload(str(mark)), file)
    with pytest.raises(ValueError, match=r"plain\.pt (contains more than|is not a complete)"):
        open_weights(tmp_path / "plain.pt")
    assert not mark.exists()


def test_an_older_pytorch_file_with_only_weights_is_read(tmp_path) -> None:
    state = read_checkpoint("openai")
    torch.save(state, tmp_path / "c.pt", _use_new_zipfile_serialization=False)
    assert set(open_weights(tmp_path / "c.pt")) == set(state)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ({"state_dict": {"a": torch.ones(1)}, "args": Namespace(lr=1e-5)}, r"argparse\.Namespace"),
        ({"epoch": 3, "lr": 1e-5}, r"expected a state dict.*other entries \['epoch', 'lr'\]"),
        ({"module.a": torch.ones(1), "b": torch.ones(1)}, r"1 of 2 names begin with 'module\.'"),
    ],
)
def test_anything_but_weights_in_a_file_is_named(tmp_path, content, error) -> None:
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=error):
        open_weights(tmp_path / "c.pt")


def test_a_repository_with_only_bin_files_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"\.bin files are not downloaded: download"):
        open_weights(tmp_path)


def test_unchanged_entries_are_not_reported_as_rounded_away() -> None:
    before = torch.ones(8)
    after = before + torch.tensor([1.0, 1e-4, 1e-4, 0, 0, 0, 0, 0])  # bfloat16 has 8 bits
    assert count_changed(before, after, torch.float32) == (3, 3)
    assert count_changed(before, after, torch.bfloat16) == (1, 3)
    assert warn_of_rounding([(3, 3), (0, 0)], torch.float32, what="It") == 1
    assert warn_of_rounding([(0, 0)], torch.float32, what="It") == 1
    with pytest.warns(UserWarning, match=r"It changes 33\.3% of the entries that it should"):
        warn_of_rounding([(1, 3)], torch.bfloat16, what="It")
