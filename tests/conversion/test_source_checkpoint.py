"""Where a checkpoint is, and which family it belongs to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from converting import (
    FORMAT_OF,
    LLM,
    convert,
    plan,
    save_checkpoint,
)

from modeling_llm2clip.conversion.source_checkpoint import (
    CheckpointSource,
    LLMSource,
    find_published_hash,
    open_checkpoint,
    open_language_model,
    split_revision,
)
from modeling_llm2clip.data.atomic_files import hash_file
from modeling_llm2clip.model_folders.model_folder import RECORD_FILE


@pytest.mark.parametrize("family", FORMAT_OF)
@pytest.mark.parametrize("chosen", FORMAT_OF)
def test_keys_of_another_family(tmp_path, family, chosen) -> None:
    source = save_checkpoint(family, tmp_path)
    if family == chosen:
        assert plan(source, source_format=FORMAT_OF[chosen])
        return
    with pytest.raises(ValueError, match=f"of the family '{family}', the source format is for"):
        plan(source, source_format=FORMAT_OF[chosen])


def test_a_file_that_is_not_there(tmp_path) -> None:
    with pytest.raises(ValueError, match="no such folder, and no Hub id"):
        open_checkpoint(CheckpointSource(tmp_path / "c.pt"))
    with pytest.raises(ValueError, match=r"c\.pt: no such file"):
        open_checkpoint(CheckpointSource(tmp_path, file="c.pt"))
    with pytest.raises(ValueError, match="the weight file itself"):
        open_checkpoint(CheckpointSource(tmp_path))


def test_a_local_source_has_no_revision(tmp_path) -> None:
    file = save_checkpoint("openai", tmp_path)
    for source in (CheckpointSource(file, revision="deadbeef"),
                   CheckpointSource(tmp_path, file.name, "deadbeef")):  # fmt: skip
        with pytest.raises(ValueError, match="has no revision 'deadbeef'"):
            open_checkpoint(source)
    with pytest.raises(ValueError, match="has no revision 'deadbeef'"):
        open_language_model(LLMSource(LLM, "deadbeef"))


def test_the_revision_of_a_lora_follows_its_hub_id(tmp_path) -> None:
    assert split_revision("me/lora@abc") == ("me/lora", "abc")
    assert split_revision("me/lora") == ("me/lora", None)
    (tmp_path / "a@b").mkdir()
    assert split_revision(str(tmp_path / "a@b")) == (str(tmp_path / "a@b"), None)
    with pytest.raises(ValueError, match="no revision after its '@'"):
        split_revision("me/lora@")
    with pytest.raises(ValueError, match="has no revision 'abc'"):
        split_revision(f"{tmp_path}@abc")


def place_in_cache(file: Path, folder: Path) -> Path:
    """Put a file where huggingface_hub's cache has it: linked to a content named by its hash."""
    blob = folder / "models--me--it" / "blobs" / hash_file(file)
    snapshot = folder / "models--me--it" / "snapshots" / "abc"
    blob.parent.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    shutil.move(file, blob)
    (snapshot / file.name).symlink_to(Path("..", "..", "blobs", blob.name))
    return snapshot / file.name


def place_in_folder(file: Path, folder: Path) -> Path:
    """Put a file where `hf download --local-dir` has it, with its note."""
    notes = folder / ".cache" / "huggingface" / "download" / "weights"
    notes.mkdir(parents=True)
    (notes / f"{file.name}.metadata").write_text(f"{'a' * 40}\n{hash_file(file)}\n1764000000.5\n")
    (folder / "weights").mkdir()
    return Path(shutil.move(file, folder / "weights" / file.name))


@pytest.mark.parametrize("place", [place_in_cache, place_in_folder])
@pytest.mark.slow
def test_a_download_that_was_damaged_since_is_not_converted(
    place: Callable[[Path, Path], Path], tmp_path: Path
) -> None:
    file = save_checkpoint("openai", tmp_path / "source")
    file = place(file, tmp_path / "downloads")
    assert find_published_hash(file) == hash_file(file)
    folder = convert(file, tmp_path / "good", source_format=FORMAT_OF["openai"])
    files = json.loads((folder / RECORD_FILE).read_text())["files"]
    assert [one["as_published"] for one in files] == [True, False]  # the LLM's is of a folder
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.resolve().write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged: its SHA-256 is .*download it again"):
        convert(file, tmp_path / "new", source_format=FORMAT_OF["openai"])
    assert not (tmp_path / "new").exists()


def test_a_file_of_ones_own_has_no_published_hash(tmp_path: Path) -> None:
    assert find_published_hash(save_checkpoint("openai", tmp_path)) is None
