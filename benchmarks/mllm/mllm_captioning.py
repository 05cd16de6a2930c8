"""Caption loss of a multimodal LLM on a vision tower before and after its alignment.

    python -m benchmarks.mllm.mllm_captioning

A vision transformer with real weights (DINOv2-small, tuned for saliency) is aligned with captions
of the embedded emoji by SmolLM2-135M (fine-tuned on captions), the whole tower trained. Then
SmolLM2-135M-Instruct is trained on the original tower and on the aligned one, by both steps of
`examples/scripts/llava`: same images, steps and seeds. Neither step nor the alignment sees a
held-out thing, its images or its names.

| figure | what |
| --- | --- |
| `caption_loss` | nats per token of held-out names, given their images |
| `caption_loss_other_image` | the same, given the image of another held-out thing: what the
  LLM knows without seeing |
| `written` | names that the LLM wrote for held-out images |
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessor, LlavaProcessor

from benchmarks.mllm.dinov2_tower import DINOV2
from benchmarks.shared.provenance import describe_run
from modeling_llm2clip.building.build_model import join_towers
from modeling_llm2clip.building.pretrained_towers import SMOLLM2, fetch_tower
from modeling_llm2clip.building.vision_towers import load_vision_tower
from modeling_llm2clip.configs.align_config import AlignConfig
from modeling_llm2clip.configs.build_config import BuildConfig
from modeling_llm2clip.data.records.record_loading import find_example_data, load_records
from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.data.records.splits import split_records
from modeling_llm2clip.embedding.extract import extract
from modeling_llm2clip.encoding.encode import encode_images, encode_texts
from modeling_llm2clip.evaluation.metrics.correspondence import Correspondence
from modeling_llm2clip.evaluation.metrics.ranking import rank_retrieval
from modeling_llm2clip.evaluation.metrics.scores import hit_rate_at
from modeling_llm2clip.model_folders.model_writing import save_model
from modeling_llm2clip.modeling_llm2clip import LLM2CLIPModel
from modeling_llm2clip.processing_llm2clip import LLM2CLIPProcessor
from modeling_llm2clip.publishing.export_model import export_vision_tower
from modeling_llm2clip.training.alignment.align import align
from modeling_llm2clip.training.run_folder import read_results

# The recipes are scripts: their folder is not a package.
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "scripts" / "llava"))

from llava_batches import ConversationDataset, PadOnTheRight
from llava_conversations import PLACEHOLDER, Conversation, conversations_of_captions
from llava_model import (
    build_llava,
    find_tokens_of,
    load_llava,
    train_projector_and_llm,
    train_projector_only,
)
from llava_trainer import LlavaConfig, train_llava

TEMPLATE = Path(__file__).parents[2] / "examples" / "scripts" / "llava" / "vicuna.jinja"
QUESTION = f"{PLACEHOLDER}\nWhat does this image show?"
LORA_RANK, LORA_ALPHA = 16, 32
_EVALUATION_BATCH = 25


def main() -> None:
    """Align the tower, train every LLM, and write losses and captions."""
    arguments = _parse()
    torch.set_num_threads(arguments.threads)
    started = time.monotonic()
    records = [r for r in load_records(arguments.images) if r.lang == "en"]
    num_groups = len({record.group_id for record in records})
    trained, held_out = split_records(records, test_size=min(300, num_groups // 5), seed=0)
    tested = list({record.group_id: record for record in held_out}.values())
    tested = random.Random(0).sample(tested, min(arguments.tested, len(tested)))
    with tempfile.TemporaryDirectory(dir=arguments.work) as temporary:
        towers, alignment = _make_towers(Path(temporary), trained, tested, arguments)
        seconds_of_alignment = time.monotonic() - started
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in towers}
        for seed in arguments.seeds:
            for name, tower in towers.items():
                with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
                    run = _train(tower, trained, tested, Path(folder), seed, arguments)
                runs[name].append({"seed": seed, **run})
                print(name, json.dumps(runs[name][-1]), flush=True)
    record = {
        "command": _name_command(arguments),
        **describe_run("torch", "transformers", "peft", threads=arguments.threads),
        "data": f"{len(trained)} images trained on, {len(tested)} held-out things tested",
        "recipe": {
            "steps": [arguments.steps, arguments.instruction_steps],
            "batch_size": arguments.batch_size,
            "pixels": arguments.pixels,
            "lora_rank": LORA_RANK,
        },
        "alignment": alignment,
        "mean_caption_loss": {
            name: {
                step: round(statistics.fmean(run[step]["caption_loss"] for run in made), 4)
                for step in ("projector", "instructions")
            }
            for name, made in runs.items()
        },
        "runs": runs,
        "seconds": round(time.monotonic() - started),
        "seconds_of_alignment": round(seconds_of_alignment),
    }
    arguments.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record["mean_caption_loss"], indent=2))


def _name_command(arguments: argparse.Namespace) -> str:
    """Without folders, which are of one machine."""
    sizes = ("threads", "steps", "instruction_steps", "batch_size", "align_steps", "tested")
    flags = [f"--{name.replace('_', '-')} {getattr(arguments, name)}" for name in sizes]
    return " ".join(["python -m benchmarks.mllm.mllm_captioning", *flags])


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200, help="of the projector")
    parser.add_argument("--instruction-steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--align-steps", type=int, default=150)
    parser.add_argument("--align-batch-size", type=int, default=64)
    parser.add_argument("--pixels", type=int, default=70, help="side; a multiple of 14")
    parser.add_argument("--tested", type=int, default=150, help="held-out things")
    parser.add_argument("--images", default=find_example_data() / "emoji", help="captioned images")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="folder for temporary files, a few GB")
    results = Path(__file__).parents[1] / "results"
    parser.add_argument("--output", type=Path, default=results / "mllm_captioning.json")
    return parser.parse_args()


def _make_towers(
    work: Path,
    trained: Sequence[CaptionedImage],
    tested: Sequence[CaptionedImage],
    arguments: argparse.Namespace,
) -> tuple[dict[str, Path], dict[str, Any]]:
    """Export the tower before and after the alignment; returns their folders, and how it went."""
    vision_model, image_processor, _ = load_vision_tower(fetch_tower(DINOV2))
    side = {"height": arguments.pixels, "width": arguments.pixels}
    image_processor = CLIPImageProcessor(
        size=side, do_center_crop=False,
        image_mean=image_processor.image_mean, image_std=image_processor.image_std,
    )  # fmt: skip
    config = BuildConfig(prompt="chatml", lora=find_example_data() / "caption_lora")
    built = join_towers((vision_model, image_processor), fetch_tower(SMOLLM2), config)
    save_model(*built, work / "built")
    texts = [_add_keywords(record) for record in trained]
    store = extract(work / "built", texts, work / "captions", modality="text")
    config = AlignConfig(
        vision_training="full", max_steps=arguments.align_steps, learning_rate=1e-3,
        vision_learning_rate=1e-4, global_batch_size=arguments.align_batch_size,
        precision="bfloat16", device="cpu",
    )  # fmt: skip
    aligned = align(work / "built", texts, work / "run", config, caption_store=store)
    towers = {
        name: export_vision_tower(folder, work / f"{name}-tower")
        for name, folder in (("before", work / "built"), ("after", aligned))
    }
    changed = _largest_change(towers["before"], towers["after"])
    return towers, {
        **asdict(config),
        "final_loss": round(read_results(work / "run")["final_loss"], 4),
        "unseen_t2i_r1": _measure_retrieval(aligned, tested),
        "chance_r1": 1 / len(tested),
        "largest_change_of_a_weight": changed,
    }


def _add_keywords(record: CaptionedImage) -> CaptionedImage:
    """The name as a short caption, and with its keywords as a long one."""
    if not record.keywords:
        return record
    long = f"{record.captions[0]}: {', '.join(record.keywords)}"
    return replace(record, long_captions=(long,))


def _largest_change(before: Path, after: Path) -> float:
    old, new = (load_vision_tower(folder)[0].state_dict() for folder in (before, after))
    return max(float((old[name] - new[name]).abs().max()) for name in old)


@torch.inference_mode()
def _measure_retrieval(folder: Path, tested: Sequence[CaptionedImage]) -> float:
    model = LLM2CLIPModel.from_pretrained(folder).eval()
    processor = LLM2CLIPProcessor.from_pretrained(folder)
    captions = encode_texts(
        model, processor, [record.captions[0] for record in tested], project=False
    )
    images = encode_images(model, processor, [record.path for record in tested], project=False)
    text_embeds = model.project_caption_embeds(captions)
    image_embeds = model.project_vision_embeds(images)
    group_ids = [record.group_id for record in tested]
    ranking = rank_retrieval(
        image_embeds, text_embeds, Correspondence.from_group_ids(group_ids, group_ids)
    )
    return hit_rate_at(ranking.t2i, k=1)


def _train(
    tower: Path,
    trained: Sequence[CaptionedImage],
    tested: Sequence[CaptionedImage],
    work: Path,
    seed: int,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Both steps of the recipe, and what is learned after each."""
    common: dict[str, Any] = {
        "global_batch_size": arguments.batch_size, "precision": "bfloat16", "device": "cpu",
        "seed": seed, "logging_steps": 25, "save_steps": 10_000,
    }  # fmt: skip
    names = [replace(record, long_captions=()) for record in trained]

    def build() -> tuple[Any, LlavaProcessor]:
        # A shorter wording than SmolLM2's own, which begins with a system sentence.
        template = TEMPLATE.read_text(encoding="utf-8")
        model, processor = build_llava(tower, fetch_tower(SMOLLM2), chat_template=template)
        train_projector_only(model)
        return _speed_up(model), processor

    def load() -> tuple[Any, LlavaProcessor]:
        model, processor = load_llava(work / "projector" / "model")
        adapted = train_projector_and_llm(_speed_up(model), rank=LORA_RANK, alpha=LORA_ALPHA)
        return adapted, processor

    steps: tuple[tuple[str, Callable[[], Any], list[Conversation], str, dict[str, Any]], ...] = (
        ("projector", build, conversations_of_captions(names), "plain",
         {"max_steps": arguments.steps, "learning_rate": 2e-3}),
        ("instructions", load, _ask(names), "chat",
         {"max_steps": arguments.instruction_steps, "learning_rate": 2e-4}),
    )  # fmt: skip
    figures: dict[str, Any] = {}
    for step, load_model, conversations, wording, options in steps:
        config = LlavaConfig(**common, **options)
        train_llava(
            load_model, conversations, work / step, config, wording=wording, record={"step": step}
        )
        model, processor = load_llava(work / step / "model")
        of_tested = conversations_of_captions(tested) if wording == "plain" else _ask(tested)
        figures[step] = _evaluate(_speed_up(model).eval(), processor, of_tested, wording)
    return figures


def _ask(records: Sequence[CaptionedImage]) -> list[Conversation]:
    return [Conversation(r.name, r.image, ((QUESTION, r.captions[0]),)) for r in records]


def _speed_up(model: Any) -> Any:
    # torch's own attention takes a third of a step in bfloat16 on a processor, backwards.
    model.set_attn_implementation("eager")
    return model


@torch.inference_mode()
def _evaluate(
    model: Any, processor: LlavaProcessor, conversations: list[Conversation], wording: str
) -> dict[str, Any]:
    tokens = find_tokens_of(model, processor)
    dataset = ConversationDataset(conversations, processor, tokens, wording=wording)
    turned = [*conversations[1:], conversations[0]]
    others = [
        replace(conversation, image=other.image)
        for conversation, other in zip(conversations, turned, strict=True)
    ]
    other = ConversationDataset(others, processor, tokens, wording=wording)
    return {
        "caption_loss": round(_mean_loss(model, processor, dataset), 4),
        "caption_loss_other_image": round(_mean_loss(model, processor, other), 4),
        "written": [
            {
                "name": conversations[number].turns[0][1],
                "written": _write(model, processor, dataset, number),
            }
            for number in range(0, len(dataset), max(1, len(dataset) // 8))
        ],
    }


def _mean_loss(model: Any, processor: LlavaProcessor, dataset: ConversationDataset) -> float:
    """Nats a token, over all answers together; in bfloat16, as it was trained."""
    pad = PadOnTheRight(processor.tokenizer.pad_token_id)
    total, count = 0.0, 0
    for batch in DataLoader(dataset, batch_size=_EVALUATION_BATCH, collate_fn=pad):
        learned = int((batch["labels"][:, 1:] != -100).sum())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            total += float(model(**batch).loss) * learned
        count += learned
    return total / count


def _write(model: Any, processor: LlavaProcessor, dataset: ConversationDataset, number: int) -> str:
    """Let the model write the answer to one question."""
    item = dataset[number]
    asked = int((item["labels"] == -100).sum())
    ids: Tensor = item["input_ids"][None, :asked]
    written = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=item["pixel_values"][None],
        max_new_tokens=16, do_sample=False,
    )  # fmt: skip
    return str(processor.tokenizer.decode(written[0, asked:], skip_special_tokens=True)).strip()


if __name__ == "__main__":
    main()
