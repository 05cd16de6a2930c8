"""Images that cannot be decoded, met while a dataset is encoded: all are named, nothing is lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from embedding_runs import IMAGE
from extracting import EXACT
from interruptions import read_bytes
from PIL import Image
from tiny_folders import save_captioned_images

from modeling_llm2clip import DataValidationError
from modeling_llm2clip.configs.encoding_config import EmbedConfig, ExtractConfig
from modeling_llm2clip.data.images import image_sources
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.data.store.store_manifest import StoreManifest
from modeling_llm2clip.embedding import embed as embedding
from modeling_llm2clip.embedding import extract as extraction
from modeling_llm2clip.embedding import sharded_writer
from modeling_llm2clip.embedding.embedding_store_writer import EmbeddingStoreWriter
from modeling_llm2clip.embedding.shard_encoding import ImageShardEncoder
from modeling_llm2clip.embedding.sharded_writer import ShardedWriter

_COUNT = 18
Run = Callable[[Path], Path]
_RUNS: list[tuple[Callable[..., Path], ExtractConfig | EmbedConfig]] = [
    # Eight images a shard, or four.
    (
        extraction.extract,
        ExtractConfig(**{**vars(EXACT), "max_shard_size": "1KiB", "batch_size": 2}),
    ),
    (embedding.embed, IMAGE),
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return save_captioned_images(folder, count=_COUNT)


@pytest.fixture(params=_RUNS, ids=["extract", "embed"])
def run(request: Any, model: Path, data: Path) -> Run:
    """Encodes what is in the folder of images now."""
    function, config = request.param
    return lambda output: function(model, load_records(data), output, config, modality="image")


def break_images(data: Path, numbers: Sequence[int]) -> dict[Path, bytes]:
    contents = {file: file.read_bytes() for file in (data / f"{n}.png" for n in numbers)}
    for file, content in contents.items():
        file.write_bytes(content[: len(content) // 2])
    return contents


def repair(contents: Mapping[Path, bytes]) -> None:
    for file, content in contents.items():
        file.write_bytes(content)


def stop_and_repair(run: Run, data: Path, output: Path) -> None:
    """Begin an output that meets a broken image, and repair the image."""
    contents = break_images(data, (9,))
    with pytest.raises(DataValidationError):
        run(output)
    repair(contents)


def count_encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of images of each shard that is encoded from now on."""
    sizes: list[int] = []
    encode = ImageShardEncoder.encode

    def note(self: ImageShardEncoder, prepared: Any) -> Any:
        sizes.append(len(prepared.inputs))
        return encode(self, prepared)

    monkeypatch.setattr(ImageShardEncoder, "encode", note)
    return sizes


def stop_at_shard(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """End a run before a shard is written; -1 is the last one."""
    write = ShardedWriter.write

    def stop(self: Any, shard: int, *others: Any) -> None:
        if shard == range(self.manifest.num_shards)[number]:
            raise KeyboardInterrupt
        write(self, shard, *others)

    monkeypatch.setattr(ShardedWriter, "write", stop)


def test_all_are_named_and_the_output_continues_once_they_are_repaired(
    run: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bytes are those of an output that never met them; complete shards are not computed."""
    output = tmp_path / "output"
    contents = break_images(data, (9, 17))
    with pytest.raises(
        DataValidationError, match=r"(?s)2 errors.*9\.png.*17\.png.*same command"
    ) as e:
        run(output)
    assert e.value.counts == {"image unreadable": 2}
    sizes = count_encoded(monkeypatch)
    with pytest.raises(DataValidationError, match="image unreadable: 2 "):
        run(output)
    assert 0 < sum(sizes) < _COUNT  # a shard was complete, and the second run did not compute it
    sizes.clear()
    repair(contents)
    note = output / "_unreadable-images.json.tmp"
    text = note.read_text(encoding="utf-8")
    note.write_text(text.replace("9.png", "8.png"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"_unreadable-images\.json\.tmp is damaged"):
        run(output)
    note.write_text(text, encoding="utf-8")
    run(output)
    assert 0 < sum(sizes) < _COUNT
    assert read_bytes(output) == read_bytes(run(tmp_path / "fresh"))


def test_an_output_with_another_image_that_changed_is_refused(
    run: Run, data: Path, tmp_path: Path
) -> None:
    contents = break_images(data, (9,))
    with pytest.raises(DataValidationError):
        run(tmp_path / "output")
    before = read_bytes(tmp_path / "output")
    Image.new("RGB", (7, 9)).save(data / "0.png")  # whose shard is complete
    repair(contents)
    with pytest.raises(ValueError, match="holds another output: images"):
        run(tmp_path / "output")
    assert read_bytes(tmp_path / "output") == before


@pytest.mark.parametrize(("function", "config"), _RUNS, ids=["extract", "embed"])
def test_a_partition_is_repaired_while_others_have_ended(
    function: Callable[..., Path],
    config: ExtractConfig | EmbedConfig,
    model: Path,
    data: Path,
    tmp_path: Path,
) -> None:
    def run(output: Path, partition: str | None = None) -> Path:
        records = load_records(data)
        return function(model, records, output, config, modality="image", partition=partition)

    contents = break_images(data, (9,))  # in the second shard of three, or the third of five
    number = 2 if function is extraction.extract else 1
    with pytest.raises(DataValidationError):
        run(tmp_path / "out", f"{number}/2")
    run(tmp_path / "out", f"{3 - number}/2")
    repair(contents)
    run(tmp_path / "out", f"{number}/2")
    assert read_bytes(run(tmp_path / "out")) == read_bytes(run(tmp_path / "fresh"))


def test_an_output_that_left_images_out_is_repaired_unless_these_have_changed(
    model: Path, data: Path, tmp_path: Path
) -> None:
    def run(name: str = "out", **options: Any) -> Path:
        records, config = load_records(data), replace(IMAGE, **options)
        return embedding.embed(model, records, tmp_path / name, config, modality="image")

    contents = break_images(data, (0, 9))
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patched:
        stop_at_shard(patched, 1)
        run(skip_invalid=True)  # a complete shard lacks the first image
    with pytest.raises(DataValidationError, match=r"9\.png"):
        run()
    repair(contents)
    with pytest.raises(ValueError, match="holds another output: images"):
        run()
    break_images(data, (0,))
    assert read_bytes(run()) == read_bytes(run("fresh", skip_invalid=True))


@pytest.mark.parametrize(("function", "config"), _RUNS, ids=["extract", "embed"])
def test_a_repair_lets_in_no_other_option(
    function: Callable[..., Path],
    config: ExtractConfig | EmbedConfig,
    model: Path,
    data: Path,
    tmp_path: Path,
) -> None:
    contents = break_images(data, (9,))
    output = tmp_path / "output"
    with pytest.raises(DataValidationError):
        function(model, load_records(data), output, config, modality="image")
    repair(contents)
    other = replace(config, precision="bfloat16")
    with pytest.raises(ValueError, match="precision"):
        function(model, load_records(data), output, other, modality="image")


def test_an_image_that_changes_again_after_its_repair_is_refused(
    run: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of two repairs is in a complete shard when the run is killed."""
    stop_and_repair(run, data, tmp_path / "output")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_at_shard(patched, -1)
        run(tmp_path / "output")
    before = read_bytes(tmp_path / "output")
    Image.new("RGB", (7, 9)).save(data / "9.png")
    with pytest.raises(ValueError, match="holds another output: images"):
        run(tmp_path / "output")
    assert read_bytes(tmp_path / "output") == before


def test_a_store_that_another_run_writes_does_not_get_another_plan(
    model: Path, data: Path, tmp_path: Path
) -> None:
    """Its shards would name the plan before, and the complete store would count as damaged."""
    (function, config), _ = _RUNS
    contents = break_images(data, (9,))
    with pytest.raises(DataValidationError):
        function(model, load_records(data), tmp_path / "out", config, modality="image")
    repair(contents)
    writer = EmbeddingStoreWriter(tmp_path / "out", StoreManifest.read(tmp_path / "out"))
    with writer.hold(2), pytest.raises(ValueError, match="Another run computes shard 2 of 3"):
        function(model, load_records(data), tmp_path / "out", config, modality="image")
    assert StoreManifest.read(tmp_path / "out") == writer.manifest


def test_a_kill_between_a_renewed_shard_and_its_record_is_no_damage(
    run: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_and_repair(run, data, tmp_path / "output")
    write = sharded_writer.write_atomically

    def stop(file: Path, content: bytes) -> None:
        if file.suffix == ".json":  # of the first shard, or the manifest alone
            raise KeyboardInterrupt
        write(file, content)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(sharded_writer, "write_atomically", stop)
        run(tmp_path / "output")
    assert read_bytes(run(tmp_path / "output")) == read_bytes(run(tmp_path / "fresh"))


def test_a_damaged_shard_does_not_get_a_new_hash_with_the_repair(
    run: Run, data: Path, tmp_path: Path
) -> None:
    stop_and_repair(run, data, tmp_path / "output")
    files = sorted((tmp_path / "output").iterdir())
    shard = next(file for file in files if file.suffix in (".safetensors", ".parquet"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=rf"1 damaged file: {shard.name}: SHA-256"):
        run(tmp_path / "output")


def test_all_are_named_where_the_sample_of_int8_ranges_meets_one(
    model: Path, data: Path, tmp_path: Path
) -> None:
    break_images(data, (0, 9))
    config = replace(IMAGE, dtype="int8", calibration_size=1)
    with pytest.raises(DataValidationError, match="image unreadable: 2 "):
        embedding.embed(model, load_records(data), tmp_path / "out", config, modality="image")
    assert not (tmp_path / "out").exists()


def test_each_image_is_decoded_once(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Any] = []
    decode = image_sources.open_image

    def note(image: Any, **options: Any) -> Any:
        decoded.append(image)
        return decode(image, **options)

    monkeypatch.setattr(image_sources, "open_image", note)
    run(tmp_path / "output")
    assert len(decoded) == len(set(decoded)) == _COUNT
