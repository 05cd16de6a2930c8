"""Measures which layer of an LLM makes the best last layer of a text tower.

Texts of the same meaning should find each other: two captions of one image (caption retrieval
accuracy, CRA), or a caption and its translation. One pass of the whole LLM gives the embeddings of
all layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig

from .._suggestions import counted
from ..configs.build_config import BuildConfig, ChooseLayerConfig, TextTowerConfig
from ..data.records.record_table import RecordTable
from ..data.records.records import CaptionedImage
from ..encoding.devices import find_device
from ..encoding.encode import TorchEncoder
from ..encoding.tokenized_texts import TokenizedTexts
from ..evaluation.metrics.scores import hits_at, mean_of_means_with_interval
from ..evaluation.tasks.retrieval import rank_pairs
from ..modeling_llm2clip import LLM2CLIPTextModel
from ..processing_llm2clip import LLM2CLIPProcessor
from .build_model import TextSource, configure_model, take_text_tower
from .part_loading import all_layers
from .tower_checks import list_layers, measure_text_width, require_direction

# Language → number of an image → a text in it and another one, in the first language.
Pairs: TypeAlias = dict[str, dict[int, tuple[str, str]]]
_TOKEN_BUDGET = 1024  # less than elsewhere, as a batch holds the states of all layers


@dataclass(frozen=True)
class LayerScore:
    """Score of one layer: texts of the same meaning find each other by its output.

    Attributes:
        layer: Number of the layer, from 1; `text_layers` of a model that ends with it.
        compute: Share of the layers' weights, and so of their work, that such a model has.
        cra: Share of texts whose nearest text is their own, the mean over languages: its `value`
            and 95 % interval, `low` and `high`.
        behind: The best layer's score minus this one's, on the same texts.
    """

    layer: int
    compute: float
    cra: dict[str, float]
    behind: dict[str, float]

    @property
    def is_alike(self) -> bool:
        """True unless it differs from the best layer with 95 % confidence."""
        return self.behind["low"] <= 0


@dataclass(frozen=True)
class LayerChoice:
    """Scores of all layers of an LLM.

    Attributes:
        scores: One for each layer, from the first.
        num_pairs: Images whose texts were compared, by language; images without a pair are not.
        num_texts: Texts that were encoded.
        num_truncated: Number of them that were truncated.
    """

    scores: tuple[LayerScore, ...]
    num_pairs: Mapping[str, int]
    num_texts: int
    num_truncated: int

    @property
    def best(self) -> LayerScore:
        """The layer with the highest score, of equal ones the lowest."""
        return max(self.scores, key=lambda score: (score.cra["value"], -score.layer))

    @property
    def lowest_alike(self) -> LayerScore:
        """The lowest layer that does not differ from the best."""
        return next(score for score in self.scores if score.is_alike)

    def __str__(self) -> str:
        """Show a line per layer, and a warning that the choice favors its own data."""
        lines = [f"{'layer':>5} {'compute':>7} {'CRA':>6}  95 % interval   behind the best"]
        for score in self.scores:
            line = f"{score.layer:5} {score.compute:7.0%} {score.cra['value']:6.1%}  "
            for of in (score.cra, score.behind):
                line += f"{of['low']:5.1%} to {of['high']:5.1%}  "
            alike = "no difference" if score.is_alike else ""
            lines.append(line + ("best" if score is self.best else alike))
        lines.append("These texts chose the best layer, so expect a lower score of it on others.")
        return "\n".join(lines)


def choose_layer(
    text: TextSource, data: Sequence[CaptionedImage], config: ChooseLayerConfig
) -> LayerChoice:
    """Measure the embeddings of each layer of an LLM, as the last layer of a text tower.

    Args:
        text: Hub id, folder or `.gguf` file of a language model, or a loaded LLM without its head
            and its tokenizer.
        data: Captioned images, of which only the captions are read.
        config: How the LLM becomes a text tower, and which texts are compared.

    Returns:
        The scores of all layers.

    Raises:
        ValueError: No prompt is chosen, fewer than two images have a pair of texts, the LLM cannot
            be made bidirectional, or its family computes more than a norm after its layers.
    """
    config.require_prompt()
    pairs = _list_pairs(RecordTable.from_records(data), config)
    text_model, tokenizer = take_text_tower(text, config)
    shared = {field.name: getattr(config, field.name) for field in fields(TextTowerConfig)}
    model_config, tokenizer = configure_model(
        CLIPVisionConfig(),  # of no use here, like the image processor
        text_model.config,
        tokenizer,
        BuildConfig(**shared, projection_dim=1, text_adapter_layers=0),
        text_width=measure_text_width(text_model),
    )
    model = LLM2CLIPTextModel(model_config, text_model)
    model.eval()  # type: ignore[no-untyped-call]
    require_direction(text_model, bidirectional=model_config.bidirectional)
    model.to(find_device(config.device))  # type: ignore[arg-type]
    processor = LLM2CLIPProcessor(CLIPImageProcessor(), tokenizer, model_config.max_text_length)
    texts = [pair[side] for of_one in pairs.values() for side in (0, 1) for pair in of_one.values()]
    tokenized = TokenizedTexts(processor, texts)
    with all_layers(text_model) as num_layers:
        model_config.text_width *= num_layers
        embeds = TorchEncoder(model, processor).encode_texts(
            tokenized, project=False, token_budget=_TOKEN_BUDGET, show_progress=True
        )
    images = [torch.tensor([*of_one]) for of_one in pairs.values()]
    hits = [
        [
            (hits_at(rank_pairs(rows).i2t, k=1), numbers)
            for rows, numbers in zip(part.split([2 * len(n) for n in images]), images, strict=True)
        ]
        for part in embeds.chunk(num_layers, dim=1)
    ]
    weights = [sum(p.numel() for p in layer.parameters()) for layer in list_layers(text_model)]
    return LayerChoice(
        scores=_compare(hits, [part / sum(weights) for part in accumulate(weights)]),
        num_pairs={lang: len(of_one) for lang, of_one in pairs.items()},
        num_texts=len(texts),
        num_truncated=tokenized.num_truncated,
    )


def _list_pairs(records: RecordTable, config: ChooseLayerConfig) -> Pairs:
    """Choose images, and two different texts of the same meaning for each."""
    keys = records.group_keys
    groups = np.unique(keys)
    if len(groups) > config.num_images:
        sample = np.random.default_rng(config.seed).choice(groups, config.num_images, replace=False)
        records = records.select(np.flatnonzero(np.isin(keys, sample)))
    texts: dict[str, dict[str, list[str]]] = {}
    for record in records:
        of_group = texts.setdefault(record.group_id, {})
        of_group.setdefault(record.lang, []).extend((*record.captions, *record.long_captions))
    languages = sorted({lang for group in texts.values() for lang in group})
    first, *others = config.languages or sorted(languages, key=lambda lang: lang != "en")
    pairs: Pairs = {}
    for lang in others or [first]:
        pairs[lang] = {}
        for number, group in enumerate(texts.values()):
            text = next(iter(group.get(lang, ())), None)
            other = next(
                (candidate for candidate in group.get(first, ()) if candidate != text), None
            )
            if text is not None and other is not None:
                pairs[lang][number] = (text, other)
        if len(pairs[lang]) < 2:
            raise ValueError(
                f"{counted(len(pairs[lang]), 'image')} of {len(texts)} have a text in {lang} and "
                f"another one in {first}; two are needed. The languages are "
                f"{', '.join(languages)}. Give images with two captions, or with captions in "
                "several languages."
            )
    return pairs


def _compare(
    hits: Sequence[Sequence[tuple[Tensor, Tensor]]], compute: Sequence[float]
) -> tuple[LayerScore, ...]:
    """Score the hits of each layer, by language and image, and compare with the best layer."""
    cra = [mean_of_means_with_interval(of_layer) for of_layer in hits]
    best = hits[max(range(len(cra)), key=lambda row: cra[row]["value"])]  # of equal ones the first
    scores = []
    for row, of_layer in enumerate(hits):
        pairs = zip(best, of_layer, strict=True)
        behind = mean_of_means_with_interval([(most - hit, n) for (most, n), (hit, _) in pairs])
        scores.append(LayerScore(row + 1, compute[row], cra[row], behind))
    return tuple(scores)
