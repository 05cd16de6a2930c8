"""Measures which layer of a language model works best as the last layer of a text tower.

    python examples/scripts/choose_layer.py meta-llama/Llama-3.2-1B-Instruct my-images \\
        --prompt llama-3
    llm2clip build VISION_MODEL meta-llama/Llama-3.2-1B-Instruct my-model \\
        --prompt llama-3 --text-layers 11

The accuracy (CRA) of a layer is the share of texts whose nearest text among all images is their own
second caption. With captions in several languages, it is the share of captions whose nearest text
is their translation into the first language, averaged over languages. The layers are removed one by
one, starting with the last.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

import modeling_llm2clip as llm2clip
from modeling_llm2clip.building.tower_checks import list_layers
from modeling_llm2clip.encoding.devices import find_device
from modeling_llm2clip.encoding.encode import encode_texts
from modeling_llm2clip.evaluation.metrics.scores import hits_at, mean_of_means_with_interval
from modeling_llm2clip.evaluation.tasks.retrieval import rank_pairs


def main() -> None:
    """Print a line per layer, and the layer to use."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("text_model", help="Hub id, folder or .gguf file of a language model")
    parser.add_argument("data", help="captioned images, of which only the captions are read")
    parser.add_argument("--prompt", required=True, help="as in llm2clip build")
    parser.add_argument("--languages", nargs="+", default=[], help="default: all, English first")
    parser.add_argument("--num-images", type=int, default=1000)
    arguments = parser.parse_args()
    records = llm2clip.load_records(arguments.data, require_images=False)
    pairs = list_pairs(sample_images(records, arguments.num_images), arguments.languages)
    print("images by language:", {lang: len(texts) for lang, texts in pairs.items()})
    scores = measure_layers(arguments.text_model, pairs, prompt=arguments.prompt)
    for number, score in scores.items():
        cra, behind = (f"{s['low']:6.1%} to {s['high']:6.1%}" for s in score.values())
        print(f"layer {number:3}: CRA {score['cra']['value']:6.1%} ({cra}), behind by {behind}")
    lowest = next(n for n, score in scores.items() if score["behind"]["low"] <= 0)
    print(
        f"Layer {lowest} is the lowest that does not differ from the best: --text-layers {lowest}"
    )
    print("It was chosen on these captions, so expect a lower score on others.")


def sample_images(records: Sequence[Any], count: int) -> list[Any]:
    """Sample the records of some images."""
    groups = sorted({record.group_id for record in records})
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(0))
    chosen = {groups[number] for number in order[:count].tolist()}
    return [record for record in records if record.group_id in chosen]


def list_pairs(
    records: Iterable[Any], languages: Sequence[str] = ()
) -> dict[str, dict[int, tuple[str, str]]]:
    """List two texts of the same meaning for each image: language → number of the image → texts.

    In one language they are two captions; in others a caption and one in the first language.
    """
    texts: dict[str, dict[str, list[str]]] = {}
    for record in records:
        captions = texts.setdefault(record.group_id, {}).setdefault(record.lang, [])
        captions.extend((*record.captions, *record.long_captions))
    known = {lang for group in texts.values() for lang in group}
    first, *others = languages or sorted(known, key=lambda lang: (lang != "en", lang))
    pairs: dict[str, dict[int, tuple[str, str]]] = {}
    for lang in others or [first]:
        pairs[lang] = {}
        for number, group in enumerate(texts.values()):
            text = next(iter(group.get(lang, ())), None)
            other = next((c for c in group.get(first, ()) if c != text), None)
            if text is not None and other is not None:
                pairs[lang][number] = text, other
        if len(pairs[lang]) < 2:
            raise SystemExit(f"Fewer than two images have a text in {lang} and another in {first}.")
    return pairs


def measure_layers(
    text_model: Any, pairs: dict[str, dict[int, tuple[str, str]]], **options: Any
) -> dict[int, dict[str, dict[str, float]]]:
    """Measure each layer as the last one: its accuracy, and how far it is behind the best layer.

    Args:
        text_model: As of `join_towers`.
        pairs: As `list_pairs` returns.
        options: Of `BuildConfig`; a prompt is needed.
    """
    # Unused here, so as small as possible.
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        image_size=32, patch_size=16,
    )  # fmt: skip
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    config = llm2clip.BuildConfig(**options, projection_dim=8, text_adapter_layers=0)
    tower = (CLIPVisionModel(vision), images)
    model, processor = llm2clip.join_towers(tower, text_model, config)
    model.to(find_device("auto"))  # type: ignore[arg-type]
    texts = [p[side] for part in pairs.values() for side in (0, 1) for p in part.values()]
    layers, hits = list_layers(model.text_model), {}
    while layers:
        embeds = encode_texts(model, processor, texts, project=False)
        parts = zip(embeds.split([2 * len(p) for p in pairs.values()]), pairs.values(), strict=True)
        hits[len(layers)] = [
            (hits_at(rank_pairs(part).i2t, k=1), torch.tensor([*of_lang]))
            for part, of_lang in parts
        ]
        del layers[-1]
    hits = dict(sorted(hits.items()))
    cra = {number: mean_of_means_with_interval(of_layer) for number, of_layer in hits.items()}
    best = hits[max(cra, key=lambda number: (cra[number]["value"], -number))]
    return {
        number: {
            "cra": cra[number],
            "behind": mean_of_means_with_interval(
                [(most - hit, n) for (most, n), (hit, _) in zip(best, of_layer, strict=True)]
            ),
        }
        for number, of_layer in hits.items()
    }


if __name__ == "__main__":
    main()
