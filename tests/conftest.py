"""What holds for every test: no network, one thread, a fixed seed; and what many files share."""

from __future__ import annotations

import gc
import ipaddress
import os
import random
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

# Before transformers and torch are imported: they read these once.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    # Without bfloat16 instructions, so that towers run in the same dtype on every processor, also
    # in commands that a test starts; tests of bfloat16 pretend to have a CPU that multiplies it.
    ONEDNN_MAX_CPU_ISA="AVX512_CORE_VNNI",
)

import hypothesis
import numpy as np
import pytest
import torch
from filelock import FileLock

torch.set_num_threads(1)
RUN_FOLDER = "LLM2CLIP_TEST_RUN_FOLDER"
# How long an example takes depends on the machine, and decides nothing. Examples are those of the
# last run, so that a run that fails failed for what was changed.
hypothesis.settings.register_profile("the same", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("the same")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fault-seconds", type=float, default=30, help="time for each kind of trouble"
    )
    parser.addoption("--fault-seed", type=int, default=0, help="of the trouble that is drawn")


def pytest_configure(config: pytest.Config) -> None:
    """Give the processes of a run, which inherit the environment, a folder for what they share."""
    if RUN_FOLDER not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="llm2clip-tests-")
        os.environ[RUN_FOLDER] = folder.name
        config.add_cleanup(folder.cleanup)
        config.add_cleanup(lambda: os.environ.pop(RUN_FOLDER))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave files of slow tests alone out of a run without them: some take seconds to import."""
    runs_slow_tests = not config.option.markexpr.startswith("not slow and ")
    if collection_path.suffix != ".py" or runs_slow_tests:
        return None
    text = collection_path.read_text(encoding="utf-8")
    return True if re.search(r"^pytestmark = .*mark\.slow", text, re.MULTILINE) else None


def pytest_collection_finish() -> None:
    """Leave what imports and collection made out of the garbage collections of the tests.

    Every training run collects garbage once, which takes half a second with all tests in memory.
    """
    gc.freeze()


def is_local(address: Any) -> bool:
    """Whether a socket address stays on this machine: a loopback host, or no host at all."""
    if not isinstance(address, tuple):
        return True  # a path of a Unix socket
    host = address[0].decode() if isinstance(address[0], bytes) else str(address[0])
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in ("", "localhost")


def only_local(connect: Callable[..., Any], *, position: int) -> Callable[..., Any]:
    """Wrap a connecting function, so that it raises for a host elsewhere before any lookup."""

    def connect_if_local(*args: Any, **kwargs: Any) -> Any:
        address = args[position] if len(args) > position else kwargs["address"]
        if not is_local(address):
            raise OSError(f"Tests must not use the network, but this one connects to {address!r}.")
        return connect(*args, **kwargs)

    return connect_if_local


@pytest.fixture(autouse=True)
def _refuse_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("connect", "connect_ex"):
        original = getattr(socket.socket, name)
        monkeypatch.setattr(socket.socket, name, only_local(original, position=1))
    original = socket.create_connection
    monkeypatch.setattr(socket, "create_connection", only_local(original, position=0))


@pytest.fixture
def only_cluster() -> Iterator[None]:
    """Let a test that starts a Ray cluster wait until no other process of the run has one."""
    with FileLock(Path(os.environ[RUN_FOLDER]) / "ray.lock"):
        yield


def fix_seeds() -> None:
    """Seed what draws from a state that all tests share."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@pytest.fixture(autouse=True)
def _fix_seed() -> None:
    fix_seeds()


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Iterator[None]:
    """Make what many tests share the same, whichever of them is the first."""
    if fixturedef.scope != "function":
        fix_seeds()
    return (yield)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of this test alone, where commands keep what they can make again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "llm2clip"


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every batch of a shard that is written."""
    from interruptions import count_written_rows  # here, since most tests write none

    return count_written_rows(monkeypatch)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The dataset, model and stores of `aligning`, which no test may change."""
    from aligning import prepare  # here, since most tests need no model

    return prepare(tmp_path_factory.mktemp("aligning"))


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One exported tiny checkpoint with an instruction; tests break copies of it."""
    from tiny import tiny_model

    from modeling_llm2clip.model_folders.model_card import CardData
    from modeling_llm2clip.model_folders.model_writing import save_model

    model, processor = tiny_model("clip", "llama")
    folder = tmp_path_factory.mktemp("exported") / "good"
    card = CardData(license="mit")
    instructions = {"query": "Find an image: "}
    return save_model(model, processor, folder, instructions=instructions, card=card)


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    """A copy of the good checkpoint, to be broken."""
    return Path(shutil.copytree(good, tmp_path / "copy"))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny model by its type, which no test may change."""
    from tiny_encoders import save_tiny_encoder

    root = tmp_path_factory.mktemp("models")
    return cache(lambda model_type: save_tiny_encoder(model_type, root / model_type))


@pytest.fixture(scope="session")
def sources(models: Callable[[str], Path]) -> Callable[[str], str]:
    """The same folders as a user names them."""
    return lambda model_type: str(models(model_type))


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """An image for each of the texts of `tiny_encoders`."""
    from tiny_encoders import TEXTS, save_tiny_images

    return save_tiny_images(tmp_path_factory.mktemp("images"), len(TEXTS))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of the images with captions that `eval_mode` writes, which no test may change."""
    from evaluating import write_data

    return str(write_data(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="session")
def results(
    sources: Callable[[str], str], data: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What an evaluation of two models wrote, which no test may change."""
    from evaluating import arguments

    from modeling_llm2clip.evaluation.evaluate import evaluate

    output = tmp_path_factory.mktemp("results")
    evaluate(**arguments(output, data, sources("clip"), sources("siglip")))
    return output
