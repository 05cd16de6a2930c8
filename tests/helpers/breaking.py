"""Ways to break a model folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from tiny import tiny_tokenizer
from torch import Tensor

from modeling_llm2clip.building.prompts import Prompt, write_prompt
from modeling_llm2clip.doctor.file_checks import check_config, check_processor, check_tokenizer
from modeling_llm2clip.doctor.forward_checks import check_loading
from modeling_llm2clip.doctor.model_report import Check, ModelReport, PlannedCheck
from modeling_llm2clip.doctor.model_under_test import ModelUnderTest

Break = Callable[[Path], None]
OTHER_TEXTS = (
    "blue green yellow purple orange", "mountain river forest lake island",
    "quickly slowly often never always", "north south east west between",
)  # fmt: skip


def find(report: ModelReport, name: str) -> Check:
    return next(check for check in report.checks if check.name == name)


def choose_checks(planned: Sequence[PlannedCheck[Any]], *names: str) -> tuple[Any, ...]:
    """Return the checks of these names and those that they need, in their order."""
    needed, chosen = set(names), []
    for check in reversed(planned):
        if check.name in needed:
            needed |= set(check.needs)
            chosen.insert(0, check)
    return tuple(chosen)


def edit_json(name: str, change: Callable[[dict[str, Any]], object]) -> Break:
    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        change(content)
        (folder / name).write_text(json.dumps(content), encoding="utf-8")

    return apply


def edit_weights(change: Callable[[dict[str, Tensor]], object]) -> Break:
    def apply(folder: Path) -> None:
        weights = {k: v.clone() for k, v in load_file(folder / "model.safetensors").items()}
        change(weights)
        weights = {name: weight.contiguous() for name, weight in weights.items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def update(name: str, **fields: Any) -> Break:
    return edit_json(name, lambda content: content.update(fields))


def set_config(**fields: Any) -> Break:
    return update("config.json", **fields)


def set_causal(value: bool | None, *, bidirectional: bool = True) -> Break:
    def change(config: dict[str, Any]) -> None:
        config["text_config"].pop("is_causal")
        config["text_config"].update({} if value is None else {"is_causal": value})
        config["bidirectional"] = bidirectional

    return edit_json("config.json", change)


def set_weight(name: str, change: Callable[[Tensor], Tensor]) -> Break:
    return edit_weights(lambda w: w.update({name: change(w[name])}))


def set_row(name: str, row: int, value: float) -> Break:
    return edit_weights(lambda w: w[name][row].fill_(value))


def rename_adapter_key(weights: dict[str, Tensor]) -> None:
    weights["text_adapter.blocks.0.first.weight"] = weights.pop("text_adapter.blocks.0.up.weight")


def take_other_tokenizer(*, vocabulary_size: int) -> Break:
    """Save another LLM's tokenizer under the checkpoint's own prompt ids."""

    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        prompt = Prompt(tuple(config["prompt_prefix_ids"]), tuple(config["prompt_suffix_ids"]))
        other = tiny_tokenizer(vocabulary_size=vocabulary_size, texts=OTHER_TEXTS)
        assert len(other) == vocabulary_size
        write_prompt(other, prompt, max_length=config["max_text_length"]).save_pretrained(folder)

    return apply


def append(name: str, text: str) -> Break:
    def apply(folder: Path) -> None:
        with (folder / name).open("a", encoding="utf-8") as file:
            file.write(text)

    return apply


def remove(name: str) -> Break:
    return lambda folder: (folder / name).unlink()


def drop_weights(folder: Path, part: str) -> None:
    """Remove the weights with this in their names."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    kept = {name: value for name, value in weights.items() if part not in name}
    assert len(kept) < len(weights)
    save_file(kept, file, metadata={"format": "pt"})


def truncate(name: str) -> Break:
    def apply(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return apply


def load_tested(folder: Path) -> ModelUnderTest:
    tested = ModelUnderTest(folder, "cpu")
    for check in (check_config, check_loading, check_tokenizer, check_processor):
        check(tested)
    return tested
