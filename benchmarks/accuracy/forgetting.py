"""Forgetting: how alignment changes a dual encoder's classification and retrieval.

    python -m benchmarks.accuracy.forgetting emoji=FOLDER openclipart=FOLDER \\
        photographs=FOLDER --work WORK

A dual encoder of EfficientNet-Lite0 and all-MiniLM is trained on captions, keywords and categories
of all three datasets. Then it gets SmolLM2 as its text side, aligned on a part of them, half of the
first two and all of the last, whose captions name no categories: plainly, after the text side
inherited the dual encoder's own text embeddings, and so with the names of categories kept: all of
them, every second one, or all of them among other words. Held-out images of the first two are
classified by their category and found by their keywords, those of the last one by their captions.
Everything is repeated with the vision tower frozen and trained, and with several seeds; the dual
encoder is trained once.

Weight and sample of kept names are chosen first, with a frozen tower, on other held-out images: the
smallest weight within a standard error of the best score.
`--work` keeps everything, so that a second call goes on from there, and scores are written after
each run.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModel,
    AutoTokenizer,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
)

from benchmarks.accuracy.training_set_size import build_untrained
from benchmarks.shared.provenance import describe_run
from modeling_llm2clip import (
    AlignConfig,
    BuildConfig,
    EvaluationConfig,
    align,
    evaluate,
    extract,
    load_images,
    load_records,
)
from modeling_llm2clip.building.pretrained_towers import (
    EFFICIENTNET,
    MINILM,
    fetch_tower,
)
from modeling_llm2clip.building.vision_towers import load_vision_tower
from modeling_llm2clip.evaluation.encoders.auto import load_encoder
from modeling_llm2clip.heads_llm2clip import contrastive_loss
from modeling_llm2clip.training.alignment import kept_texts

IMAGE_SIZE, DIM = 128, 256
NUM_KEYWORDS = 6  # of a caption: longer ones cost most of the time
MOST_HELD_OUT = 200  # of a dataset, to test on and again to choose by
NUM_OTHERS = 1_000  # words among which names are kept, too
INHERIT = {"inherit_from": "teacher"}
CONDITIONS: dict[str, Mapping[str, Any]] = {
    "plain": {},
    "inheritance": INHERIT,
    "classes kept": {**INHERIT, "keep_texts": "image-folder=labeled"},
    "half of the classes kept": {**INHERIT, "keep_texts": "half.txt"},
    "names among 1,000 words": {**INHERIT, "keep_texts": "among.txt"},
}
TOWERS: dict[str, Mapping[str, Any]] = {
    "frozen": {"vision_training": "frozen"},
    "trained": {"vision_training": "full", "layer_decay": 1.0, "vision_learning_rate": 1e-4},
}
BEFORE = "before"
FOLDERS = ("all", "aligned", "chosen", "test", "labeled", "labeled-chosen")
CHOICE_SEED = 100  # which no other run has
# Of the score of a choice: 2.4 points of accuracy on 400 images, 1.7 of the mean R@1.
STANDARD_ERROR = 0.015
# Weights and samples of kept names to choose among; a weight of 0 is the inheritance alone.
CHOICES = (
    (0.0, 256), (0.3, 256), (1.0, 256), (3.0, 256), (10.0, 256), (30.0, 256), (1.0, 64),
)  # fmt: skip


@dataclass(frozen=True)
class TestImages:
    """Folders to measure a model on: labeled images, and captioned ones."""

    labeled: str
    captioned: str


TEST = TestImages("labeled", "test")
CHOICE = TestImages("labeled-chosen", "chosen")


def main() -> None:
    """Train, align and measure; write the scores after each run."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("data", nargs=3, metavar="NAME=FOLDER")
    parser.add_argument("--work", type=Path, required=True, help="keeps data, models and stores")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10, help="of the dual encoder")
    parser.add_argument("--steps", type=int, default=120, help="of each alignment")
    output = Path(__file__).parents[1] / "results" / "forgetting.json"
    parser.add_argument("--output", type=Path, default=output)
    arguments = parser.parse_args()
    work, steps = arguments.work, arguments.steps
    if not work.exists():
        write_data(dict(text.partition("=")[::2] for text in arguments.data), work)
    if not (work / "clip").exists():
        train_dual_encoder(work, epochs=arguments.epochs)
    prepare(work)
    record: dict[str, Any] = {
        **describe_run("torch", "transformers", "modeling_llm2clip"),
        "image_size": IMAGE_SIZE, "epochs": arguments.epochs, "steps": steps,
        "num_images": {name: count_images(work / name) for name in FOLDERS},
        "num_categories": len(list_categories(work / "labeled")),
        "num_queries": len(list_queries(work)[0]),
        "choices": [try_choice(work, *choice, steps=steps) for choice in CHOICES],
    }  # fmt: skip
    kept = [tried for tried in record["choices"] if tried["weight"]]
    best = max(tried["score"] for tried in kept)
    equal = [tried for tried in kept if tried["score"] >= best - STANDARD_ERROR]
    chosen = min(equal, key=lambda tried: tried["weight"])
    record["chosen"] = {name: chosen[name] for name in ("weight", "sample")}
    runs = [{"condition": BEFORE, "tower": None, "seed": None,
             **measure(work / "clip", work, TEST)}]  # fmt: skip
    for seed, condition, tower in product(range(arguments.seeds), CONDITIONS, TOWERS):
        options = {**CONDITIONS[condition], **TOWERS[tower], "seed": seed, "max_steps": steps}
        name = f"{condition.replace(' ', '-')}-{tower}-{seed}"
        folder = run_alignment(work, name, options, **record["chosen"])
        scores = measure(folder, work, TEST)
        runs.append({"condition": condition, "tower": tower, "seed": seed, **scores})
        record_of_all = json.dumps({**record, "runs": runs}, indent=2)
        arguments.output.write_text(f"{record_of_all}\n", "utf-8")
        print(json.dumps(runs[-1]), flush=True)


def try_choice(work: Path, weight: float, sample: int, *, steps: int) -> dict[str, float]:
    """Keep names with a frozen tower, and measure on images to choose by.

    The score is the mean of the accuracy and of the mean R@1 of both directions.
    """
    options = {
        **INHERIT, **TOWERS["frozen"], "seed": CHOICE_SEED, "max_steps": steps,
        "keep_texts": f"image-folder={CHOICE.labeled}",
    }  # fmt: skip
    name = f"choice-{weight}-{sample}"
    scores = measure(run_alignment(work, name, options, weight, sample), work, CHOICE)
    score = scores["accuracy"] / 2 + (scores["t2i_r1"] + scores["i2t_r1"]) / 4
    tried = {"weight": weight, "sample": sample, "score": score, **scores}
    print(json.dumps(tried), flush=True)
    return tried


def count_images(folder: Path) -> int:
    """Count the images below a folder."""
    return sum(1 for path in folder.rglob("*") if path.suffix in {".png", ".jpg"})


def write_data(sources: Mapping[str, str], work: Path) -> None:
    """Write folders of captioned images: all to train on, those of the last dataset, and held-out.

    Held-out images of the others go into a folder for each category. Half of all held-out images
    are to test on, the others to choose by.
    """
    lines: dict[str, list[dict[str, Any]]] = {name: [] for name in FOLDERS[:4]}
    keywords: dict[str, list[str]] = {}
    others: set[str] = set()
    for name, source in sources.items():
        captioned = [json.loads(line) for line in (Path(source) / "captions.jsonl").open("r")]
        captioned = [line for line in captioned if line.get("lang", "en") == "en"]
        random.Random(0).shuffle(captioned)
        for line in captioned:
            line["image"] = str((Path(source) / line["image"]).resolve())
        count = min(MOST_HELD_OUT, len(captioned) // 5)
        test, chosen = captioned[:count], captioned[count : 2 * count]
        trained = captioned[2 * count :]
        if name == list(sources)[-1]:
            lines["test"], lines["chosen"] = test, chosen
            lines["aligned"] += trained
            lines["all"] += trained
        else:
            keywords |= link_by_category(test, work / "labeled")
            link_by_category(chosen, work / "labeled-chosen")
            described = [add_keywords(line) for line in trained]
            lines["all"] += [add_category(line) for line in described]
            lines["aligned"] += described[::2]
            others |= {word for line in trained for word in list_short(line)}
    for name, chosen in lines.items():
        folder = work / name
        folder.mkdir(parents=True)
        text = [
            json.dumps({"image": link(Path(line["image"]), folder), "captions": line["captions"]})
            for line in chosen
        ]
        (folder / "captions.jsonl").write_text("\n".join(text) + "\n", encoding="utf-8")
    (work / "keywords.json").write_text(json.dumps(keywords), encoding="utf-8")
    write_names(work, others)


def write_names(work: Path, others: set[str]) -> None:
    """Write the categories to keep: every second one, and all of them among other words."""
    names = list_categories(work / "labeled")
    words = random.Random(0).sample(sorted(others - set(names)), NUM_OTHERS)
    for name, chosen in {"half": names[::2], "among": [*names, *words]}.items():
        (work / f"{name}.txt").write_text("\n".join(chosen) + "\n", encoding="utf-8")


def list_categories(folder: Path) -> list[str]:
    """List the names of the folders of a folder."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def list_short(line: Mapping[str, Any]) -> list[str]:
    """List the keywords of one or two words."""
    words = [word.strip().lower() for word in line.get("keywords", ())]
    return sorted({word for word in words if word and len(word.split()) <= 2})


def add_keywords(line: Mapping[str, Any]) -> dict[str, Any]:
    """Add the keywords to the captions, as texts of the web have them."""
    words = ", ".join(line.get("keywords", ())[:NUM_KEYWORDS])
    return {**line, "captions": [*line["captions"], *([words] if words else [])]}


def add_category(line: Mapping[str, Any]) -> dict[str, Any]:
    """Add the category to the captions: the dual encoder knows it, an alignment has to keep it."""
    return {**line, "captions": [*line["captions"], name_category(line)]}


def name_category(line: Mapping[str, Any]) -> str:
    """Return the category of an image in words."""
    category = str(line.get("subgroup") or line["category"]).rpartition("/")[2]
    return category.replace("-", " ").replace("_", " ")


def link_by_category(lines: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, list[str]]:
    """Link images into a folder for each category; return the short keywords of each."""
    keywords = {}
    for line in lines:
        place = folder / name_category(line)
        place.mkdir(parents=True, exist_ok=True)
        keywords[str(Path(place.name) / link(Path(line["image"]), place))] = list_short(line)
    return keywords


def link(image: Path, folder: Path) -> str:
    """Link an image under a name that says which dataset it is of."""
    name = "-".join(image.parts[-3:])
    (folder / name).symlink_to(image)
    return name


def train_dual_encoder(work: Path, *, epochs: int) -> None:
    """Train both towers and projections on all training images, and save them as one model."""
    torch.manual_seed(0)
    vision, image_processor, _ = load_vision_tower(fetch_tower(EFFICIENTNET))
    image_processor.size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor.do_center_crop = False
    vision.config.hidden_size = vision.config.num_features = vision.timm_model.num_features
    minilm = fetch_tower(MINILM)
    tokenizer, text = AutoTokenizer.from_pretrained(minilm), AutoModel.from_pretrained(minilm)
    tokenizer.model_max_length = 64
    model: Any = VisionTextDualEncoderModel(vision_model=vision, text_model=text)
    model.visual_projection = torch.nn.Linear(model.vision_embed_dim, DIM, bias=False)
    model.text_projection = torch.nn.Linear(model.text_embed_dim, DIM, bias=False)
    model.config.projection_dim = DIM
    records = load_records(work / "all")
    pixels = prepare_pixels(image_processor, [record.image for record in records])
    heads = [*model.visual_projection.parameters(), *model.text_projection.parameters()]
    towers = [*vision.parameters(), *text.parameters()]
    groups = [{"params": heads, "lr": 1e-3}, {"params": towers, "lr": 1e-4}]
    optimizer = torch.optim.AdamW([*groups, {"params": [model.logit_scale], "lr": 1e-3}])
    batches = len(records) // 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [1e-3, 1e-4, 1e-3], total_steps=epochs * batches
    )
    for epoch in range(epochs):
        order = torch.randperm(len(records))
        for rows in tqdm(order[: batches * 64].split(64), f"epoch {epoch}"):
            captions = [random.choice(records[row].captions) for row in rows.tolist()]
            inputs = tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
            logits = model(pixel_values=pixels[rows].float() / 127.5 - 1, **inputs).logits_per_image
            loss = contrastive_loss(logits)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch}: loss {loss.item():.3f}", flush=True)
    model.eval().save_pretrained(work / "clip")
    VisionTextDualEncoderProcessor(image_processor, tokenizer).save_pretrained(work / "clip")


def prepare_pixels(image_processor: Any, images: Sequence[Any]) -> Tensor:
    """Prepare images as the processor does, and keep them in 8 bits, (N, 3, H, W)."""
    parts = []
    for image in tqdm(images, "pixels"):
        inputs = image_processor(load_images(image), do_normalize=False, return_tensors="pt")
        parts.append((inputs["pixel_values"] * 255).round().byte())
    return torch.cat(parts)


def prepare(work: Path) -> None:
    """Build the model to align, and extract the embeddings that all runs share."""
    if not (work / "kept").exists():
        clip = str(work / "clip")
        build_untrained(work / "kept", BuildConfig(keep_projection=True), vision=clip)
    records = load_records(work / "aligned")
    extract(work / "kept", records, work / "captions", modality="text")
    extract(work / "kept", records, work / "images", modality="image")
    extract(work / "clip", records, work / "teacher", modality="text")


def run_alignment(
    work: Path, name: str, options: Mapping[str, Any], weight: float, sample: int
) -> Path:
    """Align, unless that is done; return the folder of the model."""
    options = dict(options)
    kept_texts.MOST_SAMPLED = sample
    stores: dict[str, Any] = {}
    if options["vision_training"] == "frozen":
        stores["image_store"] = work / "images"
    if "inherit_from" in options:
        stores["inherit_from"] = work / options.pop("inherit_from")
    if "keep_texts" in options:
        kind, _, place = options["keep_texts"].rpartition("=")
        options["keep_texts"] = f"{kind}={work / place}" if kind else str(work / place)
        options["keep_weight"] = weight
        stores["teacher"] = work / "clip"
    if not (work / name / "model").exists():
        # Nothing is held out: the dual encoder was trained on these images.
        align(
            work / "kept", load_records(work / "aligned"), work / name,
            AlignConfig(global_batch_size=64, held_out_ratio=0.0, **options),
            caption_store=work / "captions", resume=(work / name).exists(), **stores,
        )  # fmt: skip
    return work / name / "model"


def measure(model: Path, work: Path, images: TestImages) -> dict[str, float]:
    """Accuracy on labeled images, and R@1 of captions, images and short queries."""
    labeled = work / images.labeled
    config = EvaluationConfig(output=model.parent / f"scores-{model.name}")
    classified, found = evaluate(
        model, [f"image-folder={labeled}", str(work / images.captioned)], config
    )
    accuracies = classified.scores["top_1_of_class"]
    names = list_categories(labeled)
    parts = {"named": names[::2], "unnamed": names[1::2]}
    scores = {
        "accuracy": classified.scores["top_1"]["value"],
        **{name: average(accuracies, half, labeled) for name, half in parts.items()},
        "t2i_r1": found.scores["t2i"]["hit_rate_at_1"],
        "i2t_r1": found.scores["i2t"]["hit_rate_at_1"],
    }
    return {**scores, "short_queries": search(model, work)} if images is TEST else scores


def average(accuracies: Mapping[str, float], names: Sequence[str], folder: Path) -> float:
    """Average the accuracies of some categories over their images."""
    counts = {name: count_images(folder / name) for name in names}
    return sum(accuracies[name] * count for name, count in counts.items()) / sum(counts.values())


def list_queries(work: Path) -> tuple[list[str], dict[str, list[str]]]:
    """List the short keywords that are no category, and those of each held-out drawing."""
    keywords = json.loads((work / "keywords.json").read_text("utf-8"))
    names = set(list_categories(work / "labeled"))
    return sorted({word for words in keywords.values() for word in words} - names), keywords


def search(model: Path, work: Path) -> float:
    """Return the share of short queries whose first drawing has the query as a keyword."""
    queries, keywords = list_queries(work)
    encoder = load_encoder(model)
    texts = F.normalize(encoder.encode_texts(queries).embeds, dim=-1)
    files = [work / "labeled" / name for name in keywords]
    images = F.normalize(encoder.encode_images(files, names=list(keywords)), dim=-1)
    nearest = (texts @ images.T).argmax(dim=1).tolist()
    listed = list(keywords.values())
    is_right = [query in listed[row] for query, row in zip(queries, nearest, strict=True)]
    return sum(is_right) / len(is_right)


if __name__ == "__main__":
    main()
