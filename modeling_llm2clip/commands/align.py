"""`llm2clip align`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .._extras import LORA, require
from .captioned_data import add_data_flags, read_data
from .extras import list_needs_of_data, list_needs_of_model
from .pick import pick


def add_parser(commands: Any) -> None:
    """Add the command and its flags."""
    align = commands.add_parser("align", help="align pictures with stored caption vectors")
    align.add_argument("model", help="folder or Hub id, from llm2clip build")
    add_data_flags(align)
    align.add_argument("output", type=Path, help="folder to write; the model goes to output/model")
    align.add_argument("--caption-store", type=Path, help="from llm2clip extract")
    align.add_argument("--picture-store", type=Path, help="the same, of pictures")
    align.add_argument("--resume", action="store_true", help="continue a run that was stopped")
    _add_parts(align.add_argument_group("what is trained"))
    _add_settings(align.add_argument_group("training"))
    align.set_defaults(run=run)


def _add_parts(group: Any) -> None:
    group.add_argument("--vision-training", choices=("frozen", "lora", "full"), default="frozen")
    group.add_argument(
        "--text-training", choices=("stored", "frozen-online", "lora"), default="stored"
    )
    group.add_argument("--vision-rank", type=int, default=32, help="of the LoRA")
    group.add_argument("--vision-alpha", type=int, default=32)
    group.add_argument("--text-rank", type=int, default=16, help="of the LoRA")
    group.add_argument("--text-alpha", type=int, default=32)
    group.add_argument(
        "--start", choices=("as-is", "canonical-correlation"), default="as-is",
        help="of both projections; the second needs both stores",
    )  # fmt: skip


def _add_settings(group: Any) -> None:
    group.add_argument("--epochs", type=float, default=1.0)
    group.add_argument("--steps", type=int, help="instead of epochs")
    group.add_argument("--batch-size", type=int, default=512, help="over all processes together")
    group.add_argument("--lr", type=float, default=1e-3)
    group.add_argument("--vision-lr", type=float, help="of a wholly trained tower; default: lr")
    group.add_argument("--layer-decay", type=float, default=0.85, help="of its lower layers")
    group.add_argument("--weight-decay", type=float, default=0.05)
    group.add_argument("--clip-norm", type=float, default=1.0)
    group.add_argument("--long-share", type=float, default=0.5, help="of long captions, 0 to 1")
    group.add_argument("--loss-chunk", type=int, help="rows of the loss at a time")
    group.add_argument("--gradient-checkpointing", action="store_true")
    group.add_argument(
        "--workers", dest="num_workers", type=int, default=0, help="processes that decode pictures"
    )
    group.add_argument(
        "--precision", choices=("auto", "float32", "bfloat16"), default="auto",
        help="auto: bfloat16 on a GPU that computes in it",
    )  # fmt: skip
    group.add_argument("--device", choices=("auto", "cpu"), default="auto")
    group.add_argument("--log-every", type=int, default=10, help="steps")
    group.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    group.add_argument("--seed", type=int, default=0)


def run(arguments: argparse.Namespace) -> int:
    """Run it and return the exit code."""
    uses_lora = "lora" in (arguments.vision_training, arguments.text_training)
    require(*([LORA] if uses_lora else []), *list_needs_of_data(arguments.data, extra="train"))
    require(*list_needs_of_model(arguments.model, extra="train"))
    from ..data.trained_emoji import find_trained_emoji
    from ..data.vector_store import VectorStore
    from ..hub.assemble import assemble_folder
    from ..hub.doctor.patient import find_folder
    from ..hub.new_folder import clear_leftovers, require_new_folder
    from ..training.cross_modal.align import align, check_settings
    from ..training.cross_modal.arguments import AlignArguments
    from ..training.run_record import require_fresh_or_resumed

    settings = pick(AlignArguments, arguments)
    model = find_folder(arguments.model)
    folder = arguments.output / "model"
    clear_leftovers(folder)
    require_new_folder(folder)
    stores = {
        name: None if path is None else VectorStore.open(path)
        for name, path in (
            ("caption_store", arguments.caption_store),
            ("picture_store", arguments.picture_store),
        )
    }
    check_settings(settings, **stores)  # reading the data may take long
    require_fresh_or_resumed(arguments.output, resume=arguments.resume)
    records = read_data(arguments, require_pictures=stores["picture_store"] is None)
    trained_emoji = find_trained_emoji(records)
    result = align(model, records, arguments.output, settings, resume=arguments.resume, **stores)
    if not result.is_main_process:
        return result.exit_code
    if result.trained is None:
        print(
            f"Stopped after step {result.steps}; continue with --resume. The last checkpoint is in "
            f"{arguments.output}."
        )
        return result.exit_code
    has_golden = assemble_folder(
        model,
        result.trained,
        folder,
        training_data=[Path(arguments.data).resolve().name],
        trained_emoji=trained_emoji,
    )
    print(f"Wrote {folder} after {result.steps} steps, loss {result.final_loss:.4f}.")
    if not has_golden:
        print(
            f"{model} has no recorded caption vectors, so {folder} has no golden vectors. "
            "`llm2clip build` records them now."
        )
    print(f"Next: llm2clip doctor {folder}")
    return 0
