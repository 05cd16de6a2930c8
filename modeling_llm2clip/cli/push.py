"""`llm2clip push`."""

from __future__ import annotations

from pathlib import Path

from ..configs.config_fields import DeviceConfig
from ..configs.export_config import License
from .command import command
from .options import require_model, use_device


@command(
    group="Publish",
    examples=(
        "llm2clip push to-publish my-name/my-model --license apache-2.0",
        "llm2clip push to-publish my-name/my-model --dry-run",
    ),
)
def push(
    folder: Path,
    repo_id: str,
    /,
    *,
    license: License | None = None,
    private: bool = True,
    revision: str = "main",
    commit_message: str = "Upload LLM2CLIP model",
    allow_files: tuple[str, ...] = (),
    delete_others: bool = False,
    dry_run: bool = False,
    config: DeviceConfig,
) -> int:
    """Checks a model folder and uploads it to the Hub in one commit.

    Uses the token from HF_TOKEN or `hf auth login`.

    Args:
        folder: Model folder.
        repo_id: Repository, OWNER/NAME; created if it does not exist.
        license: Hub identifier of the weights' license, such as apache-2.0; written to the card
            before the upload. Default: the license on the card.
        private: Create a private repository. An existing repository must already have the requested
            visibility. A public model cannot be taken back.
        revision: Branch to upload to; created from main if it does not exist.
        commit_message: Commit message.
        allow_files: Files in FOLDER to upload even though they look like credentials. Default:
            none.
        delete_others: Delete files on the branch that are not in FOLDER, except .gitattributes and
            evaluation results in .eval_results/.
        dry_run: Check the folder and list its files and sizes without uploading. With
            --delete-others, also list the files that would be deleted.
        config: Device to run the checks on.
    """
    require_model(folder)
    device = str(use_device(config.device))
    from huggingface_hub import HfApi

    from ..publishing.push_to_hub import (
        check_publishable,
        describe_deleted,
        describe_files,
        list_others,
        push_to_hub,
        require_repo_id,
    )

    require_repo_id(repo_id)
    if dry_run:
        files = check_publishable(folder, license=license, device=device, allow_files=allow_files)
        print(describe_files(files))
        if delete_others:
            print(describe_deleted(list_others(HfApi(), repo_id, files, revision=revision)))
        shown = "private" if private else "public"
        print(
            f"Nothing was uploaded to {repo_id} ({shown}, branch {revision}). "
            "Remove --dry-run to upload it."
        )
        return 0
    address = push_to_hub(
        folder,
        repo_id,
        license=license,
        private=private,
        revision=revision,
        commit_message=commit_message,
        device=device,
        allow_files=allow_files,
        delete_others=delete_others,
    )
    print(f"Published {address}. To pin this commit, load it with revision=LAST_PART_OF_URL.")
    return 0
