"""Laws of extraction: the embeddings are the model's, and no interruption shows in the bytes."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from interruptions import StopAfter, count_written_rows, largest_file, read_bytes
from launches import run_python
from PIL import Image
from stores import list_complete_shards
from tiny import tiny_model
from tiny_folders import export_tiny_model

from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPProcessor
from modeling_llm2clip.__main__ import main
from modeling_llm2clip.configs.extract_config import ExtractConfig
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.data.store.embedding_store import EmbeddingStore
from modeling_llm2clip.data.store.store_manifest import read_manifest
from modeling_llm2clip.data.store.store_shard_writer import ShardWriter
from modeling_llm2clip.encoding.encode import encode_images, encode_texts
from modeling_llm2clip.model_folders.fingerprint import fingerprint_text, fingerprint_vision
from modeling_llm2clip.scheduling.graceful_stop import (
    StageInterrupt,
    stop_on_signals,
)
from modeling_llm2clip.scheduling.shard_computation import parse_partition
from modeling_llm2clip.training.extraction import extract as stage
from modeling_llm2clip.training.extraction.extract import (
    describe_extraction,
    extract,
    merge_store,
)

ROOT = Path(__file__).parents[3]
WORDS = (
    "a red green old small dog cat apple house tree on under beside the wooden table sea".split()
)
EXACT = ExtractConfig(
    store_dtype="float32",
    max_shard_size="2KiB",
    token_budget=256,
    device="cpu",
    show_progress=False,
)


def make_records(count: int) -> list[CaptionedImage]:
    """Images with 5, 6 or 7 captions, up to two long ones, and captions that return."""
    generator = random.Random(0)

    def draw(most: int) -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(1, most)))

    return [
        CaptionedImage(
            image=None,
            name=f"{number}.png",
            group_id=str(number // 2),
            captions=(*(draw(9) for _ in range(4 + number % 3)), "a photo"),
            long_captions=tuple(draw(40) for _ in range(number % 3)),
        )
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def records() -> list[CaptionedImage]:
    return make_records(30)


@pytest.fixture(scope="module")
def undisturbed(
    model: Path, records: list[CaptionedImage], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed") / "store"
    return read_bytes(extract_captions(model, records, folder))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The records of a larger set as a user has them: enough work to be interrupted in."""
    folder = tmp_path_factory.mktemp("data")
    lines = [
        json.dumps({"image": r.name, "captions": r.captions, "long_captions": r.long_captions})
        for r in make_records(250)
    ]
    (folder / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def extract_captions(
    model: Path, records: list[CaptionedImage], folder: Path, config: ExtractConfig = EXACT
) -> Path:
    return extract(model, records, folder, config, modality="text")


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every batch that is written."""
    return count_written_rows(monkeypatch)


def count_records(folder: Path) -> int:
    return len(list(folder.glob("shard-*.json")))


def shorten(command: list[str]) -> list[str]:
    return [
        *command,
        "--modality",
        "text",
        "--max-shard-size",
        "2KiB",
        "--store-dtype",
        "float32",
        "--token-budget",
        "256",
        "--device",
        "cpu",
    ]


def test_every_record_finds_the_embeddings_of_its_captions(
    model: Path, records: list[CaptionedImage], tmp_path: Path
) -> None:
    extract_captions(model, records, tmp_path / "store")
    store = EmbeddingStore.open(tmp_path / "store", check="full")
    whole, processor = (
        LLM2CLIPModel.from_pretrained(model),
        LLM2CLIPProcessor.from_pretrained(model),
    )
    assert len(store) == len(records)
    for item, record in enumerate(records):
        assert (store.names[item], store.group_ids[item]) == (record.name, record.group_id)
        for texts, long in ((record.captions, False), (record.long_captions, True)):
            rows = store.rows_of(item, long=long)
            assert len(rows) == len(texts)
            if texts:
                expected = encode_texts(whole, processor, texts, project=False)
                # Sums of float32 in another order: the captions had other neighbors.
                torch.testing.assert_close(store.read(rows), expected, atol=1e-5, rtol=1e-5)
    store.require_fingerprint(fingerprint_text(model))


def test_duplicates_are_computed_once_and_truncated_captions_counted(
    model: Path, tmp_path: Path
) -> None:
    records = [
        CaptionedImage(None, "a", "a", ("a dog", "a cat"), ("dog " * 200,)),
        CaptionedImage(None, "b", "b", ("a cat", "a cat"), ("dog " * 200, "cat " * 200)),
    ]
    folder = extract_captions(model, records, tmp_path / "store")
    store = EmbeddingStore.open(folder)
    assert store.manifest.counts == {"captions": 7, "distinct": 4, "truncated": 2}
    assert store.manifest.num_rows == 4
    assert "(7 captions, 4 distinct, 2 truncated)" in describe_extraction(folder)[0]
    assert store.rows_of(1).tolist() == [store.rows_of(0)[1]] * 2
    assert store.rows_of(1, long=True)[0] == store.rows_of(0, long=True)[0]


def test_a_complete_store_is_found_complete_and_one_that_lost_a_file_is_not(
    model: Path, records: list[CaptionedImage], tmp_path: Path, written: list[int]
) -> None:
    for computes in (True, False):
        extract_captions(model, records, tmp_path / "store")
        assert bool(written) == computes
        written.clear()
    (tmp_path / "store" / "shard-00001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors: missing"):
        extract_captions(model, records, tmp_path / "store")


def test_rows_are_by_first_occurrence(model: Path, tmp_path: Path) -> None:
    records = [
        CaptionedImage(None, "x", "x", ("b", "a", "b"), ("one two three",)),
        CaptionedImage(None, "y", "y", ("one two three", "c")),
    ]
    extract_captions(model, records, tmp_path / "store")
    store = EmbeddingStore.open(tmp_path / "store")
    assert store.rows_of(0).tolist() == [0, 1, 0] and store.rows_of(0, long=True).tolist() == [2]
    assert store.rows_of(1).tolist() == [2, 3]
    numbers = [0, 1, 2, 3, 0, 1]
    assert store.rows_at([0, 0, 0, 0, 1, 1], numbers).tolist() == [0, 1, 0, 2, 2, 3]


def test_a_caption_is_tokenized_once_and_the_first_shard_does_not_wait_for_the_others(
    model: Path, records: list[CaptionedImage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenized: list[str] = []
    before_first_batch: list[int] = []
    list_ids, write = LLM2CLIPProcessor.list_ids, ShardWriter.write

    def note_texts(self: LLM2CLIPProcessor, texts: Any) -> Any:
        texts = list(texts)
        tokenized.extend(texts)
        return list_ids(self, texts)

    def note_batch(self: ShardWriter, embeddings: torch.Tensor) -> None:
        before_first_batch.append(len(tokenized))
        write(self, embeddings)

    monkeypatch.setattr(LLM2CLIPProcessor, "list_ids", note_texts)
    monkeypatch.setattr(ShardWriter, "write", note_batch)
    folder = extract_captions(model, records, tmp_path / "store")
    texts = dict.fromkeys(text for r in records for text in (*r.captions, *r.long_captions))
    assert tokenized == list(texts)
    assert before_first_batch[0] <= 2 * 16 < len(texts) == read_manifest(folder).num_rows


def stop_after_one(monkeypatch: pytest.MonkeyPatch, count: Callable[[], int]) -> None:
    monkeypatch.setattr(stage, "stop_on_signals", lambda: nullcontext(StopAfter(count)))


@pytest.mark.parametrize("thing", ["shard", "batch"])
def test_a_stopped_run_goes_on_and_leaves_the_same_bytes(
    model: Path,
    records: list[CaptionedImage],
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    written: list[int],
    monkeypatch: pytest.MonkeyPatch,
    thing: str,
) -> None:
    folder = tmp_path / "store"
    num_stops = 0
    for _ in range(200):
        count = partial(count_records, folder) if thing == "shard" else partial(len, written)
        stop_after_one(monkeypatch, count)
        try:
            extract_captions(model, records, folder)
        except StageInterrupt as error:
            assert f"what is done is in {folder}. Continue with the same call." in str(error)
            num_stops += 1
        else:
            break
    assert num_stops == (read_manifest(folder).num_shards if thing == "shard" else len(written))
    assert len(written) > read_manifest(folder).num_shards
    assert sum(written) == read_manifest(folder).num_rows  # nothing was computed twice
    assert read_bytes(folder) == undisturbed


def kill(folder: Path, model: Path, data: Path, *, times: int) -> dict[str, Any]:
    command = shorten(["extract", str(model), str(data), "{output}"])
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/helpers/kill_repeatedly.py"), "--times", str(times),
         str(folder), "--", *command],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


@pytest.mark.slow
@pytest.mark.parametrize("times", [3, 20])
def test_killed_at_random_moments_it_leaves_the_same_bytes(
    model: Path, data: Path, tmp_path: Path, times: int
) -> None:
    report = kill(tmp_path, model, data, times=times)
    assert len(report["kills"]) == times
    undisturbed = read_bytes(tmp_path / "undisturbed")
    assert len(undisturbed) > 20
    for folder in report["folders"]:
        assert read_bytes(Path(folder)) == undisturbed


@pytest.mark.slow
def test_two_processes_of_a_launch_leave_the_same_bytes_as_one(
    model: Path, data: Path, tmp_path: Path
) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert main(shorten(["extract", str(model), str(data), str(alone)])) == 0
    command = shorten(["extract", str(model), str(data), str(together)])
    printed = run_python("-m", "modeling_llm2clip", *command, processes=2)
    assert printed.count("Wrote") == 1  # the main process alone says so
    assert read_bytes(together) == read_bytes(alone)


@pytest.mark.slow
def test_partitions_leave_the_same_bytes_as_one_run_once_they_are_merged(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert main(shorten(["extract", str(model), str(data), str(alone)])) == 0
    command = shorten(["extract", str(model), str(data), str(together)])
    assert main([*command, "--partition", "2/2"]) == 0
    half = read_manifest(together).num_shards // 2
    assert f"{half} of {read_manifest(together).num_shards} shards" in capsys.readouterr().out
    assert list_complete_shards(together) == list(range(1, read_manifest(together).num_shards, 2))
    assert main(["merge-store", str(together)]) == 2
    assert "shards are missing, among them [0, 2, 4, 6, 8]" in capsys.readouterr().err
    assert main([*command, "--partition", "1/2"]) == 0
    assert not read_manifest(together).complete
    for _ in range(2):  # a merged store stays as it is
        assert main(["merge-store", str(together)]) == 0
        assert f"Wrote {together}: " in capsys.readouterr().out
    assert read_bytes(together) == read_bytes(alone)


@pytest.mark.slow
@pytest.mark.parametrize("times", [4])
def test_partitions_that_are_killed_and_run_at_once_leave_the_same_bytes(
    model: Path, data: Path, tmp_path: Path, times: int
) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert main(shorten(["extract", str(model), str(data), str(alone)])) == 0
    command = [sys.executable, "-m", "modeling_llm2clip",
               *shorten(["extract", str(model), str(data), str(together)])]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for _ in range(times):
        runs = [
            subprocess.Popen([*command, "--partition", f"{n}/2"], env=environment, cwd=ROOT)
            for n in (1, 2)
        ]
        deadline = time.monotonic() + 120
        noted = len(list(together.glob("shard-*.json")))
        while len(list(together.glob("shard-*.json"))) < noted + 3 and None in (
            run.poll() for run in runs
        ):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for run in runs:
            run.kill()
            run.wait()
    for number in (1, 2):
        subprocess.run([*command, "--partition", f"{number}/2"], env=environment, cwd=ROOT,
                       check=True, timeout=300)  # fmt: skip
    merge_store(together)
    assert read_bytes(together) == read_bytes(alone)


def start_with_ray(folder: Path, *arguments: object, modality: str) -> subprocess.Popen[str]:
    """Extract in a process of its own, which a hanging cluster cannot outlive."""
    script, pickled = folder / "with_ray.py", folder / "arguments.pickle"
    script.write_text(
        "import pickle, sys\n"
        "from modeling_llm2clip.training.extraction.extract import extract\n"
        "arguments = pickle.load(open(sys.argv[1], 'rb'))\n"
        "extract(*arguments, modality=sys.argv[2], engine='ray')\n"
    )
    pickled.write_bytes(pickle.dumps(arguments))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    return subprocess.Popen(
        [sys.executable, str(script), str(pickled), modality], env=environment, cwd=folder,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_ray_leaves_the_same_bytes_of_images_as_one_process(
    model: Path, images: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    records = load_records(images)
    config = replace(EXACT, token_budget=None, batch_size=3)
    alone = extract(model, records, tmp_path / "alone", config, modality="image")
    run = start_with_ray(tmp_path, model, records, tmp_path / "ray", config, modality="image")
    _, errors = run.communicate(timeout=240)
    assert run.returncode == 0, errors[-3000:]
    assert read_bytes(tmp_path / "ray") == read_bytes(alone)


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_an_actor_of_ray_that_dies_is_started_again_and_the_bytes_are_the_same(
    model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    psutil = pytest.importorskip("psutil")
    records = make_records(600)
    alone = extract_captions(model, records, tmp_path / "alone")
    run = start_with_ray(tmp_path, model, records, tmp_path / "ray", EXACT, modality="text")
    killed: set[int] = set()
    deadline = time.monotonic() + 120
    while run.poll() is None and len(killed) < 2 and time.monotonic() < deadline:
        if count_records(tmp_path / "ray") > 5 * len(killed):
            for process in psutil.Process(run.pid).children(recursive=True):
                with suppress(psutil.Error):
                    if "_Actor" in process.name() + " ".join(process.cmdline()):
                        killed.add(process.pid)
                        process.kill()
                        break
        time.sleep(0.01)
    _, errors = run.communicate(timeout=240)
    assert run.returncode == 0, errors[-3000:]
    assert len(killed) == 2
    assert read_bytes(tmp_path / "ray") == read_bytes(alone)


@pytest.mark.parametrize("partition", ["0/2", "3/2", "2", "a/b", "-1/2", "1/2/3"])
def test_a_partition_that_there_is_not_is_refused(partition: str) -> None:
    with pytest.raises(ValueError, match="must be such as 2/8"):
        parse_partition(partition)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_command_after_a_batch_with_its_own_code(
    model: Path, data: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    folder = tmp_path / "store"
    thread = threading.Thread(target=send_once, args=(number, folder))
    thread.start()
    assert main(shorten(["extract", str(model), str(data), str(folder)])) == code
    thread.join()
    assert not list(folder.glob("*.tmp"))
    assert 0 < len(list_complete_shards(folder)) < read_manifest(folder).num_shards
    assert main(shorten(["extract", str(model), str(data), str(folder)])) == 0
    assert EmbeddingStore.open(folder, check="full").manifest.complete


def send_once(number: signal.Signals, folder: Path) -> None:
    """Send this process a signal when the first shard is noted."""
    while not list(folder.glob("shard-*.json")):
        time.sleep(0.001)
    os.kill(os.getpid(), number)


@pytest.fixture
def python_handles_sigint() -> Iterator[None]:
    """A shell lets what it starts in the background ignore SIGINT, this test run perhaps."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("python_handles_sigint")
def test_the_first_signal_is_noted_and_the_second_ends_the_process_as_usual() -> None:
    with pytest.raises(KeyboardInterrupt), stop_on_signals() as stop:
        assert stop.signal is None
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_another_model_prompt_pooling_length_dtype_or_data_is_refused_with_both_values(
    model: Path, records: list[CaptionedImage], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    folder = tmp_path / "store"
    extract_captions(model, records, folder)

    def refused(parts: Any, data: Any, config: ExtractConfig, *entries: str) -> None:
        other = model
        if parts is not None:
            other = tmp_path / entries[0]
            parts[0].save_pretrained(other)
            parts[1].save_pretrained(other)
        with pytest.raises(ValueError, match="holds another store") as raised:
            extract_captions(other, data, folder, config)
        for entry in entries:
            assert f"{entry}: " in str(raised.value), entry
        assert str(raised.value).count(" in the store, ") == len(entries)
        assert read_bytes(folder) == undisturbed

    changed = tiny_model(max_text_length=128)
    with torch.no_grad():
        changed[0].text_model.norm.weight[0] += 0.5
    refused(changed, records, EXACT, "weights")
    refused(tiny_model(max_text_length=128, prompt="chatml"), records, EXACT, "prompt", "tokenizer")
    refused(tiny_model(max_text_length=128, text_pooling="last_token"), records, EXACT, "pooling")
    refused(tiny_model(max_text_length=127), records, EXACT, "max_text_length")
    refused(
        None, records, replace(EXACT, store_dtype="float16", max_shard_size="1KiB"), "stored dtype"
    )
    refused(None, records, replace(EXACT, token_budget=128), "token_budget")
    swapped = [records[1], records[0], *records[2:]]
    refused(None, swapped, EXACT, "data")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"store_dtype": "int8"}, "store_dtype='int8'"),
        ({"max_shard_size": "0KB", "num_workers": 0}, "num_workers=0 .*max_shard_size='0KB'"),
        ({"max_shard_size": "1 TB"}, "max_shard_size='1 TB' must be a size, like 5GB"),
    ],
)
def test_impossible_options_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExtractConfig(**changes)


@pytest.mark.parametrize(
    ("size", "rows"),
    [("512MB", 62_500), ("1GiB", 2**16), ("2MiB", 256), ("100KB", 12), ("1KB", 1)],
)
def test_the_size_of_a_shard_decides_how_many_rows_it_has(size: str, rows: int) -> None:
    config = ExtractConfig(max_shard_size=size)
    assert config.count_rows_per_shard(2 * 4096) == rows


def test_an_empty_dataset_is_refused(model: Path, tmp_path: Path) -> None:
    for modality in ("text", "image"):
        with pytest.raises(ValueError, match=r"(?i)empty|no images"):
            extract(model, [], tmp_path / "store", EXACT, modality=modality)
    assert not (tmp_path / "store").exists()


def test_where_a_file_finds_no_room_whole_shards_stay_and_the_run_goes_on_later(
    model: Path,
    records: list[CaptionedImage],
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "store"
    with monkeypatch.context() as patch, pytest.raises(StageInterrupt):
        stop_after_one(patch, partial(count_records, folder))
        extract_captions(model, records, folder)
    with largest_file(1000), pytest.raises(OSError, match="No room to write shard 1 of"):
        extract_captions(model, records, folder)
    require_one_shard(folder)
    extract_captions(model, records, folder)
    assert read_bytes(folder) == undisturbed


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root mounts a small disk"
)
def test_on_a_full_disk_whole_shards_stay_and_the_run_goes_on_later(
    model: Path,
    records: list[CaptionedImage],
    undisturbed: dict[str, bytes],
    tmp_path: Path,
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        with pytest.raises(OSError, match=r"No room to write shard .*No space left"):
            extract_captions(model, records, disk / "store")
        assert not list((disk / "store").glob("*.tmp"))
        assert 0 in list_complete_shards(disk / "store")
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        extract_captions(model, records, disk / "store")
        assert read_bytes(disk / "store") == undisturbed
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)  # the store is still mapped


def require_one_shard(folder: Path) -> None:
    assert not list(folder.glob("*.tmp"))
    assert list_complete_shards(folder) == [0]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    lines = []
    for number in range(9):
        Image.new("RGB", (40, 40 + number), (25 * number, 80, 10)).save(folder / f"{number}.png")
        for lang in ("en", "de")[: 1 + number % 2]:
            lines.append({"image": f"{number}.png", "captions": ["it"], "lang": lang})
    text = "\n".join(json.dumps(line) for line in lines)
    (folder / "captions.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_images_are_stored_once_and_found_by_every_record(
    model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "store"
    options = ["--modality", "image", "--max-shard-size", "1KiB", "--batch-size", "3"]
    options += ["--store-dtype", "float32"]
    command = ["extract", str(model), str(images), str(folder), *options, "--device", "cpu"]
    assert main(command) == 0
    assert "9 embeddings of 32 for 13 records (13 images, 9 distinct)" in capsys.readouterr().out
    store = EmbeddingStore.open(folder, check="full")
    records = load_records(images)
    whole, processor = (
        LLM2CLIPModel.from_pretrained(model),
        LLM2CLIPProcessor.from_pretrained(model),
    )
    expected = encode_images(whole, processor, [record.path for record in records], project=False)
    rows = [int(store.rows_of(item)[0]) for item in range(len(store))]
    # Sums of float32 in another order: the images had other neighbors.
    torch.testing.assert_close(store.read(rows), expected, atol=1e-5, rtol=1e-5)
    assert store.manifest.num_rows == len(set(rows)) == 9
    assert list(store.names) == [record.name for record in records]
    assert list(store.langs) == [record.lang for record in records]
    assert store.rows_of(0, long=True).tolist() == []
    store.require_fingerprint(fingerprint_vision(model))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--modality", "text", "--batch-size", "3", "--num-workers", "2"],
            "--batch-size, --num-workers: for --modality image alone",
        ),
        (
            ["--modality", "image", "--token-budget", "64"],
            "--token-budget: for --modality text alone",
        ),
    ],
)
def test_a_flag_of_the_other_extraction_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main(["extract", "no-model", "no-data", str(tmp_path / "store"), *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_broken_image_is_named_and_whole_shards_stay(
    model: Path, images: Path, tmp_path: Path
) -> None:
    records = load_records(images)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    with_broken = [*records[:-1], replace(records[-1], image=broken, name="broken.png")]
    config = replace(EXACT, max_shard_size="1KiB", batch_size=4)
    with pytest.raises(ValueError, match=r"broken\.png"):
        extract(model, with_broken, tmp_path / "store", config, modality="image")
    assert {0} <= set(list_complete_shards(tmp_path / "store"))


def test_records_without_images_are_refused_before_the_model_is_loaded(
    records: list[CaptionedImage], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"30 records have no image: \['0\.png'"):
        extract(tmp_path / "empty", records, tmp_path / "store", EXACT, modality="image")


def test_a_loaded_pair_gives_the_store_of_its_folder(
    model: Path, records: list[CaptionedImage], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    loaded = (LLM2CLIPModel.from_pretrained(model), LLM2CLIPProcessor.from_pretrained(model))
    folder = extract(loaded, records, tmp_path / "store", EXACT, modality="text")
    assert read_bytes(folder) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
