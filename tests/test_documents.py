"""What the documents promise is there: paths, snippets, commands, tables."""

from __future__ import annotations

import json
import re
import shlex
from functools import cache
from inspect import signature
from pathlib import Path

import pytest
from machine_paths import MACHINE_PATH
from tiny_folders import export_tiny_model, save_captioned_squares

from benchmarks.tables.render_tables import DOCUMENTS as TABLED
from benchmarks.tables.render_tables import NOT_RECORDED, RESULTS, render_document
from modeling_llm2clip.__main__ import LINE, main
from modeling_llm2clip.cli.command import parse
from modeling_llm2clip.configs.evaluation_config import EvaluationConfig

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
FOLDERS = [
    ROOT / name for name in ("modeling_llm2clip", "benchmarks", "conversion", "examples", "tests")
]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(p for folder in FOLDERS for p in folder.rglob("*.md"))])
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
# Folders that a reader makes (`model/` is what the demo writes), and Hub ids; the snippets find a
# tiny stand-in under each name, because transformers prefers a folder to the Hub.
MADE_BY_READERS = (
    "llm2clip-demo", "model", "my-model", "my-images", "tuned", "aligned", "fine-tuned", ".venv",
    "found",
)  # fmt: skip
VISION_ID = "openai/clip-vit-large-patch14-336"
HUB_OWNERS = ("microsoft", "meta-llama")  # what follows is a Hub id, not a path


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def find_blocks(document: Path, *languages: str) -> list[str]:
    """Return the fenced blocks of a document that are in one of the languages."""
    fenced = re.findall(r"^```(\w+)\n(.*?)^```", read(document), re.DOTALL | re.MULTILINE)
    return [block for language, block in fenced if language in languages]


def find_shell_commands() -> list[str]:
    lines = "".join(find_blocks(README, "bash")).splitlines()
    commands = [command.strip() for line in lines for command in line.split("&&")]
    return [command for command in commands if command.startswith("llm2clip ")]


def find_table_rows(document: Path, heading: str) -> list[list[str]]:
    section = read(document).split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [line.strip("| ").split(" | ") for line in lines[2:]]


def find_paths(text: str) -> list[str]:
    """Return what looks like a path between backticks: with a slash, or a file's ending."""
    quoted = re.findall(r"`([\w.-]+(?:/[\w.-]*)*)`", text)
    file_name = re.compile(r"[\w-]+\.(py|md|cfg|toml|ipynb)$")
    return [path for path in quoted if "/" in path or file_name.match(path)]


@cache
def list_file_names() -> frozenset[str]:
    files = [*ROOT.iterdir(), *(path for folder in FOLDERS for path in folder.rglob("*.*"))]
    return frozenset(path.name for path in files)


def is_there(path: str, document: Path) -> bool:
    if path.split("/")[0] in (*MADE_BY_READERS, *HUB_OWNERS) or path == VISION_ID:
        return True
    if "/" not in path:
        return path in list_file_names()
    return any((folder / path).exists() for folder in (document.parent, ROOT))


def test_every_link_leads_somewhere() -> None:
    links = [
        (document, link.split("#")[0])
        for document in DOCUMENTS
        for link in re.findall(r"\]\(([^)\s]+)\)", read(document))
        if "://" not in link and link[0] != "#"
    ]
    assert [pair for pair in links if not (pair[0].parent / pair[1]).exists()] == []


def test_every_path_between_backticks_exists() -> None:
    paths = [(document, path) for document in DOCUMENTS for path in find_paths(read(document))]
    assert paths and not is_there("tests/no_such.py", README)
    assert [pair for pair in paths if not is_there(pair[1], pair[0])] == []


def test_no_document_names_a_path_of_one_machine() -> None:
    assert [path for path in [*DOCUMENTS, *NOTEBOOKS] if MACHINE_PATH.search(read(path))] == []


def test_the_promises_on_security_are_short_name_flags_that_exist_and_are_linked() -> None:
    text = read(ROOT / "SECURITY.md")
    assert len(text.split()) < 500
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert headings == ["What is guaranteed", "What is not guaranteed", "How to report"]
    served = read(ROOT / "docs" / "serve.md")
    assert "`SECURITY.md`" in served
    assert all(flag in served for flag in re.findall(r"--[a-z-]+", text))


def test_every_row_of_the_change_table_names_a_file() -> None:
    rows = find_table_rows(ROOT / "ARCHITECTURE.md", "To change X, open Y")
    assert len(rows) > 10
    assert all(any((ROOT / path).is_file() for path in find_paths(row[1])) for row in rows)


def test_the_folder_list_names_every_folder_and_uploaded_file_of_the_package() -> None:
    rows = find_table_rows(ROOT / "ARCHITECTURE.md", "Layers")
    listed = {row[0].strip("`").rstrip("/") for row in rows}
    package = ROOT / "modeling_llm2clip"
    wanted = {path.parent for path in package.glob("*/__init__.py")} | {
        path for path in package.glob("*.py") if not path.stem.startswith("_")
    }
    assert {str(path.relative_to(ROOT)) for path in wanted} <= listed


def test_the_layers_match_the_linters() -> None:
    layers = read(ROOT / "setup.cfg").split("layers =\n")[1].split("\n\n")[0].splitlines()
    wanted = [layer.strip().replace("modeling_llm2clip.", "") for layer in layers if layer.strip()]
    section = read(ROOT / "ARCHITECTURE.md").split("## Layers\n")[1]
    found = re.search(r"```text\n(.*?)```", section, re.DOTALL)
    assert found is not None
    assert found[1].splitlines() == wanted


def test_the_readme_has_two_commands_to_try_and_all_its_commands_parse() -> None:
    lines = "".join(find_blocks(README, "bash")).splitlines()
    assert 'pip install -e ".[demo]" && llm2clip demo' in lines
    assert 'pip install -e ".[test]" && pytest' in lines
    for command in find_shell_commands():
        assert callable(parse(LINE, shlex.split(command)[1:])), command


def test_no_two_examples_of_the_readme_write_to_the_same_place() -> None:
    # A folder that is there is refused, so a reader who goes from top to bottom would be stopped.
    calls = [parse(LINE, shlex.split(command)[1:]) for command in find_shell_commands()]
    bound = [signature(call.func).bind(*call.args, **call.keywords).arguments for call in calls]
    written = [str(given["output"]) for given in bound if given.get("output") is not None]
    written += [str(given["config"].output) for given in bound
                if isinstance(given.get("config"), EvaluationConfig)]  # fmt: skip
    for snippet in find_blocks(README, "python"):
        written += re.findall(r'export_model\(.*"(.+)"\)', snippet)
    assert "my-model" in written
    assert sorted(written) == sorted(set(written))


@pytest.mark.slow
def test_the_readmes_training_commands_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What the first command makes of the demo's towers, which are fetched, and the demo itself.
    for name in ("my-model", "llm2clip-demo/model"):
        export_tiny_model(tmp_path / name)
    save_captioned_squares(tmp_path / "my-images", count=200)
    monkeypatch.chdir(tmp_path)
    commands = [line for line in read(README).splitlines() if line.startswith("llm2clip ")]
    recipe = commands[commands.index("llm2clip build embedded embedded my-model") + 1 :][:3]
    assert [shlex.split(command)[1] for command in recipe] == ["extract", "extract", "align"]
    guide = read(ROOT / "docs" / "train.md").splitlines()
    others = [
        next(line for line in guide if line.startswith(f"llm2clip {beginning} "))
        for beginning in (
            "extract llm2clip-demo/model my-images demo-captions",
            "extract llm2clip-demo/model my-images demo-images",
            "align llm2clip-demo/model",
            "finetune-llm",
        )
    ]
    for command in [*recipe, *others]:
        assert main(shlex.split(command)[1:]) == 0, command
    for folder in ("aligned", "fine-tuned"):
        assert main(["doctor", f"{folder}/model"]) == 0


def test_readme_and_site_show_every_command() -> None:
    documents = [README, *(ROOT / "docs").rglob("*.md")]
    blocks = "".join("".join(find_blocks(document, "bash", "console")) for document in documents)
    shown = set(re.findall(r"^llm2clip ([a-z][\w-]*)", blocks, re.MULTILINE))
    assert {name for name in LINE if not name.startswith("-")} <= shown


def test_the_readme_stays_short() -> None:
    assert len(read(README).splitlines()) <= 150


def test_the_readmes_snippet_names_the_package_first() -> None:
    # It runs with the blocks of the site, in whose process one import is enough.
    (snippet,) = find_blocks(README, "python")
    assert re.match(r"(import|from) modeling_llm2clip", snippet)


def test_the_tables_match_the_recorded_results() -> None:
    for document in TABLED:
        assert render_document(read(document), RESULTS) == read(document), document


def test_a_recorded_result_becomes_a_table(tmp_path: Path) -> None:
    report = {
        "seed": 0, "unseen_t2i_r1": 0.25, "unseen_t2i_r10": 0.5,
        "unseen_i2t_r1": 0.125, "chance_r1": 0.01, "seconds_after_download": 59.6,
        "peak_rss_gb": 2.04, "num_images": 30, "num_held_out": 6,
        "versions": {"torch": "2", "transformers": "5"},
    }  # fmt: skip
    other = {**report, "seed": 1, "unseen_t2i_r1": 0.75}
    (tmp_path / "demo.json").write_text(json.dumps([report, other]), encoding="utf-8")
    row = {
        "name": "plain", "captions_per_second": 10.0, "share_of_peak": 0.5, "peak_rss_gb": 1.0,
        "min_cosine": 1.0,
    }  # fmt: skip
    other_row = {
        "name": "other", "captions_per_second": 5.0, "share_of_peak": 0.25, "peak_rss_gb": 1.0,
    }  # fmt: skip
    speed = json.dumps({"rows": [row, other_row], "hardware": "two threads"})
    (tmp_path / "encoding_speed.json").write_text(speed, encoding="utf-8")
    tables = "".join(
        f"<!-- table: {name} -->\n<!-- end -->\n" for name in ("demo", "encoding_speed")
    )
    rendered = render_document(tables, tmp_path)
    assert "| 0 | 25.0 % | 50.0 % | 12.5 % | 1.0 % | 60 | 2.0 |\n" in rendered
    assert "| mean | 50.0 % | 50.0 % | 12.5 % | 1.0 % | 60 | 2.0 |\n" in rendered
    assert "| plain | 10.0 | 50% | 1.00 | 1.0000 |\n| other | 5.0 | 25% | 1.00 |  |\n" in rendered
    assert "torch 2, transformers 5." in rendered
    assert "Machine: two threads." in rendered
    assert NOT_RECORDED not in rendered
    assert render_document(rendered, tmp_path) == rendered


def test_a_missing_result_is_reported_as_missing(tmp_path: Path) -> None:
    text = read(README)
    assert render_document(text, tmp_path).count(NOT_RECORDED) == text.count("<!-- table:")


@pytest.mark.parametrize("text", ["<!-- table: other -->\n<!-- end -->", "<!-- table: demo -->\n"])
def test_an_unknown_or_endless_table_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"No table is called 'other'|no '<!-- end -->'"):
        render_document(text, tmp_path)
