"""Safetensors files of weights and of named embeddings: damage is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_encoders import write_named_embeddings

from modeling_llm2clip.data import safetensors_files
from modeling_llm2clip.data.named_embeddings import read_named_embeddings, side_file
from modeling_llm2clip.data.safetensors_files import iterate_tensors, serialize_tensors

INDEX = "model.safetensors.index.json"


def write_sharded(folder: Path) -> dict[str, torch.Tensor]:
    folder.mkdir(exist_ok=True)
    tensors = {f"layer.{n}": torch.randn(2, n + 1) for n in range(4)}
    tensors["head"] = torch.ones(3, dtype=torch.bfloat16)
    files = {name: f"model-0000{n % 2 + 1}-of-00002.safetensors" for n, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))
    return tensors


def test_tensors_come_once_in_the_order_of_their_names_however_they_are_sharded(
    tmp_path: Path,
) -> None:
    tensors = write_sharded(tmp_path / "sharded")
    save_file(tensors, tmp_path / "model.safetensors")
    files = [tmp_path / "model.safetensors"]
    for source in (sorted((tmp_path / "sharded").glob("*.safetensors")), files):
        found = list(iterate_tensors(source))
        assert [name for name, _ in found] == sorted(tensors)
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in found)
    layers = iterate_tensors(files, prefix="layer.")
    assert [name for name, _ in layers] == [f"layer.{n}" for n in range(4)]


def test_a_folder_belongs_to_the_names_where_a_base_is_given(tmp_path: Path) -> None:
    (tmp_path / "vision").mkdir()
    files = [tmp_path / "a.safetensors", tmp_path / "vision" / "a.safetensors"]
    for file in files:
        save_file({"weight": torch.ones(1)}, file)
    assert [name for name, _ in iterate_tensors(files, base=tmp_path)] == [
        "vision/weight",
        "weight",
    ]
    with pytest.raises(ValueError, match=r"weight is in two files, .*a\.safetensors and .*vision"):
        list(iterate_tensors(files))


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2).half()}, file)
    whole = file.read_bytes()
    length, json_broken = b"\xff" * 8 + whole[8:], whole[:8] + b"[" + whole[9:]
    for damaged in (whole[:-1], whole + b"0", b"", length, json_broken):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"weights\.safetensors: a safetensors file is tr"):
            list(iterate_tensors([file]))


def test_a_file_is_reopened_only_when_enough_of_it_is_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each opening parses the header; a file that stays open keeps what was read in memory."""
    tensors = {f"layer.{n:02}": torch.full((4,), float(n)) for n in range(20)}
    save_file(tensors, tmp_path / "model.safetensors")
    opened: list[Path] = []

    def open_counted(file: Path, framework: str) -> Any:
        opened.append(file)
        return safe_open(file, framework=framework)

    monkeypatch.setattr(safetensors_files, "safe_open", open_counted)
    monkeypatch.setattr(safetensors_files, "_MOST_MAPPED_BYTES", 9 * 16)  # of 10 tensors
    read = dict(iterate_tensors([tmp_path / "model.safetensors"]))
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert len(opened) == 2


def test_equal_content_gives_equal_bytes_in_whatever_order_it_comes(tmp_path: Path) -> None:
    """With ten entries of metadata, safetensors' own order is another in almost every call."""
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(1, dtype=torch.bfloat16)}
    metadata = {f"entry {n}": f'ünïcode \n\t"{n}" 夜' for n in range(10)}
    written = {
        serialize_tensors(tensors, dict(order))
        for order in (metadata.items(), reversed(metadata.items()), sorted(metadata.items()))
    }
    assert len(written) == 1
    file = tmp_path / "tensors.safetensors"
    file.write_bytes(written.pop())
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == metadata
        assert all(torch.equal(opened.get_tensor(name), tensors[name]) for name in tensors)
    assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0  # tensors follow it


def test_named_embeddings_are_read_as_they_were_written(tmp_path: Path) -> None:
    file = side_file(tmp_path, "images")
    embeddings = torch.randn(2, 3, dtype=torch.float16)
    write_named_embeddings(file, ["ä.png", "b/c.png"], embeddings, model="m")
    named = read_named_embeddings(file)
    assert named.names == ("ä.png", "b/c.png") and named.notes == {"model": "m"}
    assert torch.equal(named.embeddings, embeddings)


@pytest.mark.parametrize(
    ("names", "embeddings", "message"),
    [
        (["a", "b"], torch.tensor([[1.0], [float("nan")]]), r"infinity in 1 embedding: b"),
        (["a", "a"], torch.ones(2, 3), r"1 repeated name: a"),
        (["a"], torch.ones(2, 3), r"shape \(2, 3\) must be 2-D, with one row for each of the 1"),
        (["a"], torch.ones(1, 3, dtype=torch.int64), r"torch\.int64, not floating-point"),
    ],
)
def test_broken_embeddings_are_refused(
    names: list[str], embeddings: torch.Tensor, message: str, tmp_path: Path
) -> None:
    file = side_file(tmp_path, "texts")
    write_named_embeddings(file, names, embeddings)
    with pytest.raises(ValueError, match=rf"texts\.safetensors: .*{message}"):
        read_named_embeddings(file)


def test_other_safetensors_files_are_refused(tmp_path: Path) -> None:
    file = side_file(tmp_path, "texts")
    save_file({"weight": torch.ones(2)}, file)
    with pytest.raises(
        ValueError, match=r"must have a tensor 'embeddings'.*It has the tensors weight and"
    ):
        read_named_embeddings(file)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"truncated or damaged"):
        read_named_embeddings(file)
    names = [f"text_model.layers.{number}.mlp.weight" for number in range(700)]
    save_file({name: torch.ones(1) for name in names}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"mlp.weight and 695 more") as caught:
        read_named_embeddings(file)
    assert len(str(caught.value)) < 500 + len(str(file))
