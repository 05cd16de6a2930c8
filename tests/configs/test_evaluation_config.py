"""Options of the evaluation: names of models, and what excludes what."""

from __future__ import annotations

from pathlib import Path

import pytest

from modeling_llm2clip.configs.evaluation_config import EvaluatedModel, EvaluationConfig


def test_a_model_is_named_by_the_last_part_of_its_source() -> None:
    assert EvaluatedModel(source="openai/clip-vit-base-patch16").name == "clip-vit-base-patch16"
    assert EvaluatedModel(source="a/b", name="ours").name == "ours"


@pytest.mark.parametrize("name", ["a/b", ".hidden"])
def test_a_name_that_makes_no_folder_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"Name it: NAME=model\."):
        EvaluatedModel(source="model", name=name)


def test_invalid_samples_can_be_left_out_only_where_images_are_checked() -> None:
    EvaluationConfig(skip_invalid=True, check_images=False, captions_only=True)
    with pytest.raises(ValueError, match="needs check_images=True"):
        EvaluationConfig(skip_invalid=True, check_images=False)


def test_a_language_is_given_once() -> None:
    with pytest.raises(ValueError, match=r"languages has a name twice: de, de\."):
        EvaluationConfig(languages=("de", "de"))


def test_class_names_are_a_file_names_or_a_mapping() -> None:
    assert EvaluationConfig(class_names="names.txt").class_names == Path("names.txt")  # type: ignore[arg-type]
    assert EvaluationConfig(class_names=["a", "b"]).class_names == ("a", "b")  # type: ignore[arg-type]
    assert EvaluationConfig(class_names={"n1": "a"}).class_names == {"n1": "a"}
