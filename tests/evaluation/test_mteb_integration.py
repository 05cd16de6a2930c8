"""A model folder is an ordinary model of mteb, and a retrieval dataset two ordinary tasks of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mteb
import pytest
import torch
from hub_server import HubServer
from mteb.mocks import mock_tasks
from mteb.models.models_protocols import EncoderProtocol
from PIL import Image
from published_datasets import write_coco_test, write_sharegpt4v, write_xm3600
from shared_models import ROUNDING, shared_model
from tiny import draw_noise

from modeling_llm2clip.configs.evaluation_config import EvaluationConfig
from modeling_llm2clip.data.images.image_sources import EncodedImage, TarImage
from modeling_llm2clip.evaluation import evaluate as own_evaluation
from modeling_llm2clip.evaluation.datasets.retrieval_dataset import RetrievalDataset
from modeling_llm2clip.evaluation.metrics.correspondence import Correspondence
from modeling_llm2clip.evaluation.metrics.ranking import rank_retrieval
from modeling_llm2clip.evaluation.metrics.scores import summarize
from modeling_llm2clip.evaluation.mteb_integration import (
    list_mteb_datasets,
    load_for_mteb,
    make_mteb_tasks,
)
from modeling_llm2clip.image_loading_llm2clip import LIMITS_VARIABLE
from modeling_llm2clip.model_folders.model_writing import save_model

TASKS = (
    "MockRetrievalTask", "MockSTSTask", "MockAny2AnyRetrievalI2TTask",
    "MockAny2AnyRetrievalT2ITask", "MockZeroShotClassificationTask",
)  # fmt: skip
MORE_TASKS = (
    "MockClassificationTask", "MockPairClassificationTask", "MockRerankingTask",
    "MockBitextMiningTask", "MockTextZeroShotClassificationTask", "MockImageClassificationTask",
    "MockImageTextPairClassificationTask", "MockImageClusteringFastTask",
)  # fmt: skip
# Publishes a folder and takes it as a user of mteb would, with this package or without.
FROM_HUB = """
import sys
import huggingface_hub
folder, name, way, output = sys.argv[1:]
huggingface_hub.create_repo(name, exist_ok=True)
huggingface_hub.upload_folder(repo_id=name, folder_path=folder)
if way == "package":
    import modeling_llm2clip
else:
    sys.modules["modeling_llm2clip"] = None
import mteb
import torch
from mteb.mocks import mock_tasks
trust = {} if way == "package" else {"trust_remote_code": True}
model = mteb.get_model(name, device="cpu", **trust)
assert model.mteb_model_meta.modalities == ["image", "text"]
result = mteb.evaluate(
    model, mock_tasks.MockAny2AnyRetrievalI2TTask(), cache=None, show_progress_bar=False
)
assert 0 <= result.task_results[0].get_score() <= 1
torch.save(torch.from_numpy(model.model.encode(["a dog"])), output)
"""
COLORS = ("red", "green", "blue", "black", "white", "orange", "purple")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(*shared_model(), tmp_path_factory.mktemp("mteb") / "tiny")


@pytest.fixture(scope="module")
def model(folder):
    return load_for_mteb(folder, device="cpu")


def evaluate(model, task):
    results = mteb.evaluate(
        model, task, cache=None, show_progress_bar=False, encode_kwargs={"batch_size": 3}
    )
    (result,) = results.task_results
    return result


@pytest.mark.parametrize(
    "name", [*TASKS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_TASKS)]
)
def test_every_kind_of_task_runs_to_a_score(model, name):
    result = evaluate(model, getattr(mock_tasks, name)())
    assert 0 <= result.get_score() <= 1 + 1e-6  # a correlation may round above one


def test_an_input_that_joins_an_image_and_a_text_is_refused(model):
    with pytest.raises(ValueError, match="cannot combine them in a single input"):
        evaluate(model, mock_tasks.MockMultiChoiceTask())


def test_another_setting_or_weight_is_another_revision_and_the_same_model_the_same(
    model, folder, tmp_path
):
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert load_for_mteb(moved).mteb_model_meta.revision == model.mteb_model_meta.revision
    prompts = json.loads((moved / "config_sentence_transformers.json").read_text("utf-8"))
    prompts["prompts"]["query"] = "query: "
    (moved / "config_sentence_transformers.json").write_text(json.dumps(prompts), "utf-8")
    changed = load_for_mteb(moved).mteb_model_meta
    assert changed.revision != model.mteb_model_meta.revision and changed.use_instructions is True


def test_mteb_gets_the_metadata_of_the_model(model):
    assert isinstance(model, EncoderProtocol)
    meta, network = model.mteb_model_meta, shared_model()[0]
    assert (meta.name, meta.modalities) == ("local/tiny", ["image", "text"])
    assert (meta.embed_dim, meta.max_tokens) == (32, 32)
    assert meta.framework == ["Sentence Transformers", "PyTorch"]
    assert meta.n_parameters == sum(weight.numel() for weight in network.parameters())
    assert meta.similarity_fn_name.value == "cosine" and meta.use_instructions is False


@pytest.mark.slow
@pytest.mark.parametrize("way", ["package", "remote"])
def test_mteb_gets_a_published_model_by_its_name(model, folder, tmp_path, way):
    arguments = [str(folder), "owner/model", way, str(tmp_path / "out")]
    with HubServer() as hub:
        done = subprocess.run(
            [sys.executable, "-c", FROM_HUB, *arguments],
            env=hub.environment(tmp_path / "cache"), stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    wanted = torch.from_numpy(model.model.encode(["a dog"]))
    # Equal weights at other addresses, whose alignment picks other kernels.
    torch.testing.assert_close(torch.load(tmp_path / "out"), wanted, atol=ROUNDING, rtol=0)


def test_a_folder_that_was_not_exported_or_a_name_mteb_cannot_file_is_refused(tmp_path, folder):
    with pytest.raises(ValueError, match=r"has no modules.json.*export"):
        load_for_mteb(tmp_path)
    with pytest.raises(ValueError, match=r"name='mine' must be `organization/model`"):
        load_for_mteb(folder, name="mine")


@pytest.fixture(scope="module")
def retrieval_dataset(tmp_path_factory):
    """Seven images, two captions each except for the first; the last is in a tar shard."""
    path = tmp_path_factory.mktemp("images")
    for number, color in enumerate(COLORS):
        Image.new("RGB", (32 + number, 32), color).save(path / f"{color}.png")
    last = path / f"{COLORS[-1]}.png"
    packed = TarImage(last, "member.png", 0, last.stat().st_size)
    image_of_text = [*range(7), *range(1, 7)]
    captions = [f"a {COLORS[i]} thing, seen {n} times" for n, i in enumerate(image_of_text)]
    return RetrievalDataset(
        name="tiny",
        images=(*(path / f"{color}.png" for color in COLORS[:-1]), packed),
        image_names=COLORS,
        captions=tuple(captions),
        correspondence=Correspondence.from_image_of_text(image_of_text, 7),
        lang="en",
    )


def test_mteb_finds_the_scores_that_our_own_metrics_find(model, retrieval_dataset):
    images = [Image.open(Path(retrieval_dataset.images[0]).parent / f"{c}.png") for c in COLORS]
    ranking = rank_retrieval(
        *(
            torch.from_numpy(model.model.encode(inputs))
            for inputs in (images, list(retrieval_dataset.captions))
        ),
        retrieval_dataset.correspondence,
        all_positives=True,
    )
    tasks = make_mteb_tasks(retrieval_dataset)
    for task, side in zip(tasks, (ranking.i2t, ranking.t2i), strict=True):
        result = evaluate(model, task)
        ((scores,),) = result.scores.values()
        ours = summarize(side, ks=(1, 3, 5))
        assert result.get_score() == pytest.approx(ours["hit_rate_at_1"], abs=6e-6)
        for name in ("hit_rate", "recall", "map", "ndcg"):
            for k in (1, 3, 5):
                # mteb rounds to five digits.
                assert scores[f"{name}_at_{k}"] == pytest.approx(ours[f"{name}_at_{k}"], abs=6e-6)


def write_whole_sharegpt4v(folder):
    (file,) = write_sharegpt4v(folder, records=6).glob("*.json")
    text = file.read_text("utf-8").replace(', {"id": "cut o', "]")
    # The tiny model reads 32 tokens.
    file.write_text(text.replace("A long answer.\\n\\nIt is number", "Number"), "utf-8")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "write", "num_captions"),
    [("coco", write_coco_test, 5), ("sharegpt4v-1k", write_whole_sharegpt4v, 1)],
)
def test_mteb_gives_a_published_dataset_the_scores_of_evaluate(
    model, folder, tmp_path, name, write, num_captions
):
    data = write(tmp_path / "data")
    for number, path in enumerate(sorted(data.rglob("*.jpg"))):
        draw_noise(32, 32, seed=number).save(path)  # equal images would tie
    config = EvaluationConfig(
        output=tmp_path / "evaluation", skip_invalid=True, device="cpu", show_progress=False
    )
    (ours,) = own_evaluation.evaluate(str(folder), f"{name}={data}", config, tasks=["retrieval"])
    # A few of its images, which that says.
    tasks = make_mteb_tasks(name, data, skip_invalid=True)
    for task, direction in zip(tasks, ("i2t", "t2i"), strict=True):
        result = evaluate(model, task)
        ((scores,),) = result.scores.values()
        wanted = ours.scores[direction]
        assert result.get_score() == pytest.approx(wanted["hit_rate_at_1"], abs=6e-6)
        for k in (1, 5, 10):
            for metric in (f"hit_rate_at_{k}", f"recall_at_{k}"):
                # mteb rounds to five digits.
                assert scores[metric] == pytest.approx(wanted[metric], abs=6e-6)
        positives = num_captions if direction == "i2t" else 1
        assert wanted["recall_at_1"] == pytest.approx(wanted["hit_rate_at_1"] / positives)
    assert wanted["hit_rate_at_10"] > 0


def test_images_of_tasks_are_decoded_as_everywhere_within_the_limits(
    retrieval_dataset, tmp_path, monkeypatch
):
    """Pillow would run Ghostscript for the second, and decode the third."""
    files = [tmp_path / f"{number}.png" for number in range(3)]
    Image.new("RGBA", (8, 8)).save(files[0])
    Image.new("RGB", (8, 8)).save(files[1], format="EPS")
    Image.new("RGB", (64, 64)).save(files[2])
    content = files[1].read_bytes()
    packed = EncodedImage("shard.tar: member.png", content)
    data = replace(retrieval_dataset, images=(*files, packed, *retrieval_dataset.images[4:]))
    monkeypatch.setenv(LIMITS_VARIABLE, '{"max_megapixels": 0.003}')
    for task in make_mteb_tasks(data):
        task.load_data()
        split = task.dataset["default"]["test"]
        images = next(split[side] for side in split if "image" in split[side].features)
        assert images[0]["image"].getpixel((0, 0)) == (255, 255, 255)
        for number, error in ((1, "1.png: not an image"), (2, "64 × 64"), (3, "member.png: not")):
            with pytest.raises(ValueError, match=error):
                images[number]


def test_a_dataset_of_the_registry_is_found_by_its_name_or_refused_with_those_that_are(
    retrieval_dataset, tmp_path
):
    # A few of its images, which that says.
    folder = write_xm3600(tmp_path / "xm3600")
    german = make_mteb_tasks("xm3600", folder, lang="de", skip_invalid=True)[0].metadata
    assert german.name.startswith("xm3600-de-") and german.eval_langs == ["deu-Latn"]
    assert {"docci", "urban1k", "xm3600", "emoji"} <= set(list_mteb_datasets())
    with pytest.raises(ValueError, match=r"There is no dataset or folder named 'doci'.*: .*docci"):
        make_mteb_tasks("doci", tmp_path)
    with pytest.raises(ValueError, match=r"imagenet is a classification dataset, .* docci"):
        make_mteb_tasks("imagenet", tmp_path)
    with pytest.raises(ValueError, match=r"docci needs a folder with"):
        make_mteb_tasks("docci")
    with pytest.raises(ValueError, match=r"tiny is already loaded, so .* and lang have no effect"):
        make_mteb_tasks(retrieval_dataset, lang="de")


def test_tasks_are_named_by_dataset_language_data_and_direction(retrieval_dataset):
    i2t, t2i = make_mteb_tasks(retrieval_dataset)
    digest = i2t.metadata.dataset["revision"]
    assert i2t.metadata.name == f"tiny-en-{digest}-image-to-text"
    assert t2i.metadata.name == f"tiny-en-{digest}-text-to-image"
    assert t2i.metadata.category == "t2i"
    captions = ("another", *retrieval_dataset.captions[1:])
    other = make_mteb_tasks(replace(retrieval_dataset, captions=captions))[0].metadata
    assert other.name != i2t.metadata.name and other.dataset["revision"] != digest


def test_languages_have_mtebs_codes(retrieval_dataset):
    codes = {
        "en": "eng-Latn", "zh": "zho-Hans", "zh-Hant": "zho-Hant", "zh-TW": "zho-Hant",
        "zh-hk": "zho-Hant", "zh-CN": "zho-Hans", "zh-Hans-TW": "zho-Hans", "pt-BR": "por-Latn",
    }  # fmt: skip
    for lang, code in codes.items():
        task, _ = make_mteb_tasks(replace(retrieval_dataset, lang=lang))
        assert task.metadata.eval_langs == [code]


def test_a_dataset_without_images_or_in_an_unknown_language_makes_no_task(retrieval_dataset):
    with pytest.raises(ValueError, match="tiny was read without its images"):
        make_mteb_tasks(replace(retrieval_dataset, images=()))
    with pytest.raises(ValueError, match=r"mteb does not know the language 'xx' \(from 'xx-YY'\)"):
        make_mteb_tasks(replace(retrieval_dataset, lang="xx-YY"))
