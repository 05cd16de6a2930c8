"""Errors, image limits and file states in Ray actors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from shard_server import ShardServer

from modeling_llm2clip.data.remote.file_locations import describe_states, read_range
from modeling_llm2clip.embedding.shard_computation import _Actor, compute_with_ray
from modeling_llm2clip.image_loading_llm2clip import LIMITS_VARIABLE, ImageLimits, get_image_limits

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("only_cluster")]


@pytest.mark.parametrize(
    ("error", "seen", "message"),
    [
        (ValueError("b.png: not an image"), ValueError, "b.png: not an image"),
        (OSError(28, "No space left", "out"), OSError, r"\[Errno 28\] No space left: 'out'"),
        (KeyError("weights"), RuntimeError, "could not compute the shards: KeyError: 'weights'"),
    ],
    ids=["data", "disk", "defect"],
)
def test_the_error_of_a_shard_is_raised_as_if_it_had_been_computed_here(
    error: Exception, seen: type[Exception], message: str
) -> None:
    class FailingWork:
        def compute(self, shards: Sequence[int], **_: object) -> None:
            if shards == [1]:
                raise error

    with pytest.raises(seen, match=f"{message}$"):
        compute_with_ray(FailingWork, [0, 1], "cpu", show_progress=False)


def test_an_actor_has_the_limits_of_images_of_the_process_that_started_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its node may be another machine with a different environment."""
    monkeypatch.setenv(LIMITS_VARIABLE, "{}")
    limits = ImageLimits(max_megapixels=7)
    _Actor(lambda: lambda _: None, torch.get_num_threads(), limits, {})
    assert get_image_limits() == limits


def test_an_actor_reads_remote_files_in_the_states_that_were_described(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"a" * 9)
    with ShardServer(tmp_path) as server:
        url = f"{server.url}/file"
        describe_states([url])
        (tmp_path / "file").write_bytes(b"b" * 9)
        os.utime(tmp_path / "file", ns=(1, 1))

        class ReadingWork:
            def compute(self, *_: object, **__: object) -> None:
                read_range(url, 0, 9)

        with pytest.raises(OSError, match="the file changed while it was in use"):
            compute_with_ray(ReadingWork, [0], "cpu", show_progress=False)
