"""A model folder written anew: whole or one tower, in other dtypes and files, with its card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluating import save_scores
from published_datasets import write_own_folder
from sentence_transformers import SentenceTransformer
from shared_models import CAPTIONS, shared_batch, shared_model
from tiny import tiny_images
from tiny_folders import export_tiny_model
from transformers import AutoConfig, AutoModel, AutoProcessor

from modeling_llm2clip import LLM2CLIPTextModel, LLM2CLIPVisionModel
from modeling_llm2clip.__main__ import main
from modeling_llm2clip.configs.evaluation_config import EvaluatedModel, EvaluationConfig
from modeling_llm2clip.configs.export_config import ExportConfig
from modeling_llm2clip.doctor.check_model import check_model
from modeling_llm2clip.evaluation.evaluate import evaluate
from modeling_llm2clip.evaluation.results import Result, write_result
from modeling_llm2clip.model_folders.model_card import CardData, CardResult, read_card_data
from modeling_llm2clip.model_folders.model_writing import save_model
from modeling_llm2clip.publishing.export_model import (
    export_model,
    read_card_results,
    require_own_results,
)

RESULT = CardResult("retrieval", "COCO", {"t2i_r1": 0.5})
CLASS_OF = {"text": LLM2CLIPTextModel, "vision": LLM2CLIPVisionModel}
# One law of equal weights: they may be at other addresses, whose alignment picks other kernels.
ADDRESSES = 1e-6
LOAD_WITHOUT_THE_PACKAGE = """
import json, sys
sys.modules["modeling_llm2clip"] = None  # importing the package raises from here on
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor
found = {}
for name, folder in json.loads(sys.argv[1]).items():
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    value = "a dog" if name == "text" else Image.new("RGB", (40, 48), "red")
    inputs = processor(**{"text" if name == "text" else "images": value})
    embedding = model(**inputs).pooler_output[0].tolist()
    other = SentenceTransformer(folder, trust_remote_code=True).encode([value])[0].tolist()
    found[name] = type(model).__name__, embedding, other
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model that states all there is to state; not to be changed."""
    model, processor = shared_model()
    stated = CardData(
        license="mit", vision_license="mit", text_license="llama3.2",
        training_data=("owner/images",), results=(RESULT,),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("source") / "model"
    return save_model(model, processor, folder, instructions={"query": "find: "}, card=stated)


@pytest.fixture(scope="module")
def parts(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The text-only and the vision-only model of the source."""
    root = tmp_path_factory.mktemp("parts")
    names: tuple[Any, ...] = tuple(CLASS_OF)
    return {n: export_model(source, root / n, ExportConfig(components=n)) for n in names}


@pytest.fixture(params=CLASS_OF)
def part(request: Any, parts: dict[str, Path]) -> tuple[str, Path]:
    return request.param, parts[request.param]


def test_one_tower_is_healthy_and_gives_the_whole_models_embeddings(part: tuple[str, Path]) -> None:
    components, folder = part
    loaded, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert type(loaded) is CLASS_OF[components]
    inputs = processor(text=CAPTIONS) if components == "text" else processor(images=tiny_images(3))
    with torch.no_grad():
        embeds, whole = loaded(**inputs).pooler_output, shared_model()[0](**shared_batch())
    expected = whole.text_embeds if components == "text" else whole.image_embeds
    assert torch.allclose(embeds, expected, atol=ADDRESSES)
    report = check_model(folder)
    assert report.healthy, str(report)
    passed = {check.name for check in report.checks if check.passed}
    assert {"golden embeddings", "sentence-transformers", "processor", "remote code"} <= passed
    assert SentenceTransformer(str(folder)).modalities == [
        {"text": "text", "vision": "image"}[components]
    ]
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert ("vision tower" in card, "language model" in card.split("## Use")[0]) == (
        components == "vision", components == "text",
    )  # fmt: skip
    assert read_card_data(folder).results == ()  # of the whole
    assert read_card_data(folder).training_data == ("owner/images",)


@pytest.mark.slow
def test_one_tower_loads_without_the_package(parts: dict[str, Path], tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    folders = json.dumps({name: str(folder) for name, folder in parts.items()})
    done = subprocess.run(
        [sys.executable, "-c", LOAD_WITHOUT_THE_PACKAGE, folders],
        env=environment | {"HF_HOME": str(tmp_path)},
        cwd=tmp_path, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for name, (class_name, embeds, encoded) in json.loads(done.stdout.splitlines()[-1]).items():
        assert class_name == CLASS_OF[name].__name__
        assert np.allclose(embeds, encoded, atol=ADDRESSES)


def test_an_untouched_export_keeps_weights_instructions_and_all_that_the_card_states(
    source: Path, tmp_path: Path
) -> None:
    folder = export_model(source, tmp_path / "again")
    assert read_card_data(folder) == read_card_data(source)
    for name in ("model.safetensors", "config_sentence_transformers.json", "tokenizer.json"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.slow
def test_another_dtype_is_healthy_and_drops_what_was_measured_before(
    source: Path, tmp_path: Path
) -> None:
    settings = ExportConfig(dtype="bfloat16", max_shard_size="50KB")
    folder = export_model(source, tmp_path / "half-precision", settings)
    shards = [file.stat().st_size for file in folder.glob("model-*.safetensors")]
    assert len(shards) > 2 and max(shards) < 50_000 + 5_000  # of which the header is some
    report = check_model(folder)
    assert report.healthy, str(report)
    assert next(c for c in report.checks if c.name == "weight dtype").message.endswith("bfloat16")
    assert read_card_data(folder).results == ()
    file = save_scores(tmp_path / "results.json", {"t2i_r1": 0.5}, folder)
    given = export_model(source, tmp_path / "measured", replace(settings, results=(file,)))
    assert read_card_data(given).results == (replace(RESULT, count="8 images, 40 texts"),)


def test_base_models_are_stated_anew_in_card_and_configuration(
    source: Path, tmp_path: Path
) -> None:
    ids = ("owner/vision", "owner/llm")
    folder = export_model(source, tmp_path / "named", ExportConfig(base_models=ids))
    config = AutoModel.from_pretrained(folder).config
    assert (config.vision_config._name_or_path, config.text_config._name_or_path) == ids
    assert "base_model:\n- owner/vision\n- owner/llm\n" in (folder / "README.md").read_text()
    tower = export_model(folder, tmp_path / "tower", ExportConfig(components="vision-tower"))
    card = (tower / "README.md").read_text(encoding="utf-8")
    assert "base_model:\n- owner/vision\n" in card and "base_model_relation: finetune\n" in card


def test_one_tower_has_no_other_to_export(part: tuple[str, Path], tmp_path: Path) -> None:
    components, folder = part
    other = {"text": "vision", "vision": "text"}[components]
    with pytest.raises(ValueError, match=r"Missing .*Use the class that saved the folder"):
        export_model(folder, tmp_path / "other", ExportConfig(components=other))
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_what_its_flags_say(source: Path, tmp_path: Path) -> None:
    words = [
        "export",
        str(source),
        str(tmp_path / "tower"),
        "--components",
        "vision-tower",
        "--license",
        "mit",
    ]
    assert main(words) == 0
    assert AutoConfig.from_pretrained(tmp_path / "tower").model_type == "clip_vision_model"
    results = save_scores(tmp_path / "results.json", {"r1": 0.25}, source)
    flags = ["--license", "cc-by-4.0", "--training-data", "owner/one", "my own", "--results"]
    assert main(["export", str(source), str(tmp_path / "new"), *flags, str(results)]) == 0
    assert read_card_data(tmp_path / "new") == CardData(
        license="cc-by-4.0", vision_license="mit", text_license="llama3.2",
        training_data=("owner/one", "my own"),
        results=(CardResult("retrieval", "COCO", {"r1": 0.25}, count="8 images, 40 texts"),),
    )  # fmt: skip


def test_results_of_other_weights_are_refused_and_those_of_these_are_taken(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, scores = tmp_path / "results.json", {"r1": 0.25}
    command = ["export", str(source), str(tmp_path / "new"), "--results", str(results)]
    for changes in (
        {"normalize_text_before_adapter": "neither"},
        {"weights": "0" * 64},
        {"dtype": "bfloat16"},
    ):
        save_scores(results, scores, source, **changes)
        error = rf"retrieval on COCO \({next(iter(changes))}\): not measured with"
        with pytest.raises(ValueError, match=error):
            require_own_results(read_card_results([results]), source)
    save_scores(results, scores, source)
    assert main([*command, "--dtype", "bfloat16"]) == 2
    assert "retrieval on COCO (weights, dtype): not measured" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert main(command) == 0
    assert read_card_data(tmp_path / "new").results[0].scores == scores


# Recorded results


def test_a_card_takes_results_of_its_own_model_in_its_own_dtype_alone(tmp_path: Path) -> None:
    model = export_tiny_model(tmp_path / "model")
    data = write_own_folder(tmp_path / "data")
    evaluate(
        EvaluatedModel(source=str(model), name="ours"),
        data,
        EvaluationConfig(languages=("de",), output=tmp_path / "out"),
        tasks=("retrieval",),
    )
    file = tmp_path / "out" / "ours" / "folder.retrieval.json"
    (result,) = read_card_results([file])
    assert result.dataset == "folder [de]"  # a language other than English is named
    scores, counts = (json.loads(file.read_text("utf-8"))[name] for name in ("scores", "counts"))
    of_i2t = scores["i2t"]["intervals"]["hit_rate_at_1"]
    assert result.intervals["i2t.hit_rate_at_1"] == (of_i2t["low"], of_i2t["high"])
    assert result.count == f"{counts['images']} images, {counts['texts']} texts"
    written = export_model(model, tmp_path / "new", ExportConfig(results=(file,)))
    assert read_card_data(written).results == (result,)
    with pytest.raises(
        ValueError, match=r"\(weights, dtype\): not measured with the exported model"
    ):
        export_model(model, tmp_path / "half", ExportConfig(dtype="float16", results=(file,)))
    assert not (tmp_path / "half").exists()


def test_scores_are_named_by_their_path_and_details_stay_in_the_file(tmp_path: Path) -> None:
    interval = {"value": 0.5, "low": 0.25, "high": 0.75}
    scores = {
        "t2i": {"hit_rate_at_1": 0.5, "intervals": {"hit_rate_at_1": interval}},
        "accuracy": {**interval, "chance": 0.125},
        "languages": {"de": {"hit_rate_at_1": 0.5}},
        "buckets": [{"hit_rate_at_1": interval}],
        "share_truncated": None,
    }
    data = {"lang": "en", "images": 8}
    result = Result(
        model="m", task="retrieval", dataset="coco", scores=scores, fingerprint={"weights": "0"},
        protocol={"data": data, "model": {"dtype": "float32"}}, counts={"images": 8, "texts": 40},
    )  # fmt: skip
    write_result(tmp_path / "coco.json", result)
    assert read_card_results([tmp_path / "coco.json"]) == (
        CardResult(
            "retrieval",
            "coco",
            {"t2i.hit_rate_at_1": 0.5, "accuracy": 0.5, "accuracy.chance": 0.125},
            intervals={"t2i.hit_rate_at_1": (0.25, 0.75), "accuracy": (0.25, 0.75)},
            count="8 images, 40 texts",
        ),
    )
    files = [tmp_path / "coco.json"] * 2 + [tmp_path / "notes.json", tmp_path / "absent.json"]
    files[2].write_text(json.dumps({"task": "t", "dataset": "d", "scores": {"r1": 0.5}}), "utf-8")
    with pytest.raises(ValueError) as refused:
        read_card_results(files)
    for error in ("is a duplicate", "notes.json is not an evaluation", "absent.json"):
        assert error in str(refused.value)
