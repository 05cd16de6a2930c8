"""Uploads a model folder to the Hub: checked first, then in one commit, or not at all.

Credentials are huggingface_hub's own: `HF_TOKEN`, or what `hf auth login` stored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id

from ..configuration_llm2clip import LLM2CLIPConfig
from ..doctor.check_model import check_model
from ..model_folders.model_card import update_model_card
from ..model_folders.model_card_data import read_card_data, relicense, require_license
from ..model_folders.training_state import require_trained
from .uploaded_files import PlannedFile, describe_files, list_files, require_no_credentials

COMMIT_MESSAGE = "Upload LLM2CLIP model"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Formats that can carry code which runs when they are opened.
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npz", ".npy"}
_REFUSED = {401: "there is no valid token", 403: "the token has no permission"}


def push_to_hub(
    model_folder: str | Path,
    repo_id: str,
    *,
    license: str | None = None,
    private: bool = True,
    revision: str = "main",
    commit_message: str = COMMIT_MESSAGE,
    token: str | None = None,
    device: str = "auto",
    allow_files: Sequence[str] = (),
    show: Callable[[str], object] = print,
) -> str:
    """Upload a model folder in one commit, after which the branch has its files and no others.

    The card is first written with the repository's name and the license; a card that somebody
    edited only gets the license. Then all files are shown with their sizes. Large files are sent
    first and become visible by the commit alone: an upload that breaks off shows nothing, and when
    it is repeated, files that had arrived are not sent again.

    Args:
        model_folder: Folder of a trained, healthy model.
        repo_id: `owner/name`; created where it does not exist.
        license: License of the weights, stated on the folder's card; None where that has one.
        private: Whether only its owners see it. A model cannot be taken back once it was public.
        revision: Branch, created from `main` where it does not exist.
        commit_message: Message of the commit.
        token: None for huggingface_hub's own.
        device: Where the model is checked first; see `find_device`.
        allow_files: Paths in the folder of files that look like credentials and are not.
        show: Called with the list of the files; what it raises stops the upload.

    Returns:
        Address of the commit; its last part is the revision to pin.

    Raises:
        ValueError: As `check_publishable`; or the repository exists and is public where private was
            wanted, or the reverse.
        RuntimeError: The Hub refuses, or the upload breaks off.

    Examples:
        >>> push_to_hub("my-model", "me/my-model", license="apache-2.0")  # doctest: +SKIP
    """
    require_repo_id(repo_id)
    if not commit_message.strip():
        raise ValueError("The commit message is blank; describe the commit.")
    folder = Path(model_folder)
    check_publishable(folder, license=license, device=device, allow_files=allow_files)
    update_model_card(folder, license=license, name=repo_id)
    files = list_files(folder)
    show(describe_files(files))
    api = HfApi(token=token)
    try:
        _prepare_repository(api, repo_id, private=private, revision=revision)
        commit: CommitInfo = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=[_quote(file.path) for file in files],
            delete_patterns="*",
            commit_message=commit_message,
            revision=revision,
        )
    except Exception as error:  # the client raises anything for connections, permissions, disks
        # Its BadRequestError is a ValueError too.
        if isinstance(error, ValueError) and not isinstance(error, HfHubHTTPError):
            raise
        raise RuntimeError(_explain(error, folder, repo_id)) from error
    return str(commit.commit_url)


def check_publishable(
    model_folder: str | Path,
    *,
    license: str | None = None,
    device: str = "auto",
    allow_files: Sequence[str] = (),
) -> list[PlannedFile]:
    """Refuse a folder that others should not get; nothing is sent or changed.

    Args:
        model_folder: Folder of a model.
        license: License that would be stated on its card; None where that has one.
        device: Where the model is checked; see `find_device`.
        allow_files: Paths in the folder of files that look like credentials and are not.

    Returns:
        The files that would be uploaded.

    Raises:
        ValueError: It is not a model folder, states no license, is untrained, has links that leave
            it, holds files that can carry code or that look like credentials, or `check_model`
            finds an error. There is no way around that: a folder that
            gives wrong embeddings here gives wrong embeddings everywhere.
    """
    folder = Path(model_folder)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} is not a model folder: it has no config.json. Export a model first."
        )
    card = read_card_data(folder)
    require_license(relicense(card, license), folder)
    config = LLM2CLIPConfig.from_pretrained(folder, local_files_only=True)
    require_trained(config, purpose="publishing", source=folder)
    files = list_files(folder)
    pickles = [file.path for file in files if Path(file.path).suffix.lower() in _PICKLES]
    if pickles:
        raise ValueError(
            f"{folder} holds files that can carry code: {pickles[:8]}. Remove them from it."
        )
    require_no_credentials(folder, files, allowed=allow_files)
    require_healthy(folder, device=device)
    return files


def require_healthy(folder: Path, *, device: str = "auto") -> None:
    """Refuse a folder in which `check_model` finds an error.

    Args:
        folder: Model folder.
        device: Where the model is checked; see `find_device`.

    Raises:
        ValueError: There is an error.
    """
    report = check_model(folder, device=device)
    if not report.healthy:
        failed = "; ".join(f"{check.name}: {check.message}" for check in report.failed)
        raise ValueError(
            f"{folder} is not published, because it is not healthy, and an unhealthy folder never "
            f"is. {failed} Repair it until `llm2clip doctor {folder}` passes."
        )


def require_repo_id(repo_id: str) -> None:
    """Refuse a name that cannot be a repository's.

    Args:
        repo_id: Name of a Hub repository.

    Raises:
        ValueError: It is not like `owner/name`.
    """
    if not _HUB_ID.fullmatch(repo_id):
        raise ValueError(f"repo_id={repo_id!r} must be 'owner/name'.")
    validate_repo_id(repo_id)


def _prepare_repository(api: HfApi, repo_id: str, *, private: bool, revision: str) -> None:
    api.create_repo(repo_id, private=private, exist_ok=True)
    found = bool(api.model_info(repo_id).private)
    if found != private:
        names = {True: "private", False: "public"}
        raise ValueError(
            f"{repo_id} exists and is {names[found]}, but {names[private]} was wanted. Change it "
            "in its settings on the Hub, "
            f"{'leave out' if found else 'pass'} --no-private, or name another."
        )
    if revision != "main":
        api.create_branch(repo_id, branch=revision, exist_ok=True)


def _quote(path: str) -> str:
    """Return a pattern that matches this path alone."""
    return re.sub(r"([*?[])", r"[\1]", path)


def _explain(error: Exception, folder: Path, repo_id: str) -> str:
    response: Any = error.response if isinstance(error, HfHubHTTPError) else None
    reason = _REFUSED.get(getattr(response, "status_code", 0))
    if reason is not None:
        return (
            f"The Hub refuses the upload to {repo_id}: {reason}. Log in with `hf auth login`, or "
            "set HF_TOKEN to a token that may write there."
        )
    return (
        f"The upload to {repo_id} broke off, and nothing of it is visible there "
        f"({type(error).__name__}: {error}). Repeat it with `llm2clip push {folder} {repo_id}`: "
        "files that had arrived are not sent again."
    )
