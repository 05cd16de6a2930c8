"""The table of the commands that write, and the inputs that they read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults.counts import Counts
from faults.processes import compute, import_everything
from faults.processes import run as run_command

MODELS = ("model", "lora")
_CPU = ("--device", "cpu")
_QUIET = (*_CPU, "--no-show-progress")
_TRAINING = (*_CPU, "--logging-steps", "1")


def read_files(path: Path) -> dict[str, bytes]:
    """Return the content of a file, or of every file in a folder, by its path below it."""
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    content = {str(file.relative_to(path)): file.read_bytes() for file in files if file.is_file()}
    if not content:
        raise FileNotFoundError(f"{path}: no file is there")
    return content


def read_run(path: Path) -> Any:
    """Return the models of a training run, and the loss of every step."""
    lines = map(json.loads, (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    return losses, {name: read_files(path / name) for name in MODELS if (path / name).is_dir()}


def read_recipe(path: Path) -> Any:
    """Return models and stores of a recipe, and its scores."""
    from tiny_recipe import WEIGHTS, read_files

    return read_files(path, parts=WEIGHTS), read_scores(path / "evaluation")


def read_scores(path: Path) -> Any:
    """Return the scores of every result of an evaluation, by its file."""
    return {
        str(file.relative_to(path)): json.loads(file.read_text(encoding="utf-8"))["scores"]
        for file in sorted(path.rglob("*.json"))
    }


def read_index(path: Path) -> Any:
    """Return path and embedding of every image of an index."""
    from modeling_llm2clip.search.index_database import IndexDatabase

    batches = IndexDatabase(path).iterate_embeddings()
    return sorted((name, row.tobytes()) for names, rows in batches
                  for name, row in zip(names, rows, strict=True))  # fmt: skip


@dataclass(frozen=True)
class Command:
    """A command and its output.

    Attributes:
        name: name of the row.
        words: words after `llm2clip`; a name in braces is an input of `prepare`, or the output.
        output: file or folder name of the output.
        start: input that the output is a copy of before the command, for one that works in place.
        again: flag of a call whose output holds something already.
        different: options that, added or in the place of the same ones, make another output.
        moments: patterns of names below the folder of the output at which a kill hurts most.
        read: reads the output; equal results are the same output.
    """

    name: str
    words: tuple[str, ...]
    output: str = "output"
    start: str = ""
    again: str = ""
    different: tuple[str, ...] = ()
    moments: tuple[str, ...] = ()
    read: Callable[[Path], object] = read_files

    def begin(self, inputs: Mapping[str, Path], folder: Path) -> Path:
        """Empty a folder for a case; returns where the output goes, below that folder."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if self.start:
            shutil.copytree(inputs[self.start], folder / self.output)
        return folder / self.output

    def fill_in(self, inputs: Mapping[str, Path], folder: Path, *more: str) -> list[str]:
        """Return the words of a call in the folder of a case, as it is now.

        Options with a value in `more` take the place of the same ones.
        """
        replaced = {
            n for n, word in enumerate(self.words) if word.startswith("--") and word in more
        }
        words = [word for n, word in enumerate(self.words) if not {n, n - 1} & replaced]
        output = folder / self.output
        is_begun = output.is_dir() and any(output.iterdir())
        again = [self.again] if self.again and is_begun else []
        places = {**inputs, "output": output}
        return [*(word.format(**places) for word in words), *more, *again]


COMMANDS = (
    Command(
        "extract text",
        ("extract", "{model}", "{texts}", "{output}", "--modality", "text", "--store-dtype",
         "float32", "--rows-per-shard", "16", "--batch-size", "2", *_QUIET),
        different=("--store-dtype", "float16"), moments=("output/shard-00003*",),
    ),
    Command(
        "extract image",
        ("extract", "{model}", "{data}", "{output}", "--modality", "image", "--rows-per-shard",
         "16", "--batch-size", "4", *_QUIET),
        different=("--store-dtype", "float32"), moments=("output/shard-00001*",),
    ),
    Command(
        "embed text",
        ("embed", "{model}", "{texts}", "{output}", "--modality", "text", "--columns", "text",
         "--dtype", "int8", "--rows-per-shard", "32", "--batch-size", "2", *_QUIET),
        different=("--rows-per-shard", "48"), moments=("output/embeddings-00002*",),
    ),
    Command(
        "embed image",
        ("embed", "{model}", "{data}", "{output}", "--modality", "image", "--rows-per-shard", "4",
         "--batch-size", "4", *_QUIET),
        different=("--rows-per-shard", "5"), moments=("output/embeddings-00002*",),
    ),
    Command(
        "score", ("score", "{model}", "{pairs}", "{output}", *_QUIET), output="scores.csv",
        different=("--batch-size", "1"), moments=("*scores.csv*",),
    ),
    Command(
        "index", ("index", "{model}", "{images}", "{output}", "--batch-size", "4", *_QUIET),
        moments=("output/*", "output/*/*"), read=read_index,
    ),
    Command(
        "index that exists", ("index", "{model}", "{images}", "{output}", *_QUIET),
        start="few-index", moments=("output/images.lance/*/*",), read=read_index,
    ),
    Command(
        "tag", ("tag", "{model}", "{images}", "--labels", "{labels}", "--output", "{output}",
                *_QUIET),
        output="tags.csv", different=("--top-k", "1"), moments=("*tags.csv*",),
    ),
    Command(
        "search", ("search", "{index}", "a red car", "--output", "{output}", *_CPU),
        different=("--top-k", "2"), moments=("output", "output/*"),
    ),
    Command(
        "export", ("export", "{model}", "{output}", "--max-shard-size", "50KB", *_CPU),
        different=("--dtype", "bfloat16"), moments=(".output-*", ".output-*/output/*"),
    ),
    Command(
        "build", ("build", "{vision}", "{llm}", "{output}", "--prompt", "none",
                  "--projection-dim", "16", "--max-text-length", "64", *_CPU),
        different=("--projection-dim", "8"), moments=(".output-*", ".output-*/output/*"),
    ),
    Command(
        "convert", ("convert", "{checkpoint}", "{output}", "--source-format", "eva02",
                    "--text-model", "{golden-llm}", "--max-text-length", "200", *_CPU),
        different=("--dtype", "bfloat16"), moments=(".output-*", ".output-*/output/*"),
    ),
    Command(
        "finetune-llm", ("finetune-llm", "{model}", "{data}", "{output}", "--max-steps", "6",
                         "--per-device-train-batch-size", "4", "--num-held-out", "4",
                         "--save-steps", "2", *_TRAINING),
        again="--resume", different=("--learning-rate", "1e-3"),
        moments=("output/run.json*", "output/checkpoints/checkpoint-*", "output/lora",
                 "output/.model-*"),
        read=read_run,
    ),
    Command(
        "align", ("align", "{model}", "{data}", "{output}", "--caption-store", "{captions}",
                  "--max-steps", "12", "--global-batch-size", "8", "--save-steps", "3",
                  "--vision-training", "full", "--layer-decay", "0.9", "--learning-rate", "1e-4",
                  "--num-workers", "1", *_TRAINING),
        again="--resume", different=("--learning-rate", "1e-3"),
        moments=("output/run.json*", "output/checkpoints/checkpoint-*", "output/.model-*"),
        read=read_run,
    ),
    Command(
        "evaluate", ("evaluate", "{model}", "--datasets", "{data}", "--output", "{output}",
                     *_QUIET),
        different=("--dtype", "bfloat16"), moments=("output/*",), read=read_scores,
    ),
    Command(
        "train", ("train", "{recipe}"),  # the recipe names the output
        moments=("output/run.json", "output/.built-*", "output/fine-tuned/run.json",
                 "output/fine-tuned/checkpoints/checkpoint-2", "output/fine-tuned/lora",
                 "output/fine-tuned/.model-*", "output/captions/*", "output/images/*",
                 "output/aligned/run.json", "output/aligned/best.safetensors",
                 "output/aligned/checkpoints/checkpoint-4", "output/aligned/.model-*",
                 "output/.model-*", "output/evaluation"),
        read=read_recipe,
    ),
)  # fmt: skip


def prepare(folder: Path) -> dict[str, Path]:
    """Make the inputs of all commands once, in a fork; returns their places by name."""
    root = folder / "inputs"
    if not root.exists():
        root.mkdir(parents=True)
        compute(_make_inputs, root, folder=root)
    return {path.name.partition(".")[0]: path for path in root.iterdir()}


def _make_inputs(root: Path) -> None:
    from aligning import prepare as prepare_alignment
    from converting import LLM, save_checkpoint
    from indexes import build, save_images
    from made_up_records import make_records, write_captions
    from tiny_recipe import prepare_sources, write_recipe

    prepared = prepare_alignment(root)
    prepared.model.rename(root / "model")
    prepared = type(prepared)(prepared.data, root / "model", prepared.captions, prepared.images)
    prepared.images.rename(root / "image-store")
    texts, model = make_records(250), root / "model"
    (root / "texts").mkdir()
    write_captions(root / "texts", texts)
    images = save_images(root / "images", count=16)
    later = (images / "below").rename(root / "later")
    build(model, images, root / "few-index")
    later.rename(images / "below")
    build(model, images, root / "index")
    shutil.copytree(LLM, root / "golden-llm")
    shutil.copy(save_checkpoint("eva02", root / "eva02"), root / "checkpoint.pt")
    prepare_sources(root / "sources")
    for name in ("vision", "llm"):
        shutil.copytree(root / "sources" / name, root / name)
    write_recipe(root / "sources", root / "recipe.yaml", output="output")
    (root / "labels.txt").write_text("a dog\na red car\nthe sea\n", encoding="utf-8")
    lines = [{"image": f"data/{n:02}.jpg", "text": f"a photo of thing {n}"} for n in range(24)]
    text = "\n".join(map(json.dumps, lines))
    (root / "pairs.jsonl").write_text(text, encoding="utf-8")


def run(folder: Path, seconds: float, seed: int) -> Counts:
    """Run every command twice, undisturbed; both outputs must be the same.

    Args:
        folder: where everything goes.
        seconds: as of the other harnesses; here each command runs twice, however long it takes.
        seed: as of the other harnesses; nothing is drawn.
    """
    del seconds, seed
    import_everything()
    inputs, counts = prepare(folder), Counts()
    for command in COMMANDS:
        first, second = (read_undisturbed(command, inputs, folder) for _ in range(2))
        counts.add("harmless" if first == second else "silently_wrong", command.name)
    return counts


def read_undisturbed(command: Command, inputs: Mapping[str, Path], folder: Path) -> object:
    """Run a command to its end in `folder/case`; returns its output as it is compared."""
    output = command.begin(inputs, folder / "case")
    ended = run_command(command.fill_in(inputs, output.parent), output.parent)
    if ended.code != 0:
        raise RuntimeError(f"{command.name}: exit code {ended.code}: {ended.log[-3000:]}")
    return compute(command.read, output, folder=output.parent)
