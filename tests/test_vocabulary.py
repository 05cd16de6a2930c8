"""The words that this project does not use: each thing has one name, the field's own.

Single words, spelling and excluded files are in `typos.toml`, which the spell checker reads too;
phrases and flags, which it cannot see, are here.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

from package_sources import ROOT, read_package

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECORDED = sorted((ROOT / "benchmarks" / "results").glob("*.json"))

# Banned phrase, a regular expression in which a space is any white space: the field's term.
PHRASES: dict[str, str] = {
    # Things
    r"data sets?\b": "dataset",
    r"kept[ _]vectors?|KeptVectors": "image index",
    r"SetCard|\bset cards?\b": "DatasetSpec",
    r"\b(find|read|list|hash)_sets?\b": "find_dataset, load_dataset, list_datasets, hash_dataset",
    r"\b(Retrieval|Classification|Choice)Set\b": "RetrievalDataset, …",
    r"\b(accept|merge|write)_adapter": "accept_lora, merge_lora, write_lora",
    r"tune[-_]captions|caption[-_ ]tun(ed|ing|e)|(?<!fine-)tuned on captions": "fine-tuned, …",
    r"(caption|llm)[-_ ]adapters?": "caption LoRA, LLM LoRA",
    r"KeyedBatch|keyed_contrastive|gather_keys": "group_id",
    r"\bdraw_(captions?|pairs|batch(es)?|golden)": "sample_…, render_…",
    r"\b[A-Z]\w*Settings\b": "…Config",
    r"\b(?!Bound|Hf|Training|\w*TrainingArguments)[A-Z]\w*Arguments\b": "…Config",
    r"tell_kind|model_kind|kinds? of (a )?models?": "model type",
    r"(Text|Vision|text|vision|image|other|either)[ _-]?[Hh]alf\b": "text-only, vision-only model",
    r"\b(is|are|was|were|texts?|captions?)[ _]cut\b": "truncated",
    r"[Bb]oth[ _]ways|TwoWay": "i2t and t2i; bidirectional",
    r"image_to_text|text_to_image": "i2t, t2i",
    r"processors? for the CPU|on_processor": "CPU",
    r"\bRECIPES\b|\bRecipe\b|\brecipe=": "source format; a recipe is a YAML file",
    r"take_best": "ImageIndex.search",
    r"num[-_]alike|find_alike": "num_hard_negatives, find_nearest_groups",
    # English
    r"whole numbers?": "integer",
    r"one \w+ an? (sample|image|caption|line|row|step|file|model|format|command|task)\b": "per",
    r"(captions|images|texts|rows|tokens|samples) a (second|step|batch)\b": "per",
    r"is none of|(?<!there\s)\b(is|are) none\b": "is not a",
    r"(?<![Tt]here\s)(?<!it\s)\bis no (?!longer\b|more\b|less\b|fewer\b|default\b)\w+": "is not a",
}  # fmt: skip
# Banned flag of a command: the one spelling over all commands.
FLAGS: dict[str, str] = {
    r"--images\b": "--image-dir",
    r"--(steps|epochs|lr|vision-lr)\b": "--max-steps, --num-train-epochs, --learning-rate, …",
    r"--(prefix|suffix)\b": "--prompt-prefix, --prompt-suffix",
    r"--vectors\b": "--index",
    r"--(pictures|check-pictures|no-check-pictures|picture-store)\b": "--modality image, …",
    r"--exclude-faults\b": "--skip-invalid",
    r"--kind\b": "--model-type",
    r"--loss-chunk(?!-)\b": "loss_chunk_size",
    r"--(rank|text-rank|vision-rank)\b": "--lora-rank",
    r"--long-share\b": "long_caption_ratio",
    r"--count\b": "--top-k",
    r"--recipe\b": "--source-format",
    r"--start\b": "--init-lora, --projection-init",
    r"--(clip-norm|log-every|save-every|eval-every|evaluate-every)\b": "max_grad_norm, …",
    r"--workers\b": "--num-workers",
    r"--other-pairs\b": "--text-pairs",
    r"--(llm-adapter|caption-adapter|adapter-dtype)\b": "--llm-lora, --lora, lora_dtype",
    r"--(push|public|branch)\b": "llm2clip push, --private, --revision",
}  # fmt: skip
# Variables for which a noun says more: `model_folder`, `checkpoint`, `expected`.
VAGUE_NAMES = {"found": 0, "wanted": 0, "one": 0, "given": 0, "own": 0, "of_whom": 0}


@cache
def read_config() -> dict[str, Any]:
    return tomllib.loads((ROOT / "typos.toml").read_text("utf-8"))


@cache
def read_words() -> dict[str, str]:
    """Banned words and what to write instead; words allowed as they are do not count."""
    words: dict[str, str] = read_config()["default"]["extend-words"]
    return {word: better for word, better in words.items() if word != better}


def run_typos(*options: str) -> list[str]:
    command = shutil.which("typos", path=str(Path(sys.executable).parent)) or shutil.which("typos")
    assert command, 'The spell checker is missing: pip install -e ".[test]"'
    done = subprocess.run(
        [command, "--config", "typos.toml", *options],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode in (0, 2), done.stderr  # 2: something was found
    return done.stdout.splitlines()


def find_misspelled(*paths: str) -> dict[str, list[str]]:
    """Where each word occurs that the spell checker reports, in lower case."""
    places = defaultdict(list)
    for line in run_typos("--format", "json", *paths):
        found = json.loads(line)
        if found["type"] == "typo":
            line_number = found.get("line_num", "the file's name")
            places[found["typo"].lower()].append(f"{found['path']}:{line_number}")
    return dict(places)


@cache
def read_files() -> dict[str, str]:
    """Text of every file that the spell checker reads, by path."""
    paths = [path.removeprefix("./") for path in run_typos("--files")]
    texts = {path: (ROOT / path).read_text("utf-8", errors="replace") for path in paths}
    return {p: blank_outputs(text) if p.endswith(".ipynb") else text for p, text in texts.items()}


def blank_outputs(notebook: str) -> str:
    """Remove what nobody wrote in a notebook; the numbers of its lines stay."""
    for ignored in read_config()["type"]["notebook"]["extend-ignore-re"]:
        notebook = re.sub(ignored, lambda match: "\n" * match[0].count("\n"), notebook)
    return notebook


def compile_phrase(pattern: str) -> re.Pattern[str]:
    # A wrapped comment or a wrapped paragraph still holds the phrase.
    return re.compile(pattern.replace(" ", r"(?:\s|#)+"))


def find_phrase(pattern: str, *, leave_out: tuple[str, ...] = ()) -> list[str]:
    compiled = compile_phrase(pattern)
    return [
        f"{path}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]!r}"
        for path, text in read_files().items()
        if not path.startswith(leave_out)
        for match in compiled.finditer(text)
    ]


def find_keys(value: object) -> set[str]:
    """All keys of nested JSON."""
    if isinstance(value, dict):
        return {*value, *(key for inner in value.values() for key in find_keys(inner))}
    if isinstance(value, list):
        return {key for inner in value for key in find_keys(inner)}
    return set()


def test_code_documents_and_workflows_are_read_and_quoted_data_is_not() -> None:
    assert {
        "README.md", "setup.cfg", ".ci/run", "modeling_llm2clip/__init__.py", "mkdocs.yml",
        "docs/index.md", "tests/conftest.py", ".github/workflows/ci.yml",
    } <= read_files().keys()  # fmt: skip
    assert not any(path.startswith("examples/data/emoji/LICENSES") for path in read_files())


def test_a_banned_word_inside_a_name_is_found(tmp_path: Path) -> None:
    source = tmp_path / "example.py"
    source.write_text("TarPicture = load_pictures\nlicence = 1\n", encoding="utf-8")
    assert set(find_misspelled(str(source))) == {"picture", "pictures", "licence"}


def test_spelling_is_american_and_a_banned_word_occurs_nowhere() -> None:
    misspelled = find_misspelled()
    assert {word: (read_words().get(word), places) for word, places in misspelled.items()} == {}


def test_a_banned_phrase_occurs_nowhere() -> None:
    occurrences = {better: find_phrase(phrase) for phrase, better in PHRASES.items()}
    assert {better: places for better, places in occurrences.items() if places} == {}


def test_a_flag_has_one_spelling() -> None:
    """Scripts have flags of their own."""
    scripts = ("benchmarks/", "examples/data/")
    occurrences = {better: find_phrase(flag, leave_out=scripts) for flag, better in FLAGS.items()}
    assert {better: places for better, places in occurrences.items() if places} == {}


def test_keys_of_recorded_results_use_no_banned_word() -> None:
    """Values are what was measured, and stay as they were recorded."""
    keys = {key for path in RECORDED for key in find_keys(json.loads(path.read_text("utf-8")))}
    # Paths, names of models and captions are data that became keys.
    names = {key for key in keys if re.fullmatch(r"[a-z][a-z0-9_]*", key)}
    parts = {part for key in names for part in key.split("_")}
    assert RECORDED and parts & read_words().keys() == set()


def test_a_docstring_names_the_thing_first() -> None:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    vague = [
        f"{source.path}:{getattr(node, 'lineno', 1)}"
        for source in read_package().values()
        for node in source.nodes
        if isinstance(node, documented) and (ast.get_docstring(node) or "").startswith("What ")
    ]
    assert not vague, "Start these docstrings with a verb or with the thing they are about."


def test_no_variable_or_parameter_has_a_vague_name() -> None:
    vague = [
        f"{source.path}:{node.lineno}"
        for source in read_package().values()
        for node in source.nodes
        if (isinstance(node, ast.arg) and node.arg in VAGUE_NAMES)
        or (
            isinstance(node, ast.Name)
            and isinstance(node.ctx, ast.Store)
            and node.id in VAGUE_NAMES
        )
    ]
    assert vague == [], "Name these by nouns."
