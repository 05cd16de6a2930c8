"""An output that cannot be made is refused before data are read or weights are loaded.

Neither the model nor the data of these calls can be read, so that an error about the output comes
from a check before them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from read_only import read_only

from modeling_llm2clip.__main__ import main
from modeling_llm2clip.building.build_model import build_model
from modeling_llm2clip.configs.align_config import AlignConfig
from modeling_llm2clip.configs.build_config import BuildConfig
from modeling_llm2clip.configs.encoding_config import TagConfig
from modeling_llm2clip.configs.evaluation_config import EvaluationConfig
from modeling_llm2clip.configs.export_config import ExportConfig, SourceFormat
from modeling_llm2clip.conversion.convert_checkpoint import convert_checkpoint
from modeling_llm2clip.demo.run_demo import make_demo_config, run_demo
from modeling_llm2clip.embedding.embed import embed
from modeling_llm2clip.embedding.extract import extract
from modeling_llm2clip.evaluation.evaluate import evaluate
from modeling_llm2clip.publishing.export_model import export_model
from modeling_llm2clip.recipes.train import train
from modeling_llm2clip.search.image_index import ImageIndex
from modeling_llm2clip.search.tag_images import tag_folder
from modeling_llm2clip.training.alignment.align import align
from modeling_llm2clip.training.finetuning.finetune_llm import finetune_llm

REFUSED = r"cannot be written: \S*file is not a folder\. Choose another folder\."
CONVERT = ["--source-format", "openai", "--text-model", "c/d"]
TAG = ["tag", "MODEL", "DATA", "--labels", "LABELS"]
COMMANDS = {
    "evaluate": ["evaluate", "MODEL", "--datasets", "DATA", "--output", "OUT"],
    "embed": ["embed", "MODEL", "DATA", "OUT", "--modality", "image", "--dtype", "int8"],
    "extract": ["extract", "MODEL", "DATA", "OUT", "--modality", "text"],
    "index": ["index", "MODEL", "DATA", "OUT"],
    "search": ["search", "DATA", "a dog", "--output", "OUT"],
    "tag": [*TAG, "--output", "OUT/tags.csv"],
    "tag --index": [*TAG, "--index", "OUT"],
    "build": ["build", "a/b", "c/d", "OUT", "--prompt", "none"],
    "convert": ["convert", "a/b", "OUT", *CONVERT],
    "export": ["export", "MODEL", "OUT"],
    "export --onnx": ["export", "MODEL", "OUT", "--onnx"],
    "align": ["align", "MODEL", "DATA", "OUT", "--text-training", "frozen-online"],
    "finetune-llm": ["finetune-llm", "MODEL", "DATA", "OUT"],
    "finetune-llm --no-merge": ["finetune-llm", "MODEL", "DATA", "OUT", "--no-merge"],
    "train": ["train", "RECIPE"],
    "demo": ["demo", "--output", "OUT"],
}
NO_MODEL, NO_DATA = "no-model", Path("nowhere")
FUNCTIONS: dict[str, Callable[[Path], object]] = {
    "evaluate": lambda out: evaluate(NO_MODEL, NO_DATA, EvaluationConfig(output=out)),
    "embed": lambda out: embed(NO_MODEL, [], out, modality="image"),
    "extract": lambda out: extract(NO_MODEL, [], out, modality="text"),
    "index": lambda out: ImageIndex.build(NO_MODEL, NO_DATA, out),
    "tag_folder": lambda out: tag_folder(
        NO_MODEL, NO_DATA, [], top_k=1, threshold=None, config=TagConfig(index=str(out)),
        report=print,
    ),
    "build_model": lambda out: build_model(NO_MODEL, NO_MODEL, out, BuildConfig(prompt="none")),
    "convert_checkpoint": lambda out: convert_checkpoint(
        NO_MODEL, NO_MODEL, out, SourceFormat(layout="hub_clip")
    ),
    "export_model": lambda out: export_model(NO_MODEL, out),
    "export_model, ONNX": lambda out: export_model(NO_MODEL, out, ExportConfig(onnx=True)),
    "align": lambda out: align(NO_MODEL, [], out, AlignConfig(text_training="frozen-online")),
    "finetune_llm": lambda out: finetune_llm(NO_MODEL, [], out),
    "train": lambda out: train(make_demo_config(out)),
    "run_demo": lambda out: run_demo(make_demo_config(out)),
}  # fmt: skip


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """An output below a plain file."""
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    return tmp_path / "file" / "out"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_refuses_it_first(
    name: str, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {kind: tmp_path / kind.lower() for kind in ("MODEL", "DATA", "NEW")}
    for kind, file, content in (
        ("MODEL", "config.json", '{"model_type": "llm2clip"}'),
        ("DATA", "captions.jsonl", "no JSON"),
    ):
        places[kind].mkdir()
        (places[kind] / file).write_text(content, encoding="utf-8")
    places |= {"OUT": output, "LABELS": tmp_path / "labels.txt", "RECIPE": tmp_path / "r.yaml"}
    places["LABELS"].write_text("a dog\n", encoding="utf-8")
    places["RECIPE"].write_text(
        f"vision_model: {places['MODEL']}\ntext_model: {places['MODEL']}\n"
        f"data: {places['DATA']}\noutput: {output}\nbuild: {{prompt: none}}\n",
        encoding="utf-8",
    )
    before = sorted(tmp_path.rglob("*"))
    words = []
    for word in COMMANDS[name]:
        kind, slash, rest = word.partition("/")
        words.append(f"{places[kind]}{slash}{rest}" if kind in places else word)
    assert main(words) == 2
    shown = capsys.readouterr().err
    assert re.search(REFUSED, shown), shown
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(not hasattr(os, "setreuid"), reason="needs the users of POSIX")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_refuses_a_folder_that_it_may_not_write_first(name: str, tmp_path: Path) -> None:
    with read_only(tmp_path) as folder, pytest.raises(PermissionError, match="may not write into"):
        FUNCTIONS[name](folder / "new" / "out")
    assert list(tmp_path.iterdir()) == []
