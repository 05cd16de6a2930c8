"""What cannot run is refused in one line, before anything is imported that takes seconds."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COSTLY = ("torch", "transformers", "datasets", "peft", "sentence_transformers", "accelerate")


def write_config(folder: Path, **config: object) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    """Folders of every kind with small files only: nothing that loads them would succeed."""
    llama = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 9}
    write_config(tmp_path / "OWN", model_type="llm2clip")
    write_config(tmp_path / "CLIP", model_type="clip")
    write_config(tmp_path / "LLM", **llama)
    write_config(tmp_path / "VISION", model_type="dinov2", image_size=224)
    write_config(tmp_path / "BERT", model_type="vits")
    write_config(tmp_path / "ABOVE" / "model", model_type="x")
    files = {
        "FULL/kept.txt": "mine", "LABELS.csv": "label\na dog\n", "LORA/adapter_config.json": "{}",
        "STORE/manifest.json": "{}", "EMPTY/.keep": "", "FILE": "",
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    names = ("OWN", "CLIP", "LLM", "VISION", "BERT", "ABOVE", "LORA", "STORE", "FULL", "EMPTY")
    return {name: str(tmp_path / name) for name in (*names, "FILE", "LABELS.csv", "NEW")}


TAG, ONNX = "tag OWN FULL --labels LABELS.csv", "export OWN NEW --onnx"
TOWER = "export OWN NEW --components vision-tower"
CONVERT, EMOJI = "convert a/b NEW --source-format", "evaluate OWN --datasets emoji"
BUILD = "build VISION LLM NEW --prompt none"
OF_CLIP, KIND = "`llm2clip build {CLIP} TEXT_MODEL OUTPUT`", "An LLM2CLIP model is needed here."
# Command lines and the message.
REFUSED = [
    # Misspelled words
    ("serach", 'Did you mean "search"?'),
    ("--versoin", 'Unknown command "--versoin".'),
    ("align m d o --batch-size 4", "Did you mean --global-batch-size?"),
    ("align m d o --rate 1", "Unknown option: --rate."),
    ("tag m d --label l", "Did you mean --labels instead of --label?"),
    ("tag m d --labels l -x", "Unknown option: -x."),
    ("convert a b --source-formt openai", "Did you mean --source-format"),
    ("align m d o --vision-training Lora", 'Did you mean "lora"?'),
    ("build v l o --prompt lama-3", 'Did you mean "llama-3"?'),
    ("build v l o --prompt chat-ml", 'Did you mean "chatml"?'),
    ("doctor m --device gpu", "--device 'gpu': must be one of auto, cpu, cuda"),
    ("doctor m --device cuda:x", "--device 'cuda:x': must be one of"),
    ("doctor m extra", "Unused Tokens: ['extra']"),
    # Values
    ("align m d o --max-steps 3.5", "--max-steps: 3.5 is not an integer."),
    ("align m d o --matryoshka-dims 3 3.5", "3.5 is not an integer."),
    ("align m d o --max-steps -1", "--max-steps -1: Input should be greater than or "),
    ("align m d o --learning-rate x", 'unable to convert "x" into float'),
    ("align m d o --learning-rate nan", "--learning-rate nan: Input should be "),
    ("tag m d --labels", "--labels requires an argument."),
    ("tag m d --labels=", "the path is empty."),
    ("search FULL --image=", "the path is empty. Use a dot for the working directory."),
    ("search FULL --combine false", "--combine takes no value, so false would be read as an arg"),
    ("finetune-llm m d --merge false", "--merge takes no value, so false would be read as an arg"),
    ("build v l o --prompt-prefix --device", "begins with a hyphen, use --prompt-prefix=VALUE"),
    # Commands
    ("build a/b c/d FULL --prompt none", "is not empty"),
    ("build a/b c/d NEW", "A prompt is never guessed"),
    ("build /nowhere LLM NEW --prompt none", "/nowhere: no such vision tower: no"),
    ("build VISION a/b/c NEW --prompt none", "a/b/c: no such language model"),
    ("build VISION EMPTY NEW --prompt none", "EMPTY: the folder has no config.js"),
    ("build VISION FILE NEW --prompt none", "FILE: the language model must be a"),
    ("build VISION /no.gguf NEW --prompt none", "/no.gguf: no such .gguf file"),
    ("build LLM VISION NEW --prompt none", "is a language model. The order is"),
    ("build VISION ABOVE NEW --prompt none", "It cannot be used as TEXT_MODEL."),
    (f"{BUILD} --lora /nowhere", "/nowhere: no such LoRA"),
    (f"{BUILD} --projection-dim 0", "--projection-dim 0: Input should be greater"),
    (f"{BUILD} --text-layers 0", "--text-layers 0: Input should be greater"),
    (f"{BUILD} --prompt-prefix x", "cannot be combined with prompt_prefix"),
    ("convert a/b FULL --source-format openai --text-model c", "is not empty"),
    ("convert a/b NEW", "--source-format requires an argument"),
    (f"{CONVERT} openai", "--text-model requires an argument"),
    (f"{CONVERT} eva02 --text-model c --image-size 8", "the source formats siglip2, not to eva02"),
    (f"{CONVERT} eva02 --text-model c --license 'Apache 2'", "must be a Hub license id"),
    (f"{CONVERT} eva02 --text-model c --license other", "needs license_name and license_link"),
    ("finetune-llm OWN FULL FULL", "has no run.json"),
    ("finetune-llm OWN /nowhere NEW", "/nowhere: no such data"),
    ("finetune-llm no-model FULL NEW", "no-model: no such folder"),
    ("finetune-llm CLIP FULL NEW", OF_CLIP),
    ("finetune-llm OWN FULL NEW --text-pairs f 0", "should be greater than 0"),
    ("extract OWN FULL NEW", "--modality requires an argument"),
    ("extract OWN /nowhere NEW --modality text", "/nowhere: no such data"),
    ("extract CLIP FULL NEW --modality image", OF_CLIP),
    ("extract OWN FULL FULL --modality text", "is not empty, but has no embedding store"),
    ("extract OWN FULL NEW --modality text --image-dir /no", "image_dir=/no: no such fo"),
    ("embed OWN FULL NEW", "--modality requires an argument"),
    ("embed OWN /nowhere NEW --modality text", "/nowhere: no such data"),
    ("embed CLIP FULL NEW --modality text", KIND),
    ("embed OWN FULL FULL --modality text", "is not empty, but has no embeddings"),
    ("embed OWN FULL NEW --modality text --skip-invalid", "only for --modality image"),
    ("embed OWN FULL NEW --modality text --columns price", "price"),
    ("align OWN FULL NEW", "needs a caption_store"),
    ("align CLIP FULL NEW --text-training lora", OF_CLIP),
    ("align OWN FULL NEW --learning-rate 0 --device mps", "--learning-rate 0.0: Input should"),
    ("align OWN FULL NEW --caption-store /nowhere", "--caption-store /nowhere"),
    ("align OWN FULL FULL --caption-store STORE", "has no run.json"),
    ("align OWN /nowhere NEW --caption-store STORE", "no such data"),
    ("evaluate --datasets emoji", "Pass a MODEL and --datasets"),
    ("evaluate OWN", "at least one model and one dataset"),
    ("evaluate no-model --datasets emoji", "no-model: no such folder"),
    ("evaluate ours=ABOVE --datasets emoji", "but its subfolder"),
    ("evaluate LLM --datasets emoji", "is a language model"),
    ("index OWN /nowhere NEW", "/nowhere: no such folder"),
    ("index no-model FULL NEW", "no-model: no such folder"),
    ("index CLIP FULL NEW", OF_CLIP),
    ("search /nowhere 'a dog'", "/nowhere: no such database"),
    ("search FULL 'a dog'", "is not an index"),
    ("search LABELS.csv 'a dog'", "is not an index"),
    ("search OWN FULL 'a dog'", "is not an index"),
    ("search FULL 'a dog' --output FULL", "is not empty"),
    ("search FULL", "There is nothing to search for"),
    ("search FULL 'a dog' --top-k 0", "--top-k 0: Input should be greater"),
    ("search FULL --image /nowhere", "--image /nowhere: no such image"),
    ("tag OWN FULL --labels /nowhere", "/nowhere: "),
    ("tag OWN /nowhere --labels LABELS.csv", "/nowhere: no such folder"),
    (f"{TAG} --top-k 0", "--top-k 0: Input should be greater"),
    (f"{TAG} --output NEW", "must end in .csv or"),
    (f"{TAG} --output LABELS.csv", "Choose a new file"),
    ("tag no-model FULL --labels LABELS.csv", "no-model: no such folder"),
    ("tag CLIP FULL --labels LABELS.csv --output new/tags.csv", OF_CLIP),
    ("serve no-model", "no-model: no such folder"),
    ("serve CLIP --port 0", OF_CLIP),
    ("serve OWN --index FULL", "is not an index"),
    ("serve OWN --host 192.0.2.1", "Cannot listen on host='192.0.2.1', port=8000"),
    ("serve OWN --max-image-mb 50", "exceeds max_request_mb"),
    ("serve OWN --port 70000", "equal to 65535"),
    ("export no-such NEW", "no such folder, and not a Hub id"),
    ("export CLIP NEW", OF_CLIP),
    ("export OWN FULL", "is not empty"),
    ("export OWN FULL/kept.txt", "exists and is not empty"),
    ("export OWN", "OUTPUT requires an argument"),
    ("export OWN NEW --license 'Apache 2'", "must be a Hub license id"),
    ("export OWN NEW --license other", "needs license_name and license_link"),
    (f"{TOWER} --dtype bfloat16", "`dtype` cannot be combined with components=vision-tower."),
    (f"{TOWER} --handler", "`handler` cannot be combined with components=vision-tower"),
    (f"{TOWER} --onnx", "`onnx` cannot be combined with components=vision-tower."),
    (f"{TOWER} --max-megapixels 5", "`max_megapixels` only applies to --onnx"),
    (f"{ONNX} --dtype bfloat16", "`dtype` cannot be combined with onnx=True."),
    (f"{ONNX} --onnx-weights int8 int8", "`onnx_weights` must list"),
    ("export OWN NEW --onnx-weights int8", "`onnx_weights` cannot be used without onnx=True."),
    ("push FULL", "REPO_ID requires an argument"),
    ("push CLIP owner/name", OF_CLIP),
    ("doctor CLIP", OF_CLIP),
    ("doctor LLM", "`llm2clip build VISION_MODEL {LLM} OUTPUT`"),
    ("doctor VISION", "`llm2clip build {VISION} TEXT_MODEL OUTPUT`"),
    ("doctor BERT", "{BERT} is a 'vits', which no command accepts"),
    ("doctor ABOVE", "has no config.json, but its subfolder {ABOVE}/model does."),
    ("doctor LORA", "--lora {LORA}`"),
    ("doctor STORE", "--caption-store {STORE}`"),
    ("doctor /nowhere", "/nowhere: no such folder"),
    ("demo --output FULL", "is not empty"),
    ("demo --max-steps 0", "--max-steps 0: Input should be greater"),
]
# Refused only after the imports.
REFUSED_LATER = [
    ("export OWN NEW --results FULL/kept.txt", "kept.txt is not an evaluation result"),
    ("evaluate OWN --datasets f=x --image-dir c=y", "--image-dir has datasets that --datasets"),
    ("evaluate OWN --datasets folder=", "--datasets 'folder=' must be NAME=FOLDER"),
    ("evaluate OWN --datasets emojis", "Did you mean emoji?"),
    (f"{EMOJI} --tasks retreival", "Did you mean retrieval?"),
    (f"{EMOJI} --model-type openclip", 'Did you mean "open_clip"?'),
    (f"{EMOJI} --model-type clip", "Choose from"),
    (f"{EMOJI} --model-type embeddings open_clip", "2 values for 1 model"),
    (f"{EMOJI} --templates FILE", "`templates` is only for classif"),
    (f"{EMOJI} --templates gone.txt", "templates=gone.txt is not a text"),
    (f"{EMOJI} --languages en en", "languages has duplicates"),
]
RUN_ALL = f"""
import contextlib, io, json, sys
from modeling_llm2clip.__main__ import main
answers = []
for words in json.load(sys.stdin):
    shown = io.StringIO()
    with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(shown):
        code = main(words)
    costly = [name for name in {COSTLY!r} if name in sys.modules]
    answers.append([code, shown.getvalue(), costly])
print(json.dumps(answers))
"""


def test_what_cannot_run_is_refused_before_anything_costly_is_imported(
    places: dict[str, str], tmp_path: Path
) -> None:
    """All in one fresh process."""
    before = sorted(tmp_path.rglob("*"))

    def fill_in(word: str) -> str:
        name, sign, value = word.rpartition("=")
        first, slash, rest = value.partition("/")
        return name + sign + places.get(value, places.get(first, first) + slash + rest)

    rows = [*REFUSED, *REFUSED_LATER]
    calls = [[fill_in(word) for word in shlex.split(line)] for line, _ in rows]
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL], input=json.dumps(calls), cwd=ROOT,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    answered = enumerate(zip(rows, answers, strict=True))
    for number, ((line, message), (code, shown, costly)) in answered:
        wanted = message.format(**places)
        is_one_line = shown.startswith("llm2clip") and shown.count("\n") == 1
        refused = code == 2 and wanted in shown and is_one_line
        assert refused, f"{line}: wanted {wanted!r}, got {code}: {shown}"
        at_once = number >= len(REFUSED) or not costly
        assert at_once, f"{line}: {costly} were imported first. Check before the imports."
    assert sorted(tmp_path.rglob("*")) == before
