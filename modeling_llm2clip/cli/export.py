"""`llm2clip export`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._extras import require
from .card_flags import LICENSE_FLAGS, add_card_flags
from .extras import list_needs_of_model
from .parser import add_device_flag, choose_device

if TYPE_CHECKING:
    from ..configs.export_config import ExportConfig

_HUB = ("push", "public", "branch", "commit_message", "dry_run")
_CHANGES = ("revision", "dtype", "max_shard_size", "base_models", "training_data", "results")


def add_parser(commands: Any) -> None:
    """Add the command and its flags."""
    export = commands.add_parser(
        "export",
        help="write a model folder anew, and publish it",
        examples=(
            "llm2clip export aligned/model to-publish --license apache-2.0 --push my-name/my-model",
        ),
    )
    export.add_argument("model", help="Hub id or folder of an LLM2CLIP model")
    export.add_argument(
        "folder", nargs="?", type=Path, help="folder to write; left out: publish MODEL as it is"
    )
    export.add_argument(
        "--revision",
        help="branch, tag or commit of MODEL, where it is a Hub id; default: its main branch",
    )
    export.add_argument(
        "--components", choices=("full", "text", "vision", "vision-tower"), default="full",
        help="the whole model, a half of it, or (vision-tower) the vision tower as an ordinary one "
        "of transformers, for LLaVA and the like",
    )  # fmt: skip
    export.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the weights; default: as it is",
    )
    export.add_argument(
        "--max-shard-size", metavar="SIZE", help="of a weight file, e.g. 5GB; default: 50GB"
    )
    add_device_flag(export)
    _add_card_flags(export.add_argument_group("the model card"))
    _add_hub_flags(export.add_argument_group("publishing (token: HF_TOKEN or `hf auth login`)"))
    export.set_defaults(run=run)


def _add_card_flags(card: Any) -> None:
    add_card_flags(card)
    card.add_argument(
        "--training-data",
        nargs="+",
        metavar="NAME",
        help="names or Hub ids of datasets; default: those on MODEL's card",
    )
    card.add_argument(
        "--results",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="JSON of evaluations of these weights; default: those on MODEL's card, if the weights "
        "stay the same",
    )


def _add_hub_flags(hub: Any) -> None:
    hub.add_argument(
        "--push", metavar="OWNER/NAME", help="upload it, in one commit; default: no upload"
    )
    hub.add_argument("--public", action="store_true", help="for all to see; default: private")
    hub.add_argument("--branch", help="branch to upload to; default: main")
    hub.add_argument(
        "--commit-message", help="message of that commit; default: Upload LLM2CLIP model"
    )
    hub.add_argument(
        "--dry-run", action="store_true",
        help="check, and list files and sizes; write and upload nothing",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Run it and return the exit code."""
    require(*list_needs_of_model(arguments.model, revision=arguments.revision))
    from ..model_folders.atomic_folder import require_new_folder
    from ..model_folders.model_types import require_own_model

    _refuse_contradictions(arguments)
    if arguments.folder is not None:
        require_new_folder(arguments.folder)
    require_own_model(arguments.model, revision=arguments.revision)
    arguments.device = str(choose_device(arguments))
    from ..publishing.push_to_hub import push_to_hub, require_repo_id

    if arguments.push is not None:
        require_repo_id(arguments.push)
        if arguments.commit_message is not None and not arguments.commit_message.strip():
            raise ValueError("The commit message is blank; describe the commit.")
    if arguments.components == "vision-tower":
        return _write_tower(arguments)
    if arguments.dry_run:
        return _list(arguments)
    folder = Path(arguments.model) if arguments.folder is None else _write(arguments)
    if arguments.push is not None:
        chosen = {"revision": arguments.branch, "commit_message": arguments.commit_message}
        given = {name: value for name, value in chosen.items() if value is not None}
        address = push_to_hub(
            folder,
            arguments.push,
            private=not arguments.public,
            device=arguments.device,
            **given,
        )
        print(f"Published {address}. Pin its last part with revision=… when you load it.")
    return 0


def _refuse_contradictions(arguments: argparse.Namespace) -> None:
    """Raise ValueError for flags that do not go together, before anything is imported."""
    hub_flags = ("public", "branch", "commit_message")
    if arguments.push is None and any(getattr(arguments, name) for name in hub_flags):
        raise ValueError("--public, --branch and --commit-message go with --push OWNER/NAME.")
    if arguments.folder is None:
        _require_folder_as_it_is(arguments)
    elif arguments.components == "vision-tower":
        unused = [n for n in (*LICENSE_FLAGS[1:], *_CHANGES[1:], *_HUB) if getattr(arguments, n)]
        if unused:
            raise ValueError(
                f"--components vision-tower goes with --revision and --license; got {unused}."
            )


def _list(arguments: argparse.Namespace) -> int:
    """Print what would be written and uploaded, after the same checks; write nothing."""
    from ..publishing.export_plan import plan_export
    from ..publishing.push_to_hub import check_publishable

    if arguments.folder is None:
        files = check_publishable(arguments.model, device=arguments.device)
        rest = ""
    else:
        config = _read_config(arguments)
        _require_publishable(arguments, config)
        files = plan_export(arguments.model, arguments.folder, config, revision=arguments.revision)
        rest = (
            f"Nothing was written to {arguments.folder}. Sizes of weight files are exact but for "
            "their headers, the others' are those in MODEL. The checks were made on MODEL; what "
            "is written is checked again before it is uploaded.\n"
        )
    for file in files:
        print(f"{file.num_bytes:>15,}  {file.path}")
    print(f"{rest}Nothing was uploaded{_describe(arguments)}. Leave out --dry-run to do it.")
    return 0


def _describe(arguments: argparse.Namespace) -> str:
    if arguments.push is None:
        return ""
    access = "public" if arguments.public else "private"
    return f" to {arguments.push} ({access}, branch {arguments.branch or 'main'})"


def _read_config(arguments: argparse.Namespace) -> ExportConfig:
    from ..configs.export_config import ExportConfig

    names = (*LICENSE_FLAGS, "base_models", "training_data", "results", "dtype", "max_shard_size")
    given = {name: value for name in names if (value := getattr(arguments, name))}
    return ExportConfig(components=arguments.components, device=arguments.device, **given)


def _require_publishable(arguments: argparse.Namespace, config: ExportConfig) -> None:
    """Refuse, before anything is loaded, what could not be published."""
    from ..configuration_llm2clip import LLM2CLIPConfig
    from ..model_folders.model_card_data import require_license
    from ..model_folders.model_folder import find_model_folder
    from ..model_folders.training_state import require_trained
    from ..publishing.export_model import plan_card

    found = find_model_folder(arguments.model, revision=arguments.revision)
    require_license(plan_card(found, config), found)
    require_trained(LLM2CLIPConfig.from_pretrained(found), purpose="publishing", source=found)


def _write(arguments: argparse.Namespace) -> Path:
    from ..publishing.export_model import export_model

    config = _read_config(arguments)
    if arguments.push is not None:
        _require_publishable(arguments, config)
    folder = export_model(
        arguments.model,
        arguments.folder,
        config,
        revision=arguments.revision,
        name=arguments.push,
    )
    print(f"Wrote {folder}. Next: llm2clip doctor {folder}")
    return folder


def _write_tower(arguments: argparse.Namespace) -> int:
    """Write the vision tower alone, which is no LLM2CLIP model any more."""
    from ..publishing.vision_tower_export import export_vision_tower

    folder = export_vision_tower(
        arguments.model,
        arguments.folder,
        revision=arguments.revision,
        license=arguments.license,
    )
    print(f"Wrote {folder}. AutoModel and LlavaConfig(vision_config=…) take it unchanged.")
    return 0


def _require_folder_as_it_is(arguments: argparse.Namespace) -> None:
    """Raise ValueError unless MODEL can be published unchanged."""
    changing = [name for name in (*LICENSE_FLAGS, *_CHANGES) if getattr(arguments, name)]
    changing += ["components"] if arguments.components != "full" else []
    if not (arguments.push or arguments.dry_run):
        raise ValueError("Name a FOLDER to write, or --push OWNER/NAME to publish MODEL as it is.")
    if changing or not Path(arguments.model).is_dir():
        raise ValueError(
            f"Without a FOLDER to write, MODEL must be a folder and is published unchanged; got "
            f"{arguments.model} with {changing or 'no changes'}. Name a FOLDER."
        )
