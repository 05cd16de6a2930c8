"""Laws of the configuration: it saves every field, and rejects missing and misspelled ones."""

from __future__ import annotations

import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig

from modeling_llm2clip import LLM2CLIPConfig
from modeling_llm2clip.configuration_llm2clip import FORMAT_VERSION

OTHER_THAN_DEFAULT: dict[str, Any] = {
    "projection_dim": 24,
    "text_width": 40,
    "bidirectional": False,
    "text_pooling": "last_token",
    "prompt_prefix_ids": [1, 5, 6],
    "prompt_suffix_ids": [7, 2],
    "prompt_suffix_ends_special": True,
    "max_text_length": 40,
    "instructions": {"query": "Find: "},
    "normalize_text_before_adapter": False,
    "text_adapter_layers": 1,
    "text_adapter_expansion": 3,
    "vision_pooling": "cls",
    "visual_projection_bias": True,
    "logit_scale_init_value": 1.5,
    "random_heads": ["text_adapter"],
}


def vision_config(**settings: Any) -> CLIPVisionConfig:
    return CLIPVisionConfig(hidden_size=32, num_attention_heads=4, image_size=32, **settings)


def text_config(**settings: Any) -> LlamaConfig:
    return LlamaConfig(hidden_size=48, num_attention_heads=4, vocab_size=100, **settings)


def build(**settings: Any) -> LLM2CLIPConfig:
    return LLM2CLIPConfig(vision_config(), text_config(), **settings)


@pytest.fixture
def saved() -> dict[str, Any]:
    """Content of the config.json of a model in which no field has its default."""
    content: dict[str, Any] = json.loads(build(**OTHER_THAN_DEFAULT).to_json_string())
    return content


@pytest.mark.parametrize("load", [LLM2CLIPConfig.from_pretrained, AutoConfig.from_pretrained])
def test_every_field_survives_saving_and_loading(load: Any, tmp_path: Path) -> None:
    before = build(**OTHER_THAN_DEFAULT)
    before.save_pretrained(tmp_path)
    after = load(tmp_path)
    assert type(after) is LLM2CLIPConfig
    for name, value in OTHER_THAN_DEFAULT.items():
        assert getattr(after, name) == value, name
    assert after.format_version == 1  # of one vision tower, which older versions load
    assert type(after.vision_config) is CLIPVisionConfig
    assert type(after.text_config) is LlamaConfig
    assert (after.vision_config.hidden_size, after.text_config.hidden_size) == (32, 48)
    assert after.text_config.is_causal is True
    after.save_pretrained(tmp_path / "again")
    first, second = (folder / "config.json" for folder in (tmp_path, tmp_path / "again"))
    assert first.read_text(encoding="utf-8") == second.read_text(encoding="utf-8")


def test_a_misspelled_field_is_refused_and_an_unknown_one_kept_with_a_warning(
    saved: dict[str, Any], tmp_path: Path
) -> None:
    for name, meant in (("text_pool", "text_pooling"), ("projection_dims", "projection_dim")):
        with pytest.raises(ValueError, match=rf"'{name}' for '{meant}'"):
            build(**{name: "mean"})
        with pytest.raises(ValueError, match=rf"'{name}' for '{meant}'"):
            LLM2CLIPConfig.from_dict({**saved, name: "mean"})
    with pytest.warns(UserWarning, match=r"no fields \['unsloth_version'\].*kept"):
        config = LLM2CLIPConfig.from_dict({**saved, "unsloth_version": "1"})
    config.pretraining_tp = 1
    with pytest.warns(UserWarning, match=r"no fields \['pretraining_tp', 'unsloth_version'\]"):
        config.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config.save_pretrained(tmp_path)
        loaded = LLM2CLIPConfig.from_pretrained(tmp_path)
    assert (loaded.pretraining_tp, loaded.unsloth_version) == (1, "1")


@pytest.mark.parametrize(
    ("version", "remedy"),
    [
        (FORMAT_VERSION + 1, "Upgrade modeling_llm2clip"),
        *((version, "Restore") for version in (0, None, "1", True)),
    ],
)
def test_a_newer_or_unknown_format_is_refused_with_the_remedy(
    saved: dict[str, Any], version: Any, remedy: str
) -> None:
    saved["format_version"] = version
    error = rf"format_version={version!r}.*formats 1 to.*{remedy}"
    with pytest.raises(ValueError, match=error) as refused:
        LLM2CLIPConfig.from_dict(saved)
    assert ("Restore" in str(refused.value)) is (remedy == "Restore")


def test_an_older_format_is_read_through_each_later_migration(
    saved: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def name_pooling(content: dict[str, Any]) -> dict[str, Any]:
        content = {**content, "text_pooling": content["pooling_before"]}
        del content["pooling_before"]
        return content

    def double_width(content: dict[str, Any]) -> dict[str, Any]:
        return {**content, "text_adapter_expansion": 2 * content["text_adapter_expansion"]}

    module = sys.modules[LLM2CLIPConfig.__module__]
    monkeypatch.setattr(module, "_MIGRATIONS", (name_pooling, double_width))
    monkeypatch.setattr(module, "FORMAT_VERSION", 3)
    monkeypatch.setattr(module, "_ONE_TOWER_FORMAT", 3)
    monkeypatch.setitem(module._TYPES, "format_version", ("3", lambda value: value == 3))
    saved["format_version"], saved["pooling_before"] = 1, saved.pop("text_pooling")
    for version, expansion in ((1, 6), (2, 6), (3, 3)):
        content = {**saved, "format_version": version}
        if version > 1:
            content["text_pooling"] = content.pop("pooling_before")
        (tmp_path / "config.json").write_text(json.dumps(content), encoding="utf-8")
        config = LLM2CLIPConfig.from_pretrained(tmp_path)
        assert (config.text_pooling, config.format_version) == ("last_token", 3)
        assert config.text_adapter_expansion == expansion


def test_missing_fields_are_named_and_not_replaced_by_defaults(saved: dict[str, Any]) -> None:
    for field in OTHER_THAN_DEFAULT:
        rest = {name: value for name, value in saved.items() if name != field}
        with pytest.raises(ValueError, match=rf"lacks \['{field}'\]"):
            LLM2CLIPConfig.from_dict(rest)
    for field in ("text_pooling", "projection_dim"):
        del saved[field]
    del saved["text_config"]["is_causal"]
    all_three = r"lacks \['projection_dim', 'text_pooling', 'text_config.is_causal'\]"
    with pytest.raises(ValueError, match=all_three):
        LLM2CLIPConfig.from_dict(saved)


def test_a_saved_file_that_is_refused_is_named(tmp_path: Path, saved: dict[str, Any]) -> None:
    llm, tower = saved["text_config"], saved["vision_config"]
    for content in (
        json.dumps({**saved, "random_heads": 1}),
        json.dumps({**saved, "dtype": "abc"}),
        json.dumps({**saved, "text_pooling": []}),
        json.dumps({**saved, "text_config": {**llm, "model_type": []}}),
        json.dumps({**saved, "text_config": {**llm, "id2label": -1}}),
        json.dumps({**saved, "vision_config": {**tower, "hidden_size": "x"}}),
        "9" * 5000,
        "[" * 100_000,
        '"1"',
        "[]",
    ):
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
        with pytest.raises((ValueError, OSError), match=f"{tmp_path}.*") as refused:
            LLM2CLIPConfig.from_pretrained(tmp_path)
        assert "config.json" in str(refused.value)


def test_rotary_positions_have_no_default(saved: dict[str, Any]) -> None:
    rotary = saved["text_config"].pop("rope_parameters")
    with pytest.raises(ValueError, match=r"lacks \['text_config.rope_parameters'\]"):
        LLM2CLIPConfig.from_dict(saved)
    saved["text_config"]["rope_theta"] = rotary["rope_theta"]  # as transformers 4 wrote it
    assert LLM2CLIPConfig.from_dict(saved).text_config.rope_parameters == rotary


@pytest.mark.parametrize("field", ["vocab_size_per_layer_input", "layer_rope_theta"])
def test_per_layer_vocabularies_and_rotary_bases_may_be_large(
    field: str, saved: dict[str, Any]
) -> None:
    """Gemma 3n and 4 have 262,144 tokens in a table for each layer."""
    saved["text_config"][field] = 500_000
    assert getattr(LLM2CLIPConfig.from_dict(saved).text_config, field) == 500_000


@pytest.mark.parametrize("bidirectional", [True, False])
def test_the_attention_direction_reaches_the_llm_and_is_not_contradicted(
    bidirectional: bool, saved: dict[str, Any]
) -> None:
    assert build(bidirectional=bidirectional).text_config.is_causal is not bidirectional
    llm = text_config(is_causal=bidirectional)
    error = rf"bidirectional={bidirectional} contradicts text_config.is_causal={bidirectional}"
    with pytest.raises(ValueError, match=error):
        LLM2CLIPConfig(vision_config(), llm, bidirectional=bidirectional)
    saved["bidirectional"] = saved["text_config"]["is_causal"] = bidirectional
    with pytest.raises(ValueError, match=error):
        LLM2CLIPConfig.from_dict(saved)


def test_all_invalid_values_are_named_at_once() -> None:
    with pytest.raises(ValueError) as caught:
        build(
            projection_dim=0, text_adapter_layers=-1, text_adapter_expansion=0,
            text_pooling="median", vision_pooling="sum", prompt_prefix_ids=[1, 2, 3],
            prompt_suffix_ids=[4], max_text_length=4,
        )  # fmt: skip
    for error in (
        "projection_dim=0 must be at least 1",
        "text_adapter_layers=-1 must be at least 0",
        "text_adapter_expansion=0 must be at least 1",
        "text_pooling='median' must be one of",
        "vision_pooling='sum' must be one of",
        "max_text_length=4 leaves no room for a caption: the prompt alone has 4 tokens",
    ):
        assert error in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("projection_dim", "24", "an integer"),
        ("projection_dim", 24.0, "an integer"),
        ("max_text_length", None, "an integer"),
        ("text_adapter_layers", True, "an integer"),
        ("bidirectional", "false", "true or false"),
        ("normalize_text_before_adapter", 0, "true or false"),
        ("visual_projection_bias", None, "true or false"),
        ("prompt_prefix_ids", None, "a list of token ids"),
        ("prompt_suffix_ids", "72", "a list of token ids"),
        ("prompt_suffix_ids", [7, "2"], "a list of token ids"),
        ("prompt_suffix_ids", [-1], "a list of token ids"),
        ("instructions", {"query": " \n"}, "a dictionary of strings, none of them only whitespace"),
        ("random_heads", ["text_model"], "a list with items from"),
        ("random_heads", None, "a list with items from"),
        ("logit_scale_init_value", "1.5", "a finite number"),
        ("logit_scale_init_value", float("nan"), "a finite number"),
        ("text_pooling", None, "one of"),
        ("vision_pooling", 1, "one of"),
    ],
)
def test_a_field_of_the_wrong_type_is_named_with_its_value(
    saved: dict[str, Any], field: str, value: Any, wanted: str
) -> None:
    error = rf"{field}={re.escape(repr(value))} must be {wanted}"
    with pytest.raises(ValueError, match=error):
        LLM2CLIPConfig.from_dict(saved, **{field: value})  # as `from_pretrained` overrides it
    saved[field] = value
    with pytest.raises(ValueError, match=error):
        LLM2CLIPConfig.from_dict(saved)


def test_an_overridden_field_takes_effect_and_is_checked(saved: dict[str, Any]) -> None:
    direction = not saved["bidirectional"]
    config = LLM2CLIPConfig.from_dict(saved, bidirectional=direction, text_pooling="last_token")
    assert (config.bidirectional, config.text_pooling) == (direction, "last_token")
    assert config.text_config.is_causal != direction
    with pytest.raises(ValueError, match="max_text_length=1 leaves no room"):
        LLM2CLIPConfig.from_dict(saved, max_text_length=1, return_unused_kwargs=True)
    with pytest.raises(ValueError, match=r"format_version=True must be .* 1 to 2, the current"):
        LLM2CLIPConfig.from_dict(saved, format_version=True)


def test_numpy_integers_are_accepted_as_ids() -> None:
    config = build(prompt_prefix_ids=np.array([1, 5]).tolist(), prompt_suffix_ids=[np.int64(2)])
    assert json.loads(config.to_json_string())["prompt_suffix_ids"] == [2]


@pytest.mark.parametrize(
    ("tower", "right", "wrong"),
    [
        ("text_config", "rms_norm_eps", "rms_norm_epsi"),
        ("vision_config", "hidden_size", "hidden_sizee"),
    ],
)
def test_a_misspelled_field_of_a_tower_causes_a_warning(
    saved: dict[str, Any], tower: str, right: str, wrong: str
) -> None:
    saved[tower][wrong] = saved[tower].pop(right)
    with pytest.warns(UserWarning, match=rf"{tower} seems to misspell \['{wrong} for {right}'\]"):
        LLM2CLIPConfig.from_dict(saved)


@pytest.mark.parametrize(
    "model_type", ["dinov2", "dinov3_vit", "clip_vision_model", "siglip2_vision_model"]
)
def test_fields_that_transformers_saves_cause_no_warning(model_type: str) -> None:
    config = LLM2CLIPConfig(AutoConfig.for_model(model_type), text_config())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*seems to misspell")
        LLM2CLIPConfig.from_dict(json.loads(config.to_json_string()))


@pytest.mark.parametrize("tower", ["vision_config", "text_config"])
def test_towers_are_required_and_unknown_ones_named(saved: dict[str, Any], tower: str) -> None:
    saved[tower]["model_type"] = "tower-of-babel"
    with pytest.raises(ValueError, match=rf"{tower} has model_type='tower-of-babel'.*Upgrade"):
        LLM2CLIPConfig.from_dict(saved)
    del saved[tower]["model_type"]
    with pytest.raises(ValueError, match=rf"{tower} must be .* with 'model_type'"):
        LLM2CLIPConfig.from_dict(saved)
    towers = {"vision_config": vision_config(), "text_config": text_config(), tower: None}
    with pytest.raises(ValueError, match=rf"{tower} must be a transformers configuration"):
        LLM2CLIPConfig(**towers)  # type: ignore[arg-type]


def test_no_path_of_a_tower_is_written(tmp_path: Path) -> None:
    loaded: list[Any] = []
    for tower in (vision_config(), text_config()):
        tower.save_pretrained(tmp_path / tower.model_type)
        loaded.append(type(tower).from_pretrained(tmp_path / tower.model_type))
    LLM2CLIPConfig(*loaded).save_pretrained(tmp_path)
    content = (tmp_path / "config.json").read_text(encoding="utf-8")
    assert str(tmp_path) not in content and "_name_or_path" not in json.loads(content)


# What others set on a configuration


@pytest.mark.parametrize("name", ["bos_token_id", "eos_token_id", "pad_token_id"])
def test_a_token_id_set_by_a_trainer_is_saved_without_effect(name: str, tmp_path: Path) -> None:
    config = build()
    setattr(config, name, 7)
    config.save_pretrained(tmp_path)
    loaded = LLM2CLIPConfig.from_pretrained(tmp_path)
    assert getattr(loaded, name) == 7
    assert loaded.text_config.to_dict() == build().text_config.to_dict()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda config: setattr(config, "projection_dims", 32), "'projection_dims' for"),
        (lambda config: setattr(config, "text_pooling", "median"), "text_pooling='median'"),
        (lambda config: setattr(config, "max_text_length", "32"), "max_text_length='32'"),
        (lambda config: delattr(config, "projection_dim"), "projection_dim"),
        (
            lambda config: setattr(config.text_config, "is_causal", True),
            "contradicts text_config.is_causal",
        ),
        (lambda config: setattr(config, "instructions", {"query": object()}), "JSON"),
        (lambda config: setattr(config.text_config, "my_note", object()), "JSON"),
    ],
    ids=["misspelled", "value", "type", "lost", "direction", "object", "in a tower"],
)
def test_a_configuration_that_would_not_load_is_not_saved(
    change: Any, error: str, tmp_path: Path
) -> None:
    config = build(text_adapter_layers=1)
    config.save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    change(config)
    with pytest.raises(ValueError, match=error):
        config.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before


def test_an_extra_field_of_a_tower_is_saved_and_loaded(tmp_path: Path) -> None:
    config = build()
    config.text_config.my_note, config.vision_config.my_note = "a", "b"
    config.save_pretrained(tmp_path)
    loaded = LLM2CLIPConfig.from_pretrained(tmp_path)
    assert (loaded.text_config.my_note, loaded.vision_config.my_note) == ("a", "b")


@pytest.mark.parametrize("request_", ["output_hidden_states", "output_attentions"])
def test_hidden_states_are_requested_per_call_not_in_the_configuration(
    request_: str, saved: dict[str, Any]
) -> None:
    """Transformers sets them while it loads; an ignored one would give an output without them."""
    with pytest.raises(
        ValueError, match=rf"{request_}=True in .*Pass {request_}=True when you call"
    ):
        LLM2CLIPConfig.from_dict(saved, **{request_: True})
    with pytest.raises(ValueError, match=request_):
        LLM2CLIPConfig.from_dict({**saved, request_: True})
    config = LLM2CLIPConfig.from_dict(saved, **{request_: False})
    with pytest.raises(ValueError, match=request_):
        setattr(config, request_, True)
