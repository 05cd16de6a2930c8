"""The card of a model folder: what it states, and that the Hub's own parser reads the same."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from evaluating import save_scores
from huggingface_hub import EvalResult, ModelCard
from interruptions import largest_file
from shared_models import shared_model
from tiny import tiny_images, tiny_model

from modeling_llm2clip.configs.export_config import CardConfig, ExportConfig
from modeling_llm2clip.model_folders import model_card
from modeling_llm2clip.model_folders.model_card import (
    CardData,
    CardResult,
    find_license,
    read_card_data,
    read_card_of_trained,
    read_edited_card,
    relicense,
    update_card_data,
    write_model_card,
)
from modeling_llm2clip.model_folders.model_writing import save_model
from modeling_llm2clip.publishing.export_model import add_card_results, export_model

COUNT = {"count": "8 images, 16 texts"}
STATED = CardData(
    license="cc-by-nc-4.0",
    vision_license="mit",
    text_license="llama3.2",
    training_data=("owner/images", "my own photographs"),
    language=("en", "zh"),
    results=(
        CardResult(
            "retrieval", "COCO", {"t2i_r1": 0.5, "i2t_r1": 0.625},
            intervals={"t2i_r1": (0.25, 0.75)}, count=COUNT["count"],
        ),
        CardResult("zero-shot", "ImageNet", {"top1": 0.75}),
    ),
)  # fmt: skip


def push_card(folder: Path, *, license: str, name: str) -> None:
    """Write the card as a push does."""
    write_model_card(folder, relicense(read_edited_card(folder), license), name=name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, processor = tiny_model()
    model.config.vision_config._name_or_path = "openai/clip-vit-large-patch14-336"
    model.config.text_config._name_or_path = "my-llm"  # a folder, not a Hub id
    return save_model(
        model, processor, tmp_path_factory.mktemp("card") / "model", card=STATED, name="owner/name"
    )


@pytest.fixture(scope="module")
def card(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def test_the_hubs_parser_and_this_package_read_the_card_back(card: ModelCard, folder: Path) -> None:
    assert card.data.eval_results == [
        EvalResult(task, data, data, name, value, dataset_args=count, metric_args=interval)
        for task, data, name, value, count, interval in (
            ("retrieval", "COCO", "t2i_r1", 0.5, COUNT, {"interval_95": [0.25, 0.75]}),
            ("retrieval", "COCO", "i2t_r1", 0.625, COUNT, None),
            ("zero-shot", "ImageNet", "top1", 0.75, None, None),
        )
    ]
    assert card.data.model_name == "owner/name"
    assert read_card_data(folder) == STATED
    assert "| vision tower `openai/clip-vit-large-patch14-336` | mit |" in card.text
    assert "| language model `my-llm` | llama3.2 |" in card.text
    # The Hub refuses a base model that is not a Hub id.
    assert card.data.base_model == ["openai/clip-vit-large-patch14-336"]
    assert card.data.base_model_relation == "finetune"  # two alone would be a merge
    # A pair that the Hub knows; the tags list the model under both libraries.
    assert (card.data.library_name, card.data.pipeline_tag) == (
        "transformers", "zero-shot-image-classification",
    )  # fmt: skip
    assert {"transformers", "sentence-transformers"} <= set(card.data.tags)
    assert card.data.language == ["en", "zh"]
    assert card.data.license == "cc-by-nc-4.0"
    assert card.data.datasets == ["owner/images"]
    assert "owner/images, my own photographs" in card.text


def test_the_card_describes_what_is_in_the_folder(card: ModelCard) -> None:
    model, _ = shared_model()
    count = sum(parameter.numel() for parameter in model.parameters())
    for line in (
        "one shared space of 32 dimensions",
        "| vision tower | `clip_vision_model`, 21.9 k parameters |",
        "| images | 32 × 32 pixels, mean [0.48145466, 0.4578275, 0.40821073], ",
        r"| prompt | `'<\|begin\|><\|start_header_id\|>user<\|end_header_id\|>\n\n'` text ",
        "| texts | at most 32 tokens, including the prompt |",
        f"| weights | {count / 1000:.1f} k parameters, float32 |",
        "| retrieval | COCO | 8 images, 16 texts | t2i_r1 | 0.5 | 0.25 to 0.75 |",
        "| retrieval | COCO | 8 images, 16 texts | i2t_r1 | 0.625 |  |",
        "| zero-shot | ImageNet | not stated | top1 | 0.75 |  |",
        'SentenceTransformer(\n    "owner/name",\n    trust_remote_code=True,',
    ):
        assert line in card.text, line
    assert "$" not in card.text


def test_the_card_of_an_unknown_model_says_so(tmp_path: Path) -> None:
    model, processor = tiny_model(bidirectional=False)
    folder = save_model(model, processor, tmp_path / "plain")
    card = ModelCard.load(folder / "README.md")
    assert card.data.license is None and card.data.base_model is None
    assert card.data.eval_results is None
    for line in (
        "No license is stated for these weights.",
        "| vision tower (name not recorded) | not recorded |",
        "## Scores\n\nNone recorded.",
        "## Training data\n\nNot recorded.",
        "causal, pooling `mean`",
        'SentenceTransformer(\n    "plain",',
    ):
        assert line in card.text, line


def test_the_snippet_of_the_card_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The snippet names the model as on the Hub; a folder of that name comes first.
    monkeypatch.chdir(folder.parent)
    (folder.parent / "owner").mkdir()
    (folder.parent / "owner" / "name").symlink_to(folder)
    image = folder.parent / "path" / "to" / "image.png"
    image.parent.mkdir(parents=True)
    tiny_images(1)[0].save(image)
    text = (folder / "README.md").read_text(encoding="utf-8")
    snippet = text.split("```python\n")[1].split("```")[0]
    assert "modeling_llm2clip" not in snippet
    exec(compile(snippet, "README.md", "exec"), {})
    assert re.match(r"tensor\(\[\[.*, .*\]\]\)", capsys.readouterr().out)


def test_the_package_is_named_only_with_an_address_to_install_it_from(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    texts = []
    for address in (None, "https://e.org/repository"):
        monkeypatch.setattr(model_card, "ADDRESS", address)
        write_model_card(copy, STATED, name="owner/name")
        texts.append((copy / "README.md").read_text(encoding="utf-8"))
    without, named = texts
    assert "modeling_llm2clip" not in without and "llm2clip " not in without
    command = "pip install git+https://e.org/repository\nllm2clip doctor owner/name\n"
    assert without.index("trust_remote_code") < named.index(command)


@pytest.mark.parametrize(
    ("langs", "codes"), [(("en", "de-AT", "zh-Hant"), ("en", "de", "zh")), (("emoji-names",), ())]
)
def test_the_languages_of_the_captions_are_stated_as_the_hubs_codes(
    langs: tuple[str, ...], codes: tuple[str, ...], folder: Path
) -> None:
    assert read_card_of_trained(folder, ["more"], langs).language == (
        *STATED.language, *(code for code in codes if code not in STATED.language),
    )  # fmt: skip


# Edited and not


def test_a_card_that_nobody_edited_gets_license_and_name(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    push_card(copy, license="mit", name="me/other")
    assert read_card_data(copy) == replace(STATED, license="mit")
    text = (copy / "README.md").read_text(encoding="utf-8")
    assert 'SentenceTransformer(\n    "me/other"' in text and "These weights: mit." in text
    assert "owner/name" not in text


def edit_card(card: Path) -> None:
    """Write on a card what owners and the Hub's users do."""
    edited = ModelCard.load(card)
    edited.data.tags.append("emoji")
    edited.data.co2_eq_emissions = {"emissions": 5}
    edited.data.language = "de"
    for result in edited.data.eval_results:
        result.dataset_split, result.dataset_revision, result.verified = "test", "abc", True
        result.source_name, result.source_url = "ours", "https://e.org/scores"
    edited.text = edited.text.replace("## Limits\n", "## Limits\n\nMine.\n")
    edited.text = edited.text.replace(
        "## Scores\n", "## Thanks\n\nThese weights: gpl-3.0.\n\n## Scores\n"
    )
    edited.text = edited.text.replace("## Licenses\n", "## Licenses\n\nAsk us.\n")
    edited.save(card)


def test_a_card_with_an_edited_beginning_is_written_again_as_it_is(
    folder: Path, tmp_path: Path
) -> None:
    card = Path(shutil.copytree(folder, tmp_path / "copy")) / "README.md"
    card.write_text(card.read_text().replace("An LLM2CLIP model", "Our model"), encoding="utf-8")
    written = []
    for _ in range(2):
        push_card(card.parent, license="mit", name="me/other")
        written.append(card.read_text(encoding="utf-8"))
    assert written[0] == written[1] and "---\n\n# " in written[0]


@pytest.mark.parametrize("write", ["push", "export", "results"])
def test_edits_by_others_on_a_card_are_kept(write: str, folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    edit_card(copy / "README.md")
    before = ModelCard.load(copy / "README.md")
    if write == "push":
        push_card(copy, license="mit", name="me/other")
    elif write == "export":
        config = ExportConfig(license="mit")
        copy = export_model(copy, tmp_path / "new", config, name="me/other")
    else:
        add_card_results(copy, [save_scores(tmp_path / "new.json", {"r1": 0.125}, copy)])
    after, stated = ModelCard.load(copy / "README.md"), read_card_data(copy)
    kept = before.data.eval_results[2:] if write == "results" else before.data.eval_results
    assert [entry for entry in after.data.eval_results if entry.metric_value != 0.125] == kept
    assert stated.language == ("de",) and after.data.co2_eq_emissions == {"emissions": 5}
    assert after.data.tags == before.data.tags
    assert "## Limits\n\nMine.\n" in after.text
    order = [after.text.index(f"\n## {name}\n") for name in ("Training data", "Thanks", "Scores")]
    assert order == sorted(order)
    if write == "results":
        assert stated.license == "cc-by-nc-4.0" and "| r1 | 0.125 |" in after.text
    else:
        # What this package wrote, in an edited section, too, is of the new license and name.
        assert stated.license == "mit" and '"me/other"' in after.text
        assert "Ask us." in after.text and "These weights: mit." in after.text
        assert "## Thanks\n\nThese weights: gpl-3.0.\n" in after.text
        assert "cc-by-nc" not in after.text


def test_an_option_replaces_edits_by_others(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    edited = ModelCard.load(copy / "README.md")
    edited.data.base_model, edited.data.datasets = ["me/tower", "me/llm"], ["me/data"]
    edited.save(copy / "README.md")
    again = export_model(copy, tmp_path / "again")
    assert ModelCard.load(again / "README.md").data.datasets == ["me/data"]
    config = ExportConfig(base_models=("a/tower", "a/llm"), training_data=("a/data",))
    card = ModelCard.load(export_model(copy, tmp_path / "new", config) / "README.md")
    assert (card.data.base_model, card.data.datasets) == (["a/tower", "a/llm"], ["a/data"])


# Relicensed, and written whole or not at all

LLAMA = CardData(license="other", license_name="llama3", license_link="https://e.org/llama3")


@pytest.fixture
def llama(folder: Path, tmp_path: Path) -> Path:
    """A folder under a license that has a name and an address."""
    copy = Path(shutil.copytree(folder, tmp_path / "llama"))
    write_model_card(copy, LLAMA, name="owner/name")
    return copy


@pytest.mark.parametrize("is_edited", [False, True])
def test_a_new_license_drops_the_old_name_and_link_or_changes_nothing(
    is_edited: bool, llama: Path
) -> None:
    card = llama / "README.md"
    assert read_card_data(llama) == LLAMA
    assert "These weights: [llama3](https://e.org/llama3)." in card.read_text()
    if is_edited:
        card.write_text(card.read_text() + "\nMine.\n", encoding="utf-8")
    before = card.read_bytes()
    with largest_file(100), pytest.raises(OSError, match="File too large"):
        push_card(llama, license="apache-2.0", name="me/other")
    assert card.read_bytes() == before
    push_card(llama, license="apache-2.0", name="owner/name")
    assert read_card_data(llama) == CardData(license="apache-2.0")
    text = card.read_text()
    assert "llama3" not in text and "These weights: apache-2.0." in text
    assert ("Mine." in text) == is_edited


def test_a_license_edited_in_the_metadata_is_also_the_one_in_the_text(
    folder: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    edited = ModelCard.load(copy / "README.md")
    before = f"These weights: {edited.data.license}."
    assert before in edited.text
    edited.data.license = "gpl-3.0"
    edited.save(copy / "README.md")
    write_model_card(copy, read_edited_card(copy), name="model")
    text = ModelCard.load(copy / "README.md").text
    assert "These weights: gpl-3.0." in text
    assert before not in text


def test_an_export_under_a_new_license_drops_the_old_one() -> None:
    found = update_card_data(LLAMA, CardConfig(license="mit"))
    assert found == CardData(license="mit")
    named = CardConfig(license="other", license_name="ours", license_link="https://e.org/ours")
    assert update_card_data(LLAMA, named).license_name == "ours"
    assert update_card_data(LLAMA, CardConfig()) == LLAMA


def test_repeating_the_license_keeps_its_name_and_drops_leftovers() -> None:
    assert relicense(LLAMA, "other") == relicense(LLAMA, None) == LLAMA
    leftover = replace(LLAMA, license="apache-2.0")  # as older versions wrote it
    assert relicense(leftover, "apache-2.0") == CardData(license="apache-2.0")
    with pytest.raises(ValueError, match="needs license_name and license_link"):
        relicense(CardData(license="mit"), "other")


def test_unicode_line_breaks_in_a_name_survive_a_round_trip(llama: Path) -> None:
    """U+0085 becomes a space wherever it is written: YAML cannot have it outside of escapes."""
    stated = CardData(license="mit", training_data=("a\x85b", "c\u2028d"), kept_texts="1 (e\x85f)")
    write_model_card(llama, stated, name="name")
    card = read_card_data(llama)
    assert (card.training_data, card.kept_texts) == (("a b", "c\u2028d"), "1 (e f)")
    text = (llama / "README.md").read_text(encoding="utf-8")
    assert "a b, c\u2028d" in text
    write_model_card(llama, card, name="name")
    assert (llama / "README.md").read_text(encoding="utf-8") == text


def test_a_card_in_another_encoding_is_named(llama: Path) -> None:
    card = llama / "README.md"
    card.write_bytes(card.read_text(encoding="utf-8").encode("utf-16"))
    with pytest.raises(ValueError, match=r"README\.md: .*utf-8"):
        read_card_data(llama)


@pytest.mark.parametrize(
    ("metadata", "shown"),
    [
        ("training_data: 5", r"training_data=\(5,\) is not a string"),
        ("training_data: [a, {b: c}]", "is not a string"),
        ("license: [mit, apache-2.0]", r"license=\['mit', 'apache-2.0'\] is not a string"),
        ("caution: {a: b}", "caution=.* is not a string"),
        ("license: " + "[" * 5000, r"invalid metadata"),
    ],
)
def test_metadata_of_the_wrong_type_is_refused_with_the_cards_path(
    metadata: str, shown: str, tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"README\.md.*{shown}.*Correct the lines"):
        read_card_data(tmp_path)


def test_a_linked_card_is_replaced_and_its_target_kept(llama: Path) -> None:
    card, blob = llama / "README.md", llama.parent / "blob"
    card.rename(blob)  # as in huggingface_hub's cache
    card.symlink_to(blob)
    before = blob.read_bytes()
    push_card(llama, license="apache-2.0", name="me/other")
    assert blob.read_bytes() == before and not card.is_symlink()
    assert read_card_data(llama).license == "apache-2.0"


# Licenses of towers


@pytest.mark.parametrize(
    ("metadata", "license"),
    [
        ("license: mit", "mit"),
        ("license: [mit, apache-2.0]", "mit, apache-2.0"),
        ("license: other\nlicense_name: dinov3-license", "dinov3-license"),
        ("tags: [a]", None),
        ("license: [", None),
    ],
)
def test_a_towers_license_is_read_from_its_card(
    metadata: str, license: str | None, tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n# Tower\n", encoding="utf-8")
    (tmp_path / "llm.gguf").touch()
    assert find_license(tmp_path) == find_license(tmp_path / "llm.gguf") == license
    assert find_license(tmp_path / "without a card") is None
    assert find_license("owner/name") is None  # the tests are offline
