"""Options of the stages: conflicts, shared options, and options without a default."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest

from modeling_llm2clip import configuration_llm2clip
from modeling_llm2clip.configs.align_config import AlignConfig
from modeling_llm2clip.configs.build_config import (
    CHAT_TEMPLATE,
    PROMPT_NAMES,
    PROMPT_PRESETS,
    BuildConfig,
    TextPooling,
    VisionPooling,
)
from modeling_llm2clip.configs.config_fields import Config, make_config
from modeling_llm2clip.configs.evaluation_config import EvaluatedModel, EvaluationConfig
from modeling_llm2clip.configs.export_config import CardConfig, ExportConfig, SourceFormat
from modeling_llm2clip.configs.train_config import TrainConfig
from modeling_llm2clip.conversion.convert_checkpoint import convert_checkpoint
from modeling_llm2clip.conversion.layouts import LAYOUTS, find_layout

LEAST = {"vision_model": "embedded", "text_model": "embedded", "data": "images", "output": "runs"}
OTHER = {"license": "other", "license_name": "Mine", "license_link": "https://example.org"}
_PROMPT = "prompt=none cannot be combined with prompt_prefix"
_LICENSE = "license_name and license_link need license=other"


@pytest.mark.parametrize(
    ("config_type", "values", "message"),
    [
        (BuildConfig, {"prompt": "none", "prompt_prefix": ""}, _PROMPT),
        (BuildConfig, {"prompt": "none", "prompt_suffix": "x"}, _PROMPT),
        (
            SourceFormat,
            {"layout": "openai", "prompt_prefix": "x"},
            "cannot be combined with prompt_prefix",
        ),
        (CardConfig, {**OTHER, "license_link": None}, "license=other needs license_name and"),
        (CardConfig, {**OTHER, "license": None}, _LICENSE),
        # The name and the link could belong to different licenses.
        (CardConfig, {**OTHER, "license": "apache-2.0", "license_link": None}, _LICENSE),
        (CardConfig, {**OTHER, "license": "apache-2.0", "license_name": None}, _LICENSE),
        (CardConfig, {"license": "Apache 2.0"}, r"a Hub license id, like apache-2\.0"),
        (CardConfig, {"license": ""}, r"a Hub license id, like apache-2\.0"),
        (CardConfig, {"license": "MIT!"}, r"a Hub license id, like apache-2\.0"),
        (ExportConfig, {"max_shard_size": "5"}, "must be a size, like 5GB or 500MB"),
        (ExportConfig, {"max_shard_size": "0GB"}, "must be a size, like 5GB or 500MB"),
        (ExportConfig, {"max_shard_size": "5 GB"}, "must be a size, like 5GB or 500MB"),
        (ExportConfig, {"max_shard_size": "-1MB"}, "must be a size, like 5GB or 500MB"),
        (EvaluatedModel, {"source": "model", "name": "a/b"}, r"Choose one with NAME=model\."),
        (EvaluatedModel, {"source": "model", "name": ".hidden"}, r"Choose one with NAME=model\."),
        (EvaluationConfig, {"languages": ("de", "de")}, "languages has duplicates: de, de"),
        (
            AlignConfig,
            {"loss_precision": "tf32", "precision": "float32"},
            "loss_precision=tf32 cannot be combined with precision=float32",
        ),
        (TrainConfig, {**LEAST, "align": {"seed": 3}}, r"align\.seed=3 differs from seed=0\. Set"),
        (TrainConfig, {**LEAST, "align": {"max_step": 5}}, r"align: max_step is not an option\. D"),
    ],
)
def test_conflicting_options_are_refused(
    config_type: type[Config], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(config_type, values)


def test_compatible_options_are_accepted() -> None:
    CardConfig(**OTHER)
    SourceFormat(layout="openai", prompt=None, prompt_prefix="x")
    EvaluationConfig(skip_invalid=True, captions_only=True)
    assert EvaluatedModel(source="openai/clip-vit-base-patch16").name == "clip-vit-base-patch16"
    assert EvaluatedModel(source="a/b", name="ours").name == "ours"


def test_a_prompt_is_never_guessed() -> None:
    with pytest.raises(ValueError, match=r"Choose one of llama-3, .*never guessed"):
        BuildConfig().require_prompt()
    BuildConfig(prompt="none").require_prompt()
    BuildConfig(prompt_suffix="").require_prompt()


def test_the_choices_match_the_models() -> None:
    # The other text poolings are only for embedders.
    poolings = configuration_llm2clip.TEXT_POOLINGS.items()
    assert get_args(TextPooling) == tuple(n for n, p in poolings if not p.pools_prompt)
    assert get_args(VisionPooling) == configuration_llm2clip.VISION_POOLINGS
    assert PROMPT_NAMES == (*PROMPT_PRESETS, CHAT_TEMPLATE)


def test_class_names_can_be_a_file_a_list_or_a_mapping() -> None:
    assert EvaluationConfig(class_names="names.txt").class_names == Path("names.txt")  # type: ignore[arg-type]
    assert EvaluationConfig(class_names=["a", "b"]).class_names == ("a", "b")  # type: ignore[arg-type]
    assert EvaluationConfig(class_names={"n1": "a"}).class_names == {"n1": "a"}


def test_device_and_seed_of_a_recipe_apply_to_all_stages() -> None:
    values = {"device": "cpu", "seed": 7, "build": {"prompt": "chatml"}, "align": {"max_steps": 5}}
    config = make_config(TrainConfig, {**LEAST, **values})
    assert config.finetune is not None and config.export is not None
    stages = (config.build, config.finetune, config.extract, config.align, config.export)
    assert {stage.device for stage in (*stages, config.evaluate)} == {"cpu"}
    assert config.build.seed == config.finetune.seed == config.align.seed == 7
    assert config.build.prompt == "chatml" and config.align.max_steps == 5
    fewer = make_config(TrainConfig, {**LEAST, "finetune": None, "export": None})
    assert fewer.finetune is None and fewer.export is None and fewer.output == Path("runs")


def test_options_only_for_siglip2_are_refused_elsewhere_before_anything_is_read(
    tmp_path: Path,
) -> None:
    options: tuple[dict[str, Any], ...] = ({"activation": "gelu_tanh"}, {"image_size": 384})
    for layout, option in product(("openai", "hub_clip", "eva02"), options):
        with pytest.raises(ValueError, match=r"source format.*Remove it"):
            convert_checkpoint(
                tmp_path / "none.pt", tmp_path / "llm", tmp_path / "new",
                SourceFormat(layout=layout, **option),
            )  # fmt: skip


def test_every_layout_accepts_its_own_source_format_and_others_are_refused(tmp_path: Path) -> None:
    for source_format in (layout.source_format for layout in LAYOUTS.values()):
        assert find_layout(source_format).source_format == source_format
    assert LAYOUTS["siglip2"].source_format.preprocessing is None
    source_format = SourceFormat(layout="open_clip")
    with pytest.raises(ValueError, match=r"must be one of.*'siglip2'"):
        convert_checkpoint(tmp_path / "none.pt", tmp_path / "llm", tmp_path / "new", source_format)
