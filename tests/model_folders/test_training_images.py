"""Which images a model was trained on, and which sets of images are far from them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from modeling_llm2clip.model_folders.model_writing import find_carried_files
from modeling_llm2clip.model_folders.training_images import (
    FEWEST_JUDGED,
    TRAINING_IMAGES_FILE,
    DatasetSummary,
    ImageTally,
    TrainingImages,
    read_training_images,
    summarize_images,
    write_training_images,
)

WIDTH, TOPICS = 48, 5


def make_kind(
    kind: int, count: int, *, seed: int, topic: int | None = None, num_topics: int = TOPICS
) -> Tensor:
    """Embeddings of one kind of images: what its topics share, one of its topics, and noise.

    The noise has twice the length of what the kind shares, so that no single image is far.
    """
    fixed = torch.Generator().manual_seed(100 + kind)
    shared = torch.randn(WIDTH, generator=fixed) / WIDTH**0.5
    topics = torch.randn(num_topics, WIDTH, generator=fixed) / WIDTH**0.5
    random = torch.Generator().manual_seed(seed)
    chosen = torch.randint(num_topics, (count,), generator=random)
    if topic is not None:
        chosen[:] = topic
    noise = 2 * torch.randn(count, WIDTH, generator=random) / WIDTH**0.5
    rows: Tensor = 7 * (shared + topics[chosen] + noise)
    return rows


def summarize(kind: int, *, count: int = 400, name: str | None = None) -> DatasetSummary:
    embeds = make_kind(kind, count, seed=kind)
    return summarize_images(embeds, name=name or f"kind {kind}", num_images=10 * count)


def tally_of(*embeds: Tensor) -> ImageTally:
    tally = ImageTally()
    for rows in embeds:
        tally.add(rows)
    return tally


@pytest.fixture(scope="module")
def trained() -> TrainingImages:
    return TrainingImages((summarize(0),))


def test_familiar_images_raise_no_alarm_nor_do_those_of_a_single_topic(
    trained: TrainingImages,
) -> None:
    for seed in range(20):
        assert trained.describe_far(tally_of(make_kind(0, FEWEST_JUDGED, seed=50 + seed))) is None
    for topic in range(TOPICS):
        of_topic = tally_of(make_kind(0, 100, seed=90, topic=topic))
        assert trained.describe_far(of_topic) is None


def test_one_of_many_topics_raises_no_alarm() -> None:
    """Clusters that each hold several topics would leave most of them outside every mixture."""
    many = {"num_topics": 100}
    embeds = make_kind(0, 4_000, seed=0, **many)
    data = summarize_images(embeds, name="broad", num_images=4_000)
    summary = TrainingImages((data,))
    of_topics = [tally_of(make_kind(0, 100, seed=90, topic=t, **many)) for t in range(100)]
    # 11 of 100 by 128 clusters, 72 by 32.
    assert sum(summary.describe_far(tally) is not None for tally in of_topics) <= 20
    assert summary.describe_far(tally_of(make_kind(1, 100, seed=1, **many))) is not None


def test_unfamiliar_images_raise_an_alarm_with_data_and_remedy(
    trained: TrainingImages,
) -> None:
    for kind in (1, 2, 3):
        for count in (FEWEST_JUDGED, 500):
            text = trained.describe_far(tally_of(make_kind(kind, count, seed=60)))
            assert text is not None
            assert f"These {count} images" in text and "kind 0 (4,000 images)" in text
            assert "llm2clip align" in text
    noise = torch.randn(FEWEST_JUDGED, WIDTH, generator=torch.Generator().manual_seed(0))
    assert trained.describe_far(tally_of(noise + 1)) is not None


@pytest.mark.parametrize("value", [1.0, 0.1])  # whose variance is 0, and a rounding error
def test_identical_training_images_raise_no_alarm(value: float) -> None:
    """A tower that collapsed, or copies of one image."""
    alike = torch.eye(WIDTH)[:1].expand(48, -1) if value == 1 else torch.full((48, WIDTH), value)
    data = summarize_images(alike, name="copies", num_images=48)
    assert TrainingImages((data,)).describe_far(tally_of(make_kind(0, 100, seed=1))) is None


def test_too_few_images_are_not_judged_and_another_tower_is_refused(
    trained: TrainingImages, tmp_path: Path
) -> None:
    few = tally_of(make_kind(1, FEWEST_JUDGED - 1, seed=60))
    assert trained.measure(few) is None and trained.describe_far(few) is None
    assert trained.measure(ImageTally()) is None
    assert read_training_images(tmp_path) is None  # an older folder knows nothing
    with pytest.raises(ValueError, match="48 dimensions, but the model's tower has 16"):
        trained.measure(tally_of(torch.randn(30, 16)))


def test_a_model_trained_on_two_kinds_knows_both_and_their_mixture_only() -> None:
    both = TrainingImages((summarize(0),)).add(summarize(1))
    first, second = (make_kind(kind, 60, seed=70) for kind in (0, 1))
    for known in ((first,), (second,), (first, second), (first[:20], second)):
        assert both.describe_far(tally_of(*known)) is None
    far = both.describe_far(tally_of(make_kind(2, 60, seed=70)))
    assert far is not None and "kind 0" in far and "kind 1" in far


def test_a_tally_does_not_depend_on_batches_order_processes_or_device() -> None:
    embeds = make_kind(0, 64, seed=1)
    whole = tally_of(embeds)
    parts = tally_of(*embeds.flip(0).split(7))
    joined = tally_of(embeds[:30])
    joined.join(tally_of(embeds[30:]))
    joined.join(ImageTally())
    on_device = ImageTally()
    for rows in embeds[:50].split(9):
        on_device.add_on_device(rows)
    on_device.add(embeds[50:])
    also_joined = ImageTally()
    also_joined.join(on_device)
    for other in (parts, joined, on_device, also_joined):
        assert other.num_images == whole.num_images == 64
        # Sums of 64 numbers below 1 in another order, in float64.
        np.testing.assert_allclose(other.total, whole.total, atol=1e-12)


def test_the_length_of_an_embedding_has_no_effect(trained: TrainingImages) -> None:
    embeds = make_kind(1, 30, seed=3)
    scaled = embeds * torch.linspace(0.1, 9, 30)[:, None]
    # Scaled in float32.
    assert trained.measure(tally_of(scaled)) == pytest.approx(
        trained.measure(tally_of(embeds)), abs=1e-5
    )


def test_no_cluster_is_a_single_image(trained: TrainingImages) -> None:
    images = torch.nn.functional.normalize(make_kind(0, 400, seed=0), dim=1)
    odd = torch.cat([images, 3 * torch.eye(WIDTH)[:1]])  # one image unlike all others
    summary = summarize_images(odd, name="odd", num_images=401)
    unit = torch.nn.functional.normalize(odd, dim=1)
    for clusters in (trained.datasets[0].clusters, summary.clusters):
        assert float(torch.cdist(clusters, unit).min()) > 0.01


def test_a_summary_survives_a_round_trip_with_the_same_bytes(
    trained: TrainingImages, tmp_path: Path
) -> None:
    summary = TrainingImages(trained.datasets, not_summarized=("bilder, früher",))
    write_training_images(tmp_path, summary)
    found = read_training_images(tmp_path)
    assert found is not None and found.not_summarized == ("bilder, früher",)
    far = make_kind(1, 30, seed=3)
    assert found.describe_far(tally_of(far)) == summary.describe_far(tally_of(far))
    assert "bilder, früher" in str(found.describe_far(tally_of(far)))
    content = (tmp_path / TRAINING_IMAGES_FILE).read_bytes()
    write_training_images(tmp_path, found)
    assert (tmp_path / TRAINING_IMAGES_FILE).read_bytes() == content


def test_the_same_dataset_is_added_once_and_namesakes_stay_separate() -> None:
    once = TrainingImages((summarize(0),))
    assert len(once.add(summarize(0)).datasets) == 1
    assert len(once.add(summarize(1, name="kind 0")).datasets) == 2


@pytest.mark.parametrize("broken", ["truncated", "foreign", "nan"])
def test_a_damaged_summary_is_refused_with_its_remedy(
    broken: str, trained: TrainingImages, tmp_path: Path
) -> None:
    file = tmp_path / TRAINING_IMAGES_FILE
    write_training_images(tmp_path, trained)
    if broken == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif broken == "foreign":
        save_file({"clusters.0": torch.zeros(2, WIDTH)}, file)
    else:
        trained = TrainingImages((summarize(0),))
        trained.datasets[0].clusters[1, 2] = torch.nan
        write_training_images(tmp_path, trained)
    with pytest.raises(ValueError, match=rf"{TRAINING_IMAGES_FILE} is damaged .*delete it"):
        read_training_images(tmp_path)


def test_a_summary_is_carried_over(good: Path, trained: TrainingImages, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "model"))
    assert TRAINING_IMAGES_FILE not in find_carried_files(folder)
    write_training_images(folder, trained)
    assert find_carried_files(folder)[TRAINING_IMAGES_FILE] == folder / TRAINING_IMAGES_FILE
    assert TRAINING_IMAGES_FILE in find_carried_files(folder, trained_since=True)
