"""The code in `docs/contributing` does what the pages say, as the files that they name."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from published_datasets import (
    captions_by_image,
    errors_of,
    write_images,
    write_json_lines,
    write_own_folder,
)

import modeling_llm2clip
from modeling_llm2clip.cli.command import make_line, parse
from modeling_llm2clip.evaluation.datasets.dataset_registry import (
    READERS,
    load_dataset,
    read_specs,
)
from modeling_llm2clip.evaluation.datasets.retrieval_dataset import RetrievalDataset
from modeling_llm2clip.heads_llm2clip import LogitRule
from modeling_llm2clip.training.losses.loss import LOSSES, LossInputs, load_loss

HOW_TOS = Path(__file__).parent.parent / "docs" / "contributing"


def read_modules(page: str) -> list[str]:
    """Return the Python blocks of a page that are whole modules, in their order."""
    blocks = re.findall(r"^( *)```python\n(.*?)^ *```$", (HOW_TOS / page).read_text("utf-8"),
                        re.DOTALL | re.MULTILINE)  # fmt: skip
    sources = [re.sub(f"^{indent}", "", text, flags=re.MULTILINE) for indent, text in blocks]
    return [source for source in sources if source.startswith('"""')]


class Package:
    """The package with files of a reader in it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        self._monkeypatch = monkeypatch

    def add(self, name: str, source: str) -> ModuleType:
        """Import a module as if its file were in the package, such as `cli.count`."""
        parent = importlib.import_module(f"{modeling_llm2clip.__name__}.{name.rpartition('.')[0]}")
        folder = self._folder / name.rpartition(".")[0]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name.rpartition('.')[2]}.py").write_text(source, encoding="utf-8")
        self._monkeypatch.setattr(parent, "__path__", [*parent.__path__, str(folder)])
        importlib.invalidate_caches()
        return importlib.import_module(f"{modeling_llm2clip.__name__}.{name}")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Package]:
    known = set(sys.modules)
    folder = tmp_path / "package"
    yield Package(folder, monkeypatch)
    for name in set(sys.modules) - known:
        if (sys.modules[name].__file__ or "").startswith(str(folder)):
            parent, _, child = name.rpartition(".")
            delattr(sys.modules[parent], child)
            del sys.modules[name]


def test_the_loss_is_loaded_by_its_name(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = read_modules("add-a-loss.md")
    package.add("training.losses.cosine", source)
    page = (HOW_TOS / "add-a-loss.md").read_text("utf-8")
    found = re.search(r'`"(\w+)": \("(\w+)", "(\w+)"\),`', page)
    assert found is not None
    monkeypatch.setitem(LOSSES, found[1], (found[2], found[3]))
    images = torch.nn.functional.normalize(torch.randn(4, 8), dim=-1)
    same = LossInputs(images, images, LogitRule(torch.ones(1)), torch.arange(4))
    opposite = same._replace(text_embeds=-images)
    for chunk_size in (None, 2):
        cosine = load_loss("cosine", chunk_size=chunk_size)
        # Of rows of unit length, to float32's rounding.
        assert cosine(same).item() == pytest.approx(0, abs=1e-6)
        assert cosine(opposite).item() == pytest.approx(2, abs=1e-6)


def test_the_command_counts_the_captions_of_a_folder(
    package: Package, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, command = read_modules("add-a-command.md")
    package.add("configs.count_config", config)
    count = package.add("cli.count", command).count
    line = make_line([count], description="", version="0", examples=("llm2clip count images",))
    folder = write_own_folder(tmp_path / "my-images")
    for least, wanted in ((1, 6), (8, 2)):  # "eine Katze" and "ein Hund" have 8 and more
        parse(line, ["count", str(folder), "--min-length", str(least)])()
        assert capsys.readouterr().out == f"{wanted}\n"
    with pytest.raises(ValueError, match="--min-length 0: Input should be greater"):
        parse(line, ["count", str(folder), "--min-length", "0"])


def read_entry() -> str:
    """Return the entry of the page on datasets."""
    page = (HOW_TOS / "add-a-dataset.md").read_text("utf-8")
    (entry,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    return str(entry)


def test_a_dataset_in_a_known_format_is_one_entry(tmp_path: Path) -> None:
    spec = read_specs(read_entry())["my-captions"]
    spec = replace(spec, counts={"images": 2, "captions": 3})
    write_images(tmp_path, ["a.jpg", "b.jpg"])
    lines = [{"file_name": "a.jpg", "captions": ["one", "uno"]},
             {"file_name": "b.jpg", "captions": ["two"]}]  # fmt: skip
    write_json_lines(tmp_path / "captions.jsonl", lines)
    found = load_dataset(spec, tmp_path)
    assert isinstance(found, RetrievalDataset)
    assert captions_by_image(found) == {"a.jpg": ["one", "uno"], "b.jpg": ["two"]}
    write_json_lines(tmp_path / "captions.jsonl", [*lines, {"captions": ["three"]}])
    error = "no image name, or captions that are not strings"
    assert errors_of(spec, tmp_path) == {error: 1}


def test_the_dataset_is_read_and_its_errors_are_counted(
    package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source,) = read_modules("add-a-dataset.md")
    module = package.add("evaluation.datasets.my_captions", source)
    monkeypatch.setitem(READERS, "tsv", module.read_tsv)
    entry = re.sub(r"  read:\n.*", "  read: tsv\n", read_entry(), flags=re.DOTALL)
    spec = replace(read_specs(entry)["my-captions"], counts={"images": 2, "captions": 2})
    write_images(tmp_path, ["a.jpg", "b.jpg"])
    (tmp_path / "captions.tsv").write_text("a.jpg\tone\nb.jpg\ttwo\n", encoding="utf-8")
    found = load_dataset(spec, tmp_path)
    assert isinstance(found, RetrievalDataset)
    assert found.image_names == ("a.jpg", "b.jpg")
    assert found.captions == ("one", "two")
    (tmp_path / "captions.tsv").write_text("a.jpg\tone\nb.jpg two\n", encoding="utf-8")
    assert errors_of(spec, tmp_path)["no tab"] == 1
