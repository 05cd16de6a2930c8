"""Where a checkpoint is, and which family it belongs to."""

from __future__ import annotations

import pytest
from converting import (
    FORMAT_OF,
    LLM,
    plan,
    save_checkpoint,
)

from modeling_llm2clip.conversion.source_checkpoint import (
    CheckpointSource,
    LLMSource,
    open_checkpoint,
    open_language_model,
    split_revision,
)


@pytest.mark.parametrize("family", FORMAT_OF)
@pytest.mark.parametrize("chosen", FORMAT_OF)
def test_keys_of_another_family(tmp_path, family, chosen) -> None:
    source = save_checkpoint(family, tmp_path)
    if family == chosen:
        assert plan(source, source_format=FORMAT_OF[chosen])
        return
    with pytest.raises(ValueError, match=f"of the family '{family}', the source format is for"):
        plan(source, source_format=FORMAT_OF[chosen])


def test_a_file_that_is_not_there(tmp_path) -> None:
    with pytest.raises(ValueError, match="no such folder, and no Hub id"):
        open_checkpoint(CheckpointSource(tmp_path / "c.pt"))
    with pytest.raises(ValueError, match=r"c\.pt: no such file"):
        open_checkpoint(CheckpointSource(tmp_path, file="c.pt"))
    with pytest.raises(ValueError, match="the weight file itself"):
        open_checkpoint(CheckpointSource(tmp_path))


def test_a_local_source_has_no_revision(tmp_path) -> None:
    file = save_checkpoint("openai", tmp_path)
    for source in (CheckpointSource(file, revision="deadbeef"),
                   CheckpointSource(tmp_path, file.name, "deadbeef")):  # fmt: skip
        with pytest.raises(ValueError, match="has no revision 'deadbeef'"):
            open_checkpoint(source)
    with pytest.raises(ValueError, match="has no revision 'deadbeef'"):
        open_language_model(LLMSource(LLM, "deadbeef"))


def test_the_revision_of_a_lora_follows_its_hub_id(tmp_path) -> None:
    assert split_revision("me/lora@abc") == ("me/lora", "abc")
    assert split_revision("me/lora") == ("me/lora", None)
    (tmp_path / "a@b").mkdir()
    assert split_revision(str(tmp_path / "a@b")) == (str(tmp_path / "a@b"), None)
    with pytest.raises(ValueError, match="no revision after its '@'"):
        split_revision("me/lora@")
    with pytest.raises(ValueError, match="has no revision 'abc'"):
        split_revision(f"{tmp_path}@abc")
