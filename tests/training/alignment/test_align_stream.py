"""An alignment on a stream: the same laws as on an index, wherever the shards are."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from aligning import SHORT_RUN, EndAfter, Prepared, names_that_differ, read_losses
from shard_server import ShardServer

from modeling_llm2clip.configs.align_config import AlignConfig
from modeling_llm2clip.data.record_fields import list_ignored
from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.data.streams.record_streams import stream_records
from modeling_llm2clip.data.streams.stream_run import StreamReport
from modeling_llm2clip.scheduling.graceful_stop import StageInterrupt
from modeling_llm2clip.training.alignment import run_data
from modeling_llm2clip.training.alignment.align import align
from modeling_llm2clip.training.alignment.alignment_data import (
    AlignmentStream,
)
from modeling_llm2clip.training.alignment.alignment_report import NOT_JUDGED, describe_alignment
from modeling_llm2clip.training.alignment.alignment_trainer import make_training_arguments
from modeling_llm2clip.training.alignment.run_data import hold_out_of_stream
from modeling_llm2clip.training.run_folder import read_results

pytest.importorskip("torchdata")
ONLINE: dict[str, Any] = {
    **SHORT_RUN, "global_batch_size": 4, "num_workers": 0, "text_training": "frozen-online",
}  # fmt: skip


def write_shards(
    folder: Path, records: Sequence[CaptionedImage], truncated: Collection[int] = ()
) -> Path:
    """Write records into four tar shards; some images, by number, only in part."""
    folder.mkdir(exist_ok=True)
    numbered = list(enumerate(records))
    for shard in range(4):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for number, record in numbered[shard::4]:
                fields = {
                    "file_name": record.name, "captions": record.captions,
                    "long_captions": record.long_captions, "group_id": record.group_id,
                }  # fmt: skip
                key, content = Path(record.name).stem, record.path.read_bytes()
                size = len(content) // 2 if number in truncated else None
                add(archive, f"{key}.jpg", content[:size])
                add(archive, f"{key}.json", json.dumps(fields).encode())
    return folder


@pytest.fixture(scope="module")
def shards(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset of the other tests in four tar shards."""
    return write_shards(tmp_path_factory.mktemp("shards"), list(prepared.records))


@pytest.fixture(scope="module")
def damaged(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with two images that cannot be decoded."""
    return write_shards(tmp_path_factory.mktemp("damaged"), list(prepared.records), {5, 14})


def run(prepared: Prepared, shards: Path | str, output: Path, **options: Any) -> dict[str, Any]:
    """Align on a stream of shards, online, with some options changed; return the results."""
    given = {
        n: options.pop(n)
        for n in ("resume", "callbacks", "caption_store", "image_store")
        if n in options
    }
    stream = stream_records(shards, **options.pop("stream", {}))
    align(prepared.model, stream, output, AlignConfig(**{**ONLINE, **options}), **given)
    return read_results(output)


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


@pytest.mark.slow
def test_a_stream_trains_alike_over_http(prepared: Prepared, shards: Path, tmp_path: Path) -> None:
    run(prepared, shards, tmp_path / "disk")
    with ShardServer(shards, drop_every=2) as server:
        run(prepared, f"{server.url}/{{0..3}}.tar", tmp_path / "http")
        assert server.dropped
    assert read_losses(tmp_path / "http") == read_losses(tmp_path / "disk")
    assert len(read_losses(tmp_path / "disk")) == 6
    assert NOT_JUDGED in describe_alignment(tmp_path / "disk")  # on held-out images


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "num_workers", "logging_steps"), [("shards", 0, 4), ("damaged", 2, 1)]
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    prepared: Prepared,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    num_workers: int,
    logging_steps: int,
    source: str,
) -> None:
    """Also its logged losses, whose windows an interruption divides."""
    shards: Path = request.getfixturevalue(source)
    # Seven steps of four are more than an epoch of 24 images.
    options = {
        "max_steps": 8, "save_steps": 3, "num_workers": num_workers, "logging_steps": logging_steps,
    }  # fmt: skip
    run(prepared, shards, tmp_path / "whole", **options)
    for stop_at in (4, 7):
        stop: dict[str, Any] = {"resume": stop_at > 4, "callbacks": [EndAfter(stop_at)]}
        with pytest.raises(KeyboardInterrupt):
            run(prepared, shards, tmp_path / "parts", **stop, **options)
    for _ in range(2):  # again after the last checkpoint: a run at its end takes no step
        shutil.rmtree(tmp_path / "parts" / "model", ignore_errors=True)
        found = run(prepared, shards, tmp_path / "parts", resume=True, **options)
        assert found["steps"] == 8
        assert read_losses(tmp_path / "parts") == read_losses(tmp_path / "whole")
        assert not names_that_differ(tmp_path / "parts" / "model", tmp_path / "whole" / "model")


def test_a_stream_of_other_fields_is_another_run(
    prepared: Prepared, shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(prepared, shards, tmp_path / "run", callbacks=[EndAfter(3)])
    for fields in ({"ignore_fields": ("long_captions",)}, {"caption_fields": ("captions",)}):
        with pytest.raises(ValueError, match=r"ignored_fields.*long_captions"):
            run(prepared, shards, tmp_path / "run", resume=True, stream=fields)
    # Both read only `captions`, but the second requires them.
    ignored = {"ignore_fields": tuple(list_ignored((), ("captions",)))}
    required = {"caption_fields": ("captions",)}
    with pytest.raises(KeyboardInterrupt):
        run(prepared, shards, tmp_path / "two", callbacks=[EndAfter(3)], stream=ignored)
    with pytest.raises(ValueError, match="another run"):
        run(prepared, shards, tmp_path / "two", resume=True, stream=required)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_record_of_a_run_has_the_losses_of_all_epochs(
    prepared: Prepared,
    damaged: Path,
    tmp_path: Path,
    num_workers: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of 22 samples, an epoch has five batches of four, or four where workers have 11 each."""
    options = {"max_steps": 12, "num_workers": num_workers, "save_steps": 1}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    report = run(prepared, damaged, whole, **options)["stream"]
    said = capsys.readouterr().err
    for epoch in range(2):
        assert f"epoch {epoch}: 22 samples read, 2 lost, " in said
    for stop_at in (1, 5, 9, 12):
        stop: dict[str, Any] = {"resume": stop_at > 1, "callbacks": [EndAfter(stop_at)]}
        with pytest.raises(KeyboardInterrupt):
            run(prepared, damaged, parts, **stop, **options)
    assert run(prepared, damaged, parts, resume=True, **options)["stream"] == report
    assert report["epochs"] == 3
    # Two whole epochs, and the last one as far as it was read, the shuffle buffer included.
    assert 44 < report["samples"] <= 44 + 24 and 4 <= report["lost_samples"] <= 6
    assert 8 <= report["shards"] <= 12
    assert report["counts"] == {"image unreadable": report["lost_samples"]}
    assert len(report["places"]["image unreadable"]) == 2  # each once
    described = "\n".join(describe_alignment(parts))
    assert f"Stream, 3 epochs: {report['samples']} samples read, {report['lost_samples']} lost" in (
        described
    )
    assert "image unreadable: " in described and ".jpg: the image is truncated" in described


def make_batches(prepared: Prepared, shards: Path, output: Path, *, batch_size: int) -> Any:
    """Batches of seven steps on a stream, as a run has them."""
    config = AlignConfig(**ONLINE)
    dataset = AlignmentStream(stream_records(shards, buffer_size=1), prepared.processor)
    return run_data.StreamData(dataset, config).make_loader(
        make_training_arguments(output, config), batch_size=batch_size, num_steps=7
    )


def test_losses_of_all_epochs_and_processes_are_added(
    prepared: Prepared, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process is still in its first epoch when this one, of six batches, is in its next."""
    batches = make_batches(prepared, shards, tmp_path, batch_size=4)
    assert len(list(islice(batches, 7))) == 7
    other = StreamReport(samples=10, lost_samples=3, shards=1, lost_shards=1)
    monkeypatch.setattr(run_data, "gather_object", lambda own: [*own, other.to_state()])
    report = batches.collect_report()
    # 24 samples of the first epoch and four of the second, whose buffer has one more.
    assert 24 + 4 + 10 <= report["samples"] <= 24 + 5 + 10
    assert (report["lost_samples"], report["lost_shards"], report["epochs"]) == (3, 1, 2)


@pytest.mark.slow
def test_a_stopped_run_has_its_losses(prepared: Prepared, damaged: Path, tmp_path: Path) -> None:
    with pytest.raises(StageInterrupt):
        run(prepared, damaged, tmp_path, max_steps=9, callbacks=[EndAfter(6, by_signal=True)])
    assert read_results(tmp_path)["stream"]["lost_samples"] >= 2


def test_no_broken_image_is_held_out(
    prepared: Prepared, shards: Path, damaged: Path, tmp_path: Path
) -> None:
    records, groups = hold_out_of_stream(stream_records(damaged), 0.7, tmp_path)
    broken = {list(prepared.records)[number].group_id for number in (5, 14)}
    found = [record for shard in range(4) for record in stream_records(shards).read_shard(shard)]
    in_order = list(dict.fromkeys(record.group_id for record in found))
    # About 24 groups, of which 70 % are 17; four come after both broken ones.
    assert groups == set([group for group in in_order if group not in broken][:17])
    assert {record.group_id for record in records} == groups


def test_a_stream_that_leaves_one_group_is_refused(damaged: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^24 groups .* leaves 0 to train on"):
        hold_out_of_stream(stream_records(damaged), 0.99, tmp_path)
    # The estimate of 24 groups leaves two; two cannot be decoded, and two records are of one.
    with pytest.raises(ValueError, match=r"^21 groups .* leaves 0 to train on"):
        hold_out_of_stream(stream_records(damaged), 0.9, tmp_path)


@pytest.mark.slow
def test_held_out_images_are_not_trained_on(
    prepared: Prepared, shards: Path, tmp_path: Path
) -> None:
    records, groups = hold_out_of_stream(stream_records(shards), 0.2, tmp_path)
    assert {record.group_id for record in records} == groups
    # A fifth of 24: five of the six groups in the first of four shards.
    assert len(groups) == 5
    assert all(record.path.parent == tmp_path and record.path.is_file() for record in records)
    others = replace(stream_records(shards), excluded_groups=groups)
    trained = list(others)
    assert not {record.group_id for record in trained} & groups
    assert others.report.excluded_samples + len(trained) == len(prepared.records)

    options = {"text_training": "stored", "caption_store": prepared.caption_store}
    results = run(prepared, shards, tmp_path / "run", held_out_ratio=0.2, **options)
    assert len(read_losses(tmp_path / "run")) == 6
    held_out, counts = results["held_out"], results["stream"]
    assert held_out["before"]["num_images"] == len(records)
    assert held_out["best"]["num_texts"] > 4 and held_out["num_shared_captions"] == 0
    assert counts["lost_samples"] == counts["lost_shards"] == 0
    assert counts["excluded_samples"] > 0
    assert NOT_JUDGED not in describe_alignment(tmp_path / "run")


@pytest.mark.slow
def test_shared_captions_are_counted_over_resumes(prepared: Prepared, tmp_path: Path) -> None:
    # The first shard has every fourth image; its first five, which are held out, have all texts.
    records = [
        replace(record, captions=(f"thing {number // 4 % 4}",), long_captions=())
        for number, record in enumerate(prepared.records)
    ]
    shards = write_shards(tmp_path / "shards", records)
    options = {"held_out_ratio": 0.2, "max_steps": 6, "save_steps": 4}
    with pytest.raises(KeyboardInterrupt):
        run(prepared, shards, tmp_path / "run", callbacks=[EndAfter(5)], **options)
    results = run(prepared, shards, tmp_path / "run", resume=True, **options)
    # Six batches of four images.
    assert results["held_out"]["num_shared_captions"] == 24
    assert "  Shared with held-out images: 24 sampled captions." in (
        describe_alignment(tmp_path / "run")
    )


def test_stored_captions_of_a_stream_have_their_noise(prepared: Prepared, shards: Path) -> None:
    dataset = AlignmentStream(
        stream_records(shards), prepared.processor, AlignConfig(caption_noise=0.5),
        caption_store=prepared.caption_store,
    )  # fmt: skip
    samples = [dataset.prepare_sample(record) for record in stream_records(shards)]
    drawn = []
    for epoch in (0, 0, 1):
        dataset.stream.set_epoch(epoch)
        drawn.append(dataset.make_inputs(dataset.collate(samples)))
    # The root of the mean square of 32 numbers for each of 24 captions: four standard errors.
    shares = drawn[0]["caption_noise"].norm(dim=1) / drawn[0]["caption_embeds"].norm(dim=1)
    assert abs(float(shares.square().mean().sqrt()) - 0.5) < 4 * 0.5 * (2 * 24 * 32) ** -0.5
    first, again, later = (batch["caption_noise"] for batch in drawn)
    assert torch.equal(first, again) and not torch.equal(first, later)


def test_a_record_that_the_store_lacks_is_named(prepared: Prepared, shards: Path) -> None:
    stream, store = stream_records(shards), prepared.caption_store
    dataset = AlignmentStream(stream, prepared.processor, caption_store=store)
    record = next(iter(stream))
    # Another record, fewer captions, and as many others.
    for changed in (
        {"name": "other.jpg"},
        {"captions": ("one",)},
        {"captions": ("another", *record.captions[1:])},
    ):
        with pytest.raises(ValueError, match=r"1 of 1 records of a batch are not in .*\(en\)"):
            dataset.collate([dataset.prepare_sample(replace(record, **changed))])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_steps": None}, r"length of a stream is unknown: set max_steps"),
        ({"projection_init": "cca"}, "needs a caption_store, an image_store"),
        ({"text_training": "stored", "refit": True, "held_out_ratio": 0.2},
         "omit image_store; .*: omit refit"),
    ],
)  # fmt: skip
def test_what_a_stream_cannot_do_is_refused(
    prepared: Prepared, shards: Path, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    if "refit" in changed:
        changed = {**changed, "caption_store": prepared.captions, "image_store": prepared.images}
    with pytest.raises(ValueError, match=message):
        run(prepared, shards, tmp_path, **changed)


def test_a_batch_above_the_stream_is_refused(
    prepared: Prepared, shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="too few samples for one batch"):
        next(iter(make_batches(prepared, shards, tmp_path, batch_size=64)))
