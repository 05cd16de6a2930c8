"""Named embeddings: what is read is checked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_encoders import write_named_embeddings

from modeling_llm2clip.data.named_embeddings import read_named_embeddings, side_file


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    file = side_file(tmp_path, "images")
    embeddings = torch.randn(2, 3, dtype=torch.float16)
    write_named_embeddings(file, ["ä.png", "b/c.png"], embeddings, model="m")
    found = read_named_embeddings(file)
    assert found.names == ("ä.png", "b/c.png") and found.notes == {"model": "m"}
    assert torch.equal(found.embeddings, embeddings)


@pytest.mark.parametrize(
    ("names", "embeddings", "message"),
    [
        (["a", "b"], torch.tensor([[1.0], [float("nan")]]), r"infinity in 1 embedding: b"),
        (["a", "a"], torch.ones(2, 3), r"1 repeated name: a"),
        (["a"], torch.ones(2, 3), r"shape \(2, 3\) must have one row for each of the 1 names"),
        (["a"], torch.ones(1, 3, dtype=torch.int64), r"torch\.int64; give floating-point"),
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
    with pytest.raises(ValueError, match=r"must hold a tensor 'embeddings'.*It holds weight and"):
        read_named_embeddings(file)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"truncated or damaged"):
        read_named_embeddings(file)


def test_a_file_with_the_weights_of_a_model_is_described_in_a_few_words(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    names = [f"text_model.layers.{number}.mlp.weight" for number in range(700)]
    save_file({name: torch.ones(1) for name in names}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"mlp.weight and 695 more") as caught:
        read_named_embeddings(file)
    assert len(str(caught.value)) < 500 + len(str(file))
