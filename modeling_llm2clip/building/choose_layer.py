"""Measures which layer of an LLM makes the best last layer of a text tower.

Texts of the same meaning are to find each other: two captions of one image (caption retrieval
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
from transformers import CLIPVisionConfig

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
from .text_layers import all_layers
from .tower_checks import list_layers, measure_text_width, require_direction

# Numbers of all layers' states that one batch holds: 256 MiB of float32.
_MOST_NUMBERS = 2**26
# Language → number of an image → a text in it and another one, in the first language.
Pairs: TypeAlias = dict[str, dict[int, tuple[str, str]]]
# For each text whether its nearest one is its own, and the number of its image.
Hits: TypeAlias = tuple[Tensor, Tensor]
_MOST_TOKENS, _FEWEST_TOKENS = 4096, 256


@dataclass(frozen=True)
class LayerScore:
    """How well texts of the same meaning find each other, by the output of one layer.

    Attributes:
        layer: Number of the layer, from 1; `text_layers` of a model that ends with it.
        cra: Share of texts whose nearest text is their own; of several languages the mean.
        low: Lower end of its 95 % interval.
        high: Upper end.
        behind_low: Lower end of the 95 % interval of the best layer's score minus this one's, on
            the same texts. If it is not above 0, the two do not differ.
        behind_high: Upper end.
        compute: Share of the layers' weights, and so of their work, that a model of it has.
    """

    layer: int
    cra: float
    low: float
    high: float
    behind_low: float
    behind_high: float
    compute: float


@dataclass(frozen=True)
class LayerChoice:
    """Scores of all layers of an LLM.

    Attributes:
        scores: One for each layer, from the first.
        num_pairs: Images whose texts were compared, by language; images without a pair are not.
        num_texts: Different texts that were encoded.
        num_truncated: Number of them that were truncated.
    """

    scores: tuple[LayerScore, ...]
    num_pairs: Mapping[str, int]
    num_texts: int
    num_truncated: int

    @property
    def best(self) -> LayerScore:
        """The layer with the highest score, of equal ones the lowest."""
        return max(self.scores, key=lambda one: (one.cra, -one.layer))

    @property
    def lowest_alike(self) -> LayerScore:
        """The lowest layer that does not differ from the best."""
        return next(one for one in self.scores if one.behind_low <= 0)

    def __str__(self) -> str:
        """Show a line per layer."""
        lines = [f"{'layer':>5} {'compute':>7} {'CRA':>6}  95 % interval   behind the best"]
        for one in self.scores:
            mark = "  no difference" if one.behind_low <= 0 else ""
            lines.append(
                f"{one.layer:5} {one.compute:7.0%} {one.cra:6.1%}  {one.low:5.1%} to {one.high:5.1%}"
                f"  {one.behind_low:5.1%} to {one.behind_high:5.1%}"
                f"{'  best' if one is self.best else mark}"
            )
        return "\n".join(lines)


def choose_layer(
    text: TextSource, data: Sequence[CaptionedImage], config: ChooseLayerConfig
) -> LayerChoice:
    """Measure the embeddings that each layer of an LLM gives, as the last one of a text tower.

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
        CLIPVisionConfig(),  # of no use
        text_model.config,
        tokenizer,
        BuildConfig(**shared, projection_dim=1, text_adapter_layers=0),
        text_width=measure_text_width(text_model),
    )
    model = LLM2CLIPTextModel(model_config, text_model).eval()
    require_direction(text_model, bidirectional=config.bidirectional)
    model.to(find_device(config.device))  # type: ignore[arg-type]
    processor = LLM2CLIPProcessor(None, tokenizer, config.max_text_length)
    flat = (one for of_lang in pairs.values() for pair in of_lang.values() for one in pair)
    row_of = {one: row for row, one in enumerate(dict.fromkeys(flat))}
    texts = TokenizedTexts(processor, row_of)
    with all_layers(text_model) as num_layers:
        model_config.text_width *= num_layers
        budget = min(max(_MOST_NUMBERS // model_config.text_width, _FEWEST_TOKENS), _MOST_TOKENS)
        embeds = TorchEncoder(model, processor).encode_texts(
            texts, project=False, token_budget=budget, show_progress=True
        )
    hits = [_find_hits(part, pairs, row_of) for part in embeds.chunk(num_layers, dim=1)]
    weights = [sum(p.numel() for p in layer.parameters()) for layer in list_layers(text_model)]
    scores = _compare(hits, [part / sum(weights) for part in accumulate(weights)])
    return LayerChoice(
        scores=tuple(scores),
        num_pairs={lang: len(of_lang) for lang, of_lang in pairs.items()},
        num_texts=len(texts),
        num_truncated=texts.num_truncated,
    )


def _list_pairs(records: RecordTable, config: ChooseLayerConfig) -> Pairs:
    """Choose images, and of each two different texts of the same meaning."""
    keys = records.group_keys
    groups = np.unique(keys)
    if len(groups) > config.num_images:
        sample = np.random.default_rng(config.seed).choice(
            groups, config.num_images, replace=False
        )
        records = records.select(np.flatnonzero(np.isin(keys, sample)))
    texts: dict[str, dict[str, list[str]]] = {}
    for record in records:
        of_group = texts.setdefault(record.group_id, {})
        of_group.setdefault(record.lang, []).extend((*record.captions, *record.long_captions))
    found = sorted({lang for group in texts.values() for lang in group})
    first, *others = config.languages or sorted(found, key=lambda lang: lang != "en")
    pairs: Pairs = {}
    for lang in others or [first]:
        pairs[lang] = {}
        for number, group in enumerate(texts.values()):
            for own in group.get(lang, ())[:1]:
                same = [one for one in group.get(first, ()) if one != own]
                pairs[lang].update({number: (own, one) for one in same[:1]})
        if len(pairs[lang]) < 2:
            raise ValueError(
                f"{counted(len(pairs[lang]), 'image')} of {len(texts)} have a text in {lang} and "
                f"another one in {first}; two are needed. The languages are {', '.join(found)}. "
                "Give images with two captions, or with captions in several languages."
            )
    return pairs


def _find_hits(embeds: Tensor, pairs: Pairs, row_of: Mapping[str, int]) -> list[Hits]:
    """Find for each language which texts are nearest to their own, and the images of them."""
    found = []
    for of_lang in pairs.values():
        rows = [row_of[pair[side]] for side in (0, 1) for pair in of_lang.values()]
        found.append((hits_at(rank_pairs(embeds[rows]).i2t, k=1), torch.tensor([*of_lang])))
    return found


def _compare(hits: Sequence[Sequence[Hits]], compute: Sequence[float]) -> list[LayerScore]:
    """Score the hits of each layer, and compare them with those of the best one."""
    found = [mean_of_means_with_interval(of_layer) for of_layer in hits]
    best = max(range(len(found)), key=lambda row: found[row]["value"])  # of equal ones the first
    scores = []
    for row, of_layer in enumerate(hits):
        behind = mean_of_means_with_interval(
            [(most - own, images) for (most, images), (own, _) in zip(hits[best], of_layer, strict=True)]
        )
        cra = (found[row][name] for name in ("value", "low", "high"))
        scores.append(LayerScore(row + 1, *cra, behind["low"], behind["high"], compute[row]))
    return scores
