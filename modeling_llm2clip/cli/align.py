"""`llm2clip align`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._extras import LORA, require
from .captioned_data import add_data_flags, read_data, require_data
from .extras import list_needs_of_data, list_needs_of_model
from .parser import add_device_flag, choose_device
from .pick import pick

if TYPE_CHECKING:
    from ..data.embedding_store import EmbeddingStore
    from ..training.alignment.align import AlignResult


def add_parser(commands: Any) -> None:
    """Add the command and its flags."""
    align = commands.add_parser(
        "align",
        help="align images with stored caption embeddings",
        examples=(
            "llm2clip align tuned/model my-images aligned --caption-store captions "
            "--image-store images",
        ),
    )
    align.add_argument("model", help="folder or Hub id, from llm2clip build")
    add_data_flags(align)
    align.add_argument("output", type=Path, help="folder to write; the model goes to output/model")
    align.add_argument(
        "--caption-store", type=Path,
        help="caption embeddings from llm2clip extract; default: none, which --text-training "
        "frozen-online and lora want",
    )  # fmt: skip
    align.add_argument(
        "--image-store", type=Path,
        help="image embeddings from llm2clip extract --images; default: none, and the vision "
        "tower runs at every step",
    )  # fmt: skip
    align.add_argument("--resume", action="store_true", help="continue a run that was stopped")
    _add_parts(align.add_argument_group("what is trained"))
    _add_settings(align.add_argument_group("training"))
    align.set_defaults(run=run)


def _add_parts(group: Any) -> None:
    group.add_argument(
        "--vision-training", choices=("frozen", "lora", "full"), default="frozen",
        help="what of the vision tower is trained: nothing, a LoRA, or everything",
    )  # fmt: skip
    group.add_argument(
        "--text-training", choices=("stored", "frozen-online", "lora"), default="stored",
        help="where caption embeddings come from: the caption store, the frozen LLM at every "
        "step, or the LLM with a LoRA that is trained",
    )  # fmt: skip
    group.add_argument(
        "--vision-rank", type=int, default=32, help="rank of the vision tower's LoRA"
    )
    group.add_argument(
        "--vision-alpha", type=int, default=32, help="alpha of the vision tower's LoRA"
    )
    group.add_argument("--text-rank", type=int, default=16, help="rank of the LLM's LoRA")
    group.add_argument("--text-alpha", type=int, default=32, help="alpha of the LLM's LoRA")
    group.add_argument(
        "--start", choices=("auto", "as-is", "canonical-correlation"), default="auto",
        help="where both projections start; auto: the canonical correlation of the stored "
        "embeddings where both stores are given, and for a trained model the better one",
    )  # fmt: skip


def _add_settings(group: Any) -> None:
    group.add_argument(
        "--epochs", type=float, help="passes over the data; default: 10, and at least 300 steps"
    )
    group.add_argument("--steps", type=int, help="number of steps; default: what --epochs comes to")
    group.add_argument(
        "--batch-size", type=int,
        help="images of a batch, over all processes together; default: 512, or all there are",
    )  # fmt: skip
    group.add_argument(
        "--lr", type=float,
        help="peak learning rate; default: 1e-4, and 1e-3 where the projections start at random",
    )  # fmt: skip
    group.add_argument(
        "--image-noise", type=float, default=1.0,
        help="noise on stored image embeddings, as a share of their length",
    )  # fmt: skip
    group.add_argument(
        "--caption-noise", type=float, default=0.5, help="the same on stored caption embeddings"
    )
    group.add_argument(
        "--held-out-share", type=float, default=0.1,
        help="share of the images that is never trained on and tells the best weights; 0 for none",
    )  # fmt: skip
    group.add_argument(
        "--evaluate-every", type=int,
        help="steps between two looks at the held-out images; default: a twentieth of the run",
    )  # fmt: skip
    group.add_argument(
        "--patience", type=int, default=6,
        help="stop after so many looks in a row without a lower held-out loss",
    )  # fmt: skip
    group.add_argument(
        "--vision-lr", type=float, help="learning rate of a fully trained tower; default: --lr"
    )
    group.add_argument(
        "--layer-decay", type=float, default=0.85,
        help="factor of the learning rate from one layer of such a tower to the one below",
    )  # fmt: skip
    group.add_argument("--weight-decay", type=float, default=0.05, help="weight decay of AdamW")
    group.add_argument("--clip-norm", type=float, default=1.0, help="largest norm of the gradient")
    group.add_argument("--long-share", type=float, default=0.5, help="of long captions, 0 to 1")
    group.add_argument(
        "--loss-chunk", type=int, help="rows of the loss at a time; default: all at once"
    )
    group.add_argument(
        "--gradient-checkpointing", action="store_true", help="less memory for more time"
    )
    group.add_argument(
        "--workers", dest="num_workers", type=int, default=0, help="processes that decode images"
    )
    group.add_argument(
        "--precision", choices=("auto", "float32", "bfloat16"), default="auto",
        help="auto: bfloat16 on a GPU that computes in it",
    )  # fmt: skip
    add_device_flag(group)
    group.add_argument("--log-every", type=int, default=10, help="steps between lines of metrics")
    group.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    group.add_argument("--seed", type=int, default=0, help="seed of everything random")


def run(arguments: argparse.Namespace) -> int:
    """Run it and return the exit code."""
    uses_lora = "lora" in (arguments.vision_training, arguments.text_training)
    require(*([LORA] if uses_lora else []), *list_needs_of_data(arguments.data, extra="train"))
    require(*list_needs_of_model(arguments.model, extra="train"))
    from ..model_folders.atomic_folder import clear_leftovers, require_new_folder
    from ..model_folders.model_folder import find_model_folder
    from ..model_folders.model_types import require_own_model
    from ..training.alignment.align_arguments import AlignArguments
    from ..training.run_record import require_fresh_or_resumed

    settings = pick(AlignArguments, arguments)
    folder = arguments.output / "model"
    _require_stores(arguments)
    clear_leftovers(folder)
    require_new_folder(folder)
    require_fresh_or_resumed(arguments.output, resume=arguments.resume)
    require_own_model(arguments.model)
    require_data(arguments)
    choose_device(arguments)

    from ..model_folders.golden_embeddings import GOLDEN_FILE
    from ..model_folders.model_writing import save_trained_model
    from ..training.alignment.align import align, check_settings
    from ..training.alignment.alignment_report import find_caution, list_results

    model = find_model_folder(arguments.model)
    stores = _open_stores(arguments)
    check_settings(settings, **stores)  # reading the data may take long
    records = read_data(arguments, require_images=stores["image_store"] is None)
    result = align(model, records, arguments.output, settings, resume=arguments.resume, **stores)
    if not result.is_main_process:
        return result.exit_code
    if result.trained is None:
        print(
            f"Stopped after step {result.steps}; continue with --resume. The last checkpoint is in "
            f"{arguments.output}."
        )
        return result.exit_code
    data = Path(arguments.data).resolve().name
    save_trained_model(
        model,
        result.trained,
        folder,
        training_data=[data],
        results=list_results(result, data),
        caution=find_caution(result),
        projections_trained=result.has_trained_projections,
        text_adapter_trained=result.has_trained_adapter,
    )
    has_golden = (folder / GOLDEN_FILE).is_file()
    _print_result(result, model, folder, has_golden=has_golden)
    return 0


def _open_stores(arguments: argparse.Namespace) -> dict[str, EmbeddingStore | None]:
    from ..data.embedding_store import EmbeddingStore

    paths = {name: getattr(arguments, name) for name in ("caption_store", "image_store")}
    return {name: path and EmbeddingStore.open(path) for name, path in paths.items()}


def _print_result(result: AlignResult, model: Path, folder: Path, *, has_golden: bool) -> None:
    from ..training.alignment.alignment_report import NEAR_CHANCE, describe_result, find_caution

    for line in describe_result(result):
        print(line)
    print(f"Wrote {folder} after {result.steps} steps, loss {result.final_loss:.4f}.")
    if not has_golden:
        print(
            f"{model} has no recorded caption embeddings, so {folder} has no golden embeddings. "
            "`llm2clip build` records them now."
        )
    print(f"Next: llm2clip doctor {folder}")
    if find_caution(result):
        print(NEAR_CHANCE)


def _require_stores(arguments: argparse.Namespace) -> None:
    """Raise ValueError for a store that is missing, before anything is imported."""
    if arguments.text_training == "stored" and arguments.caption_store is None:
        raise ValueError(
            "--text-training stored needs a caption store. Make one with llm2clip extract and "
            "give it as --caption-store, or choose --text-training frozen-online or lora."
        )
    for flag, store in (
        ("--caption-store", arguments.caption_store),
        ("--image-store", arguments.image_store),
    ):
        if store is not None and not store.is_dir():
            raise ValueError(f"{flag} {store}: no such folder. Give one of llm2clip extract.")
