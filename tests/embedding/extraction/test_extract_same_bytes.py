"""Extraction writes the same bytes if it is stopped, killed, partitioned or run on Ray."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from extracting import EXACT, extract_captions
from interruptions import largest_file, read_bytes, stop_after_one
from launches import run_python, start_with_ray
from made_up_records import make_records, write_captions
from stores import list_complete_shards

from modeling_llm2clip.__main__ import LINE, main
from modeling_llm2clip.cli.command import parse
from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.data.store.embedding_store import EmbeddingStore
from modeling_llm2clip.data.store.store_manifest import StoreManifest
from modeling_llm2clip.embedding.extract import describe_extraction, extract
from modeling_llm2clip.scheduling.graceful_stop import StageInterrupt, stop_on_signals

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A larger dataset, with enough work to interrupt."""
    return write_captions(tmp_path_factory.mktemp("data"), make_records(250))


@pytest.fixture(scope="module")
def alone(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of one undisturbed run."""
    folder = tmp_path_factory.mktemp("alone") / "store"
    assert main(shorten(["extract", str(model), str(data), str(folder)])) == 0
    return folder


def find_suggested(shown: str) -> list[str]:
    """Return the words of the next command that was printed, which the command line can parse."""
    words = shlex.split(shown.rpartition("Next: llm2clip ")[2])
    parse(LINE, words)
    return words


def count_records(folder: Path) -> int:
    return len(list(folder.glob("_complete-*.json")))


def shorten(command: list[str]) -> list[str]:
    options = "--modality text --rows-per-shard 16 --store-dtype float32 --batch-size 2"
    return [*command, *options.split(), "--device", "cpu"]


def test_a_complete_store_is_found_complete_and_one_that_lost_a_file_is_not(
    model: Path, records: list[CaptionedImage], extracted: Path, tmp_path: Path, written: list[int]
) -> None:
    shutil.copytree(extracted, tmp_path / "store")
    extract_captions(model, records, tmp_path / "store")
    assert not written
    whole = read_bytes(extracted)
    for partition in (None, "2/2"):
        (tmp_path / "store" / "shard-00001.safetensors").unlink()
        if partition:  # the other one does not have the shard
            extract(model, records, tmp_path / "store", EXACT, modality="text", partition="1/2")
            shown = describe_extraction(tmp_path / "store")
            assert shown[0].startswith(f"{len(whole) - 3} of {len(whole) - 2} files are in ")
        extract(model, records, tmp_path / "store", EXACT, modality="text", partition=partition)
        assert "Wrote" in describe_extraction(tmp_path / "store")[0]
        assert read_bytes(tmp_path / "store") == whole
        assert len(written) == 1
        written.clear()


def test_partitions_of_machines_without_a_shared_folder_become_the_store_of_one(
    model: Path, records: list[CaptionedImage], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    for part in (1, 2):
        folder = tmp_path / f"machine-{part}"
        extract(model, records, folder, EXACT, modality="text", partition=f"{part}/2")
        assert not StoreManifest.read(folder).complete
        shutil.copytree(folder, tmp_path / "synced", dirs_exist_ok=True)
    synced = tmp_path / "synced"
    extract(model, records, synced, EXACT, modality="text", partition="1/2")
    assert read_bytes(synced) == undisturbed


@pytest.mark.slow
def test_two_processes_of_a_launch_leave_the_same_bytes_as_one(
    model: Path, data: Path, alone: Path, tmp_path: Path
) -> None:
    together = tmp_path / "together"
    command = shorten(["extract", str(model), str(data), str(together)])
    printed = run_python("-m", "modeling_llm2clip", *command, processes=2)
    assert printed.count("Wrote") == 1  # the main process alone says so
    assert read_bytes(together) == read_bytes(alone)


@pytest.mark.slow
def test_the_last_partition_completes_a_store_with_the_bytes_of_one_run(
    model: Path, data: Path, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    together = tmp_path / "together"
    assert main(shorten(["extract", str(model), str(data), str(alone)])) == 0  # is complete
    assert find_suggested(capsys.readouterr().out) == [
        "align", str(model), str(data), "aligned",
        "--caption-store", str(alone), "--image-store", "images",
    ]  # fmt: skip
    command = shorten(["extract", str(model), str(data), str(together)])
    assert main([*command, "--partition", "2/2"]) == 0
    half = StoreManifest.read(together).num_shards // 2
    num_shards = StoreManifest.read(together).num_shards
    assert f"{half} of {num_shards} files" in capsys.readouterr().out
    assert list_complete_shards(together) == list(range(1, num_shards, 2))
    for _ in range(2):  # a complete store stays as it is
        assert main([*command, "--partition", "1/2"]) == 0
        shown = capsys.readouterr().out
        assert f"Wrote {together}: " in shown
        assert find_suggested(shown)[4:6] == ["--caption-store", str(together)]
    assert read_bytes(together) == read_bytes(alone)


@pytest.mark.slow
def test_partitions_that_are_killed_and_run_at_once_leave_the_same_bytes(
    model: Path, data: Path, alone: Path, tmp_path: Path
) -> None:
    together = tmp_path / "together"
    command = [sys.executable, "-m", "modeling_llm2clip",
               *shorten(["extract", str(model), str(data), str(together)])]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for _ in range(3):
        runs = [
            subprocess.Popen([*command, "--partition", f"{n}/2"], env=environment, cwd=ROOT)
            for n in (1, 2)
        ]
        deadline = time.monotonic() + 120
        noted = len(list(together.glob("_complete-*.json")))
        while len(list(together.glob("_complete-*.json"))) < noted + 3 and None in (
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
    assert read_bytes(together) == read_bytes(alone)


@pytest.mark.slow
@pytest.mark.usefixtures("only_cluster")
def test_an_actor_of_ray_that_dies_is_started_again_and_the_bytes_are_the_same(
    model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    psutil = pytest.importorskip("psutil")
    records = make_records(600)
    alone = extract_captions(model, records, tmp_path / "alone")
    run = start_with_ray(
        tmp_path, "extract", model, records, tmp_path / "ray", EXACT, modality="text"
    )
    killed: set[int] = set()
    deadline = time.monotonic() + 300  # Ray takes a minute to start beside other work
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


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.slow
def test_a_signal_ends_the_command_after_a_batch_with_its_own_code(
    model: Path, data: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    folder = tmp_path / "store"
    thread = threading.Thread(target=send_once, args=(number, folder))
    thread.start()
    assert main(shorten(["extract", str(model), str(data), str(folder)])) == code
    thread.join()
    assert not list(folder.glob("*.tmp"))
    assert 0 < len(list_complete_shards(folder)) < StoreManifest.read(folder).num_shards
    assert main(shorten(["extract", str(model), str(data), str(folder)])) == 0
    assert EmbeddingStore.open(folder, check="full").manifest.complete


def send_once(number: signal.Signals, folder: Path) -> None:
    """Send this process a signal when the first shard is noted."""
    while not list(folder.glob("_complete-*.json")):
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


def test_where_a_file_finds_no_room_whole_shards_stay_and_the_run_goes_on_later(
    model: Path, records: list[CaptionedImage], undisturbed: dict[str, bytes], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = tmp_path / "store"
    with monkeypatch.context() as patch, pytest.raises(StageInterrupt):
        stop_after_one(patch, partial(count_records, folder))
        extract_captions(model, records, folder)
    there = list_complete_shards(folder)
    with (
        largest_file(1000),
        pytest.raises(OSError, match=f"No room to write shard {len(there)} of"),
    ):
        extract_captions(model, records, folder)
    assert not list(folder.glob("*.tmp")) and list_complete_shards(folder) == there
    extract_captions(model, records, folder)
    assert read_bytes(folder) == undisturbed
