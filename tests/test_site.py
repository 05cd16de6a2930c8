"""The site: every page is reachable, every link resolves, every block is true."""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from browsing import WIDTHS, needs_browser, open_browser, overflows
from tiny import tiny_images
from tiny_folders import export_tiny_model, save_captioned_squares, save_tiny_llm, save_tiny_vision

import modeling_llm2clip
from modeling_llm2clip.__main__ import LINE
from modeling_llm2clip.cli.command import UsageError, parse
from modeling_llm2clip.configs.build_config import PROMPT_NAMES
from modeling_llm2clip.configs.config_fields import make_config
from modeling_llm2clip.configs.train_config import TrainConfig
from modeling_llm2clip.conversion.layouts import LAYOUTS
from modeling_llm2clip.data.record_fields import KNOWN_FIELDS
from modeling_llm2clip.doctor import server_checks
from modeling_llm2clip.doctor.check_model import check_model
from modeling_llm2clip.evaluation.datasets.dataset_registry import list_datasets
from modeling_llm2clip.evaluation.tasks.task_registry import TASKS

# How many blocks of code are wider than their boxes, and how many of those do not scroll.
MEASURE_CODE = """
() => {
    const blocks = [...document.querySelectorAll("pre > code")];
    const cut = blocks.filter((block) => block.scrollWidth > block.clientWidth);
    return [cut.length, cut.filter((block) => getComputedStyle(block).overflowX !== "auto").length];
}
"""
ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
CONFIG: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
GENERATED = {"reference/cli.md", "reference/api.md"}  # by .ci/write_references.py
PAGES = sorted(
    path for path in DOCS.rglob("*.md") if path.relative_to(DOCS).as_posix() not in GENERATED
)
# Folders and files that a reader makes or downloads, and Hub ids.
MADE_BY_READERS = (
    ".eval_results",
    "aligned", "captions", "images", "llm2clip-demo", "model", "my-images", "my-model", "runs",
    "tuned", "built", "evaluation", "text-only", "to-publish", "tower", "caption", "image", "val",
    "<name>", "site", "onnx", "microsoft", "meta-llama", "openai", "facebook", "HuggingFaceTB",
    "texts.csv", "texts.jsonl", "texts.parquet", "Qwen", "google", "swiss-ai", "timm",
    ".agents", "found", "1_Pooling",
)  # fmt: skip
# Files that the how-tos write.
NEW_FILES = {
    "modeling_llm2clip/cli/count.py",
    "modeling_llm2clip/configs/count_config.py",
    "modeling_llm2clip/evaluation/datasets/my_captions.py",
    "modeling_llm2clip/training/losses/cosine.py",
    "tests/training/losses/test_cosine.py",
}
# Flags of other programs, and of the scripts in `examples/`.
OTHER_FLAGS = {
    "--help", "--strict", "--min-length", "--layer", "--chat-template", "--skip-text-only",
    "--grid", "--key", "--url", "--lang", "--lang-column",
}  # fmt: skip

# One process for all blocks imports torch once; each reports by itself.
RUN_BLOCKS = """
import json, sys, traceback
failed = {}
for title, source in json.load(sys.stdin):
    try:
        exec(compile(source, title, "exec"), {"__name__": "__main__"})
    except BaseException:
        failed[title] = traceback.format_exc()[-1500:]
print(json.dumps(failed))
"""
_BLOCK = re.compile(
    r"^(?P<indent> *)(?:<!-- (?P<note>[^>]*) -->\n *)?```(?P<language>\w+)\n(?P<body>.*?)^ *```$",
    re.DOTALL | re.MULTILINE,
)


def find_blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """Return note and text of each fenced block in a language; the note is a comment above it."""
    found = []
    for match in _BLOCK.finditer(page.read_text("utf-8")):
        if match["language"] == language:
            indent = len(match["indent"])
            lines = [line[indent:] for line in match["body"].splitlines()]
            found.append((match["note"] or "", "\n".join(lines) + "\n"))
    return found


def list_nav(entries: Any) -> list[str]:
    if isinstance(entries, str):
        return [entries]
    if isinstance(entries, dict):
        return [page for inner in entries.values() for page in list_nav(inner)]
    return [page for inner in entries for page in list_nav(inner)]


def read_prose(page: Path) -> str:
    return _BLOCK.sub("", page.read_text("utf-8"))


def slugify(heading: str) -> str:
    """The anchor of a heading, as Python-Markdown's `toc` makes it."""
    text = re.sub(r"[^\w\s-]", "", heading).strip().lower()
    return re.sub(r"[-\s]+", "-", text)


def list_anchors(page: Path) -> set[str]:
    return {slugify(line) for line in re.findall(r"^#+ (.+)$", read_prose(page), re.MULTILINE)}


def test_every_page_is_in_the_navigation() -> None:
    pages = {path.relative_to(DOCS).as_posix() for path in PAGES}
    assert sorted(list_nav(CONFIG["nav"])) == sorted(pages | GENERATED)


def find_broken_links(page: Path) -> Iterator[str]:
    for link in re.findall(r"\]\(([^)\s]+)\)", read_prose(page)):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if "://" in path or target.relative_to(DOCS).as_posix() in GENERATED:
            continue
        if not target.is_file() or (anchor and anchor not in list_anchors(target)):
            yield f"{page.relative_to(DOCS)}: {link}"


def test_every_link_leads_to_a_page_and_a_heading() -> None:
    assert [link for page in PAGES for link in find_broken_links(page)] == []


def find_missing_paths(page: Path) -> list[str]:
    """Return texts between backticks that look like paths of the repository but do not exist."""
    quoted = re.findall(r"`([\w.<>-]+(?:/[\w.<>*-]*)+)`", read_prose(page))
    return [
        path
        for path in quoted
        if path.split("/")[0] not in MADE_BY_READERS
        and path not in NEW_FILES
        and "<" not in path
        and not list(ROOT.glob(path.rstrip("/")))
    ]


def test_every_path_between_backticks_exists() -> None:
    assert [path for page in PAGES for path in find_missing_paths(page)] == []


def test_blocks_of_json_and_python_parse_and_those_of_yaml_are_recipes() -> None:
    for page in PAGES:
        for _, text in find_blocks(page, "json"):
            for line in text.splitlines():
                json.loads(line)
        for note, text in find_blocks(page, "yaml"):
            if "test_how_tos.py" not in note:
                make_config(TrainConfig, yaml.safe_load(text))
        for number, (_, text) in enumerate(find_blocks(page, "python"), 1):
            compile(text, f"{page.name}, block {number}", "exec")


def find_identifiers(page: Path) -> set[str]:
    """Return what the prose quotes and looks like a name in Python code; of `a.b`, `b`."""
    quoted = re.findall(r"`([A-Za-z_][\w.]*)(?:\([^`]*\))?`", read_prose(page))
    names = {name.split(".")[-1] for name in quoted}
    return {name for name in names if "_" in name or re.search("[a-z][A-Z]", name)}


# Names in the code of other libraries, and of a file.
OF_OTHERS = {
    "OpenAIEmbeddings", "OpenAILikeEmbedding", "HuggingFaceEmbedding", "HuggingFaceEmbeddings",
    "OpenAIEmbedding", "query_instruction",
    "SentenceTransformersTextEmbedder", "query_embeddings", "concatenate_datasets",
    "train_test_split", "id_rsa", "RN50x4__openai",
    "LlamaFlashAttention2", "MistralFlashAttention2", "GemmaFlashAttention2",
    "Qwen2FlashAttention2", "Phi3FlashAttention2", "_update_causal_mask", "ModuleNotFoundError",
}  # fmt: skip


def list_identifiers() -> set[str]:
    """Return every word of the code."""
    folders = ("modeling_llm2clip", "tests/helpers", "benchmarks", "examples")
    files = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return set(re.findall(r"\w+", "".join(path.read_text("utf-8") for path in files)))


def test_identifiers_in_the_prose_exist() -> None:
    missing = {name for page in PAGES for name in find_identifiers(page)} - list_identifiers()
    assert sorted(missing - OF_OTHERS) == []


def find_shell_commands() -> list[str]:
    """Return each command line of `llm2clip` on the pages, those behind a launcher included."""
    text = "".join(text for page in PAGES for _, text in find_blocks(page, "bash"))
    lines = re.sub(r" *\\\n\s*", " ", text).splitlines()
    commands = [command.strip() for line in lines for command in line.split("&&")]
    own = [re.sub(r"^accelerate launch .* -m modeling_llm2clip ", "llm2clip ", c) for c in commands]
    return sorted({command for command in own if command.startswith("llm2clip ")})


def find_usage_error(command: str) -> str | None:
    try:
        parse(LINE, shlex.split(command)[1:])
    except UsageError as error:
        return str(error)
    return None


def list_flags() -> set[str]:
    """Every spelling of every flag of `llm2clip`."""
    apps = (LINE[name] for name in LINE if not name.startswith("-"))
    arguments = (argument for app in apps for argument in app.assemble_argument_collection())
    return {name for argument in arguments for name in argument.names if name.startswith("--")}


def find_quoted_flags() -> dict[str, list[str]]:
    """Return the flags that the prose names, with their pages."""
    found: dict[str, list[str]] = {}
    for page in PAGES:
        for quoted in re.findall(r"`(--[a-z][^`]*)`", read_prose(page)):
            for flag in re.findall(r"--[a-z][\w-]*", quoted):
                found.setdefault(flag, []).append(page.relative_to(DOCS).as_posix())
    return {flag: pages for flag, pages in found.items() if flag not in OTHER_FLAGS}


def test_command_lines_parse() -> None:
    errors = {command: find_usage_error(command) for command in find_shell_commands()}
    assert {command: error for command, error in errors.items() if error} == {}


def test_flags_in_the_prose_exist() -> None:
    known = list_flags()
    assert {flag: pages for flag, pages in find_quoted_flags().items() if flag not in known} == {}


def test_flags_of_the_example_scripts_exist() -> None:
    text = "".join(text for page in PAGES for _, text in find_blocks(page, "bash"))
    commands = re.findall(r"(examples/\S+\.py) (.*)", re.sub(r" *\\\n\s*", " ", text))
    assert commands
    for script, rest in commands:
        sources = "".join(path.read_text("utf-8") for path in (ROOT / script).parent.glob("*.py"))
        flags = re.findall(r"--[a-z][\w-]*", rest)
        assert [flag for flag in flags if f'"{flag}"' not in sources] == [], script


def find_used_names() -> set[str]:
    """Return what the Python blocks take from the package itself."""
    text = "".join(text for page in PAGES for _, text in find_blocks(page, "python"))
    imported = re.findall(r"^from modeling_llm2clip import (.+)$", text, re.MULTILINE)
    names = {name.strip() for line in imported for name in line.split(",")}
    return names | set(re.findall(r"\bllm2clip\.(\w+)", text))


def test_names_of_the_package_exist() -> None:
    assert sorted(find_used_names() - set(modeling_llm2clip.__all__)) == []


def read_table(page: str, heading: str, *, column: int = 0) -> set[str]:
    """Return what is between backticks in one column of the first table below a heading."""
    section = (DOCS / page).read_text("utf-8").split(f"# {heading}\n")[1]
    match = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)
    assert match, f"{page} has no table below {heading!r}"
    rows = [line.strip("| ").split(" | ") for line in match[0].splitlines()[2:]]
    return {word for row in rows for word in re.findall(r"`([^`]+)`", row[column])}


def test_tables_list_every_extra_field_task_and_dataset() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert read_table("installation.md", "Installation") == set(setup["options.extras_require"])
    assert read_table("data-formats.md", "Fields") == KNOWN_FIELDS
    assert read_table("evaluate.md", "Tasks") == set(TASKS)
    found = read_table("evaluate.md", "Datasets", column=1)
    assert found == {spec.name for spec in list_datasets()}


def test_the_build_page_has_every_prompt() -> None:
    section = (DOCS / "build.md").read_text("utf-8").split("## The prompt\n")[1].split("\n## ")[0]
    assert set(PROMPT_NAMES) <= set(re.findall(r"`(?:--prompt )?([\w-]+)`", section))


def test_the_conversion_page_has_every_source_format() -> None:
    section = (DOCS / "convert.md").read_text("utf-8").split("## Source formats\n")[1]
    heads = next(line for line in section.splitlines() if line.startswith("|"))
    assert set(re.findall(r"`([\w-]+)`", heads)) == set(LAYOUTS)


def test_the_page_of_the_doctor_has_every_check(tmp_path: Path) -> None:
    page = (DOCS / "publish-and-doctor.md").read_text("utf-8")
    listed = re.findall(r"^\| ([^|]+) \| ", page.split("# Check a model\n")[1], re.MULTILINE)
    names = {name.strip() for cell in listed for name in cell.split(",")}
    # Of an empty folder every check is reported, most of them as skipped.
    assert {check.name for check in check_model(tmp_path).checks} - {"folder"} <= names
    assert {plan.name for plan in server_checks._PLANNED} <= names


@pytest.mark.slow
def test_python_blocks_run(tmp_path: Path) -> None:
    """On tiny models with few steps: this only shows that the calls are valid."""
    assert run_blocks(tmp_path) == {}


def run_blocks(folder: Path) -> dict[str, str]:
    """Run the Python blocks of README and all pages; return the errors by page and block."""
    blocks = [
        (f"{page.relative_to(ROOT).as_posix()}, block {number}", shorten(text))
        for page in [ROOT / "README.md", *PAGES]
        for number, (note, text) in enumerate(find_blocks(page, "python"), 1)
        if not note
    ]
    make_what_readers_have(folder)
    done = subprocess.run(
        [sys.executable, "-c", RUN_BLOCKS], cwd=folder, input=json.dumps(blocks),
        capture_output=True, text=True, timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    failed: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return failed


def shorten(source: str) -> str:
    return re.sub(r"max_steps=[\d_]+", "max_steps=2", source)


def make_what_readers_have(folder: Path) -> None:
    """Write the models, images and captions that the pages name."""
    for name in ("llm2clip-demo", "aligned"):
        export_tiny_model(folder / name / "model")
    tiny_images()[0].save(folder / "llm2clip-demo" / "search.png")
    save_tiny_vision(folder / "openai" / "clip-vit-large-patch14-336")
    save_tiny_llm(folder / "meta-llama" / "Llama-3.2-1B-Instruct")
    for name in ("my-images", "other-images"):
        save_captioned_squares(folder / name, count=120)  # a batch of 64 needs as many groups


@pytest.fixture(scope="module")
def site() -> Path:
    zensical = shutil.which("zensical", path=str(Path(sys.executable).parent))
    if zensical is None:
        pytest.skip('needs pip install -e ".[docs]"')
    done = subprocess.run(["make", "docs"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "griffe:" not in done.stdout + done.stderr
    return ROOT / "site"


@pytest.mark.slow
def test_the_site_builds_in_strict_mode(site: Path) -> None:
    home = re.sub("<[^>]+>", "", (site / "index.html").read_text("utf-8"))
    assert "pip install" in home


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_code_fits_on_a_desktop_and_scrolls_on_a_phone(width: str, site: Path) -> None:
    size = dict(zip(("width", "height"), WIDTHS[width], strict=True))
    pages = sorted(site.glob("*/index.html")) + sorted(site.glob("reference/*/index.html"))
    assert len(pages) > 15
    with open_browser() as browser:
        page = browser.new_page(viewport=size)
        for path in (site / "index.html", *pages):
            page.goto(path.as_uri(), wait_until="domcontentloaded")
            assert not overflows(page), path
            cut, hidden = page.evaluate(MEASURE_CODE)
            assert hidden == 0, path  # what is wider than its box can be scrolled to
            assert cut == 0 or size["width"] < 1280, path


def test_coding_agents_can_find_the_skill() -> None:
    # The rules of the Agent Skills format: agents see name and description before they open it.
    file = DOCS / "skills" / "llm2clip" / "SKILL.md"
    _, front, body = file.read_text("utf-8").split("---\n", 2)
    fields = yaml.safe_load(front)
    assert fields["name"] == file.parent.name and re.fullmatch("[a-z0-9-]{1,64}", fields["name"])
    assert 100 < len(fields["description"]) <= 1024
    # Copied alone into a project, it must stand without the pages beside it.
    assert "](" not in body and len(body.splitlines()) < 120
