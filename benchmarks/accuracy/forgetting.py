"""Forgetting: how alignment changes a dual encoder's classification and retrieval.

    python -m benchmarks.accuracy.forgetting emoji=FOLDER openclipart=FOLDER \\
        photographs=FOLDER --work WORK

A dual encoder of EfficientNet-Lite0 and all-MiniLM is trained on captions, keywords and categories
of all three datasets. Then its vision tower is trained with SmolLM2 on a part of them, half of the
first two and all of the last, whose captions name no categories: plainly, near its frozen self
(self-distillation), after the text side inherited the dual encoder's own text embeddings, and with
both. Beside them are the inherited text side alone, and weights between those before and after.
Held-out images of the first two are classified by their category, those of the last one are found
by their captions. Everything is repeated with several seeds; the dual encoder is trained once.
`--work` keeps it, so that a second call goes on from there, and scores are written after
each run.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
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
from modeling_llm2clip.configs.align_config import InterpolateConfig
from modeling_llm2clip.heads_llm2clip import contrastive_loss
from modeling_llm2clip.training.alignment.interpolate import interpolate

IMAGE_SIZE, DIM = 128, 256
NUM_KEYWORDS = 6  # of a caption: longer ones cost most of the time
MOST_HELD_OUT = 200  # of a dataset, to test on and again to choose by
NUM_OTHERS = 1_000  # words among which names are kept, too
DISTILL, INHERIT = {"distillation_weight": 1.0}, {"inherit_from": "teacher"}
CONDITIONS: dict[str, Mapping[str, Any]] = {
    "plain": {},
    "self-distillation": DISTILL,
    "inheritance alone": {**INHERIT, "max_steps": 0, "vision_training": "frozen"},
    "inheritance": INHERIT,
    "inheritance, self-distillation": {**INHERIT, **DISTILL},
}
BEFORE = "before"
FOLDERS = ("all", "aligned", "chosen", "test", "labeled", "labeled-chosen")


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
    work = arguments.work
    if not work.exists():
        write_data(dict(text.partition("=")[::2] for text in arguments.data), work)
    if not (work / "clip").exists():
        train_dual_encoder(work, epochs=arguments.epochs)
    prepare(work)
    runs = [{"condition": BEFORE, "seed": None, **measure(work / "clip", work)}]
    for seed in range(arguments.seeds):
        for condition in CONDITIONS:
            runs += run_condition(work, condition, seed, arguments.steps)
            record = {
                **describe_run("torch", "transformers", "modeling_llm2clip"),
                "image_size": IMAGE_SIZE, "epochs": arguments.epochs, "steps": arguments.steps,
                "num_images": {name: count_images(work / name) for name in FOLDERS},
                "num_categories": len(list((work / "labeled").iterdir())),
                "runs": runs,
            }  # fmt: skip
            arguments.output.write_text(f"{json.dumps(record, indent=2)}\n", "utf-8")
            print(json.dumps(runs[-2:], indent=2), flush=True)


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
        test, chosen, trained = captioned[:count], captioned[count : 2 * count], captioned[2 * count :]
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
    chosen = load_records(work / "chosen")
    extract(work / "kept", chosen, work / "chosen-captions", modality="text")
    extract(work / "clip", records, work / "teacher", modality="text")


def run_condition(work: Path, condition: str, seed: int, steps: int) -> list[dict[str, Any]]:
    """Align, go back some of the way, and measure both."""
    options = {"max_steps": steps, "vision_training": "full", **CONDITIONS[condition]}
    is_frozen = options["vision_training"] == "frozen"
    has_images = is_frozen or "distillation_weight" in options
    stores = {"image_store": work / "images"} if has_images else {}
    if "inherit_from" in options:
        stores["inherit_from"] = work / str(options.pop("inherit_from"))
    folder = work / f"{condition.replace(', ', '-').replace(' ', '-')}-{seed}"
    if not (folder / "model").exists():
        # Nothing is held out: the dual encoder was trained on these images.
        align(
            work / "kept", load_records(work / "aligned"), folder,
            AlignConfig(
                global_batch_size=64, seed=seed, held_out_ratio=0.0, layer_decay=1.0,
                vision_learning_rate=None if is_frozen else 1e-4, **options,
            ),
            caption_store=work / "captions", **stores,
        )  # fmt: skip
    after = {"condition": condition, "seed": seed, **measure(folder / "model", work)}
    if is_frozen:  # nothing is between
        return [after]
    shutil.rmtree(folder / "between", ignore_errors=True)
    between = interpolate(
        work / "kept", folder / "model", load_records(work / "chosen"), folder / "between",
        InterpolateConfig(num_shares=4, zero_shot=f"image-folder={work / 'labeled'}"),
        caption_store=work / "chosen-captions",
    )  # fmt: skip
    return [
        after,
        {
            "condition": f"{condition}, interpolated", "seed": seed,
            **measure(folder / "between", work), "share": between.chosen,
            "shares": {str(share): asdict(scores) for share, scores in between.scores.items()},
        },
    ]  # fmt: skip


def measure(model: Path, work: Path) -> dict[str, float]:
    """Accuracy on labeled images, and R@1 of held-out captions and images."""
    scores = {}
    for task, dataset in (
        ("classification", f"image-folder={work / 'labeled'}"), ("retrieval", str(work / "test")),
    ):  # fmt: skip
        config = EvaluationConfig(output=model.parent / f"scores-{model.name}-{task}")
        [result] = evaluate(model, dataset, config, tasks=[task])
        scores[task] = result.scores
    return {
        "accuracy": scores["classification"]["top_1"]["value"],
        "t2i_r1": scores["retrieval"]["t2i"]["hit_rate_at_1"],
        "i2t_r1": scores["retrieval"]["i2t"]["hit_rate_at_1"],
    }


if __name__ == "__main__":
    main()
