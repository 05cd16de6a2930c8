"""Uploads a model folder to the Hub: checked first, then in one commit, or not at all.

Credentials are huggingface_hub's own: `HF_TOKEN`, or what `hf auth login` stored.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id

from ..configuration_llm2clip import LLM2CLIPConfig
from ..doctor import check_model
from ..model_folders.model_card_data import read_card_facts, require_license
from ..model_folders.training_state import require_trained

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Formats that can carry code which runs when they are opened.
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npz", ".npy"}
_REFUSED = {401: "no valid token came along", 403: "the token may not do this"}


@dataclass(frozen=True)
class Destination:
    """Where a folder goes on the Hub.

    Attributes:
        repo_id: `owner/name`; made where it does not exist.
        private: whether only its owners see it.
        branch: made from `main` where it does not exist.
        commit_message: of the one commit.
    """

    repo_id: str
    private: bool = True
    branch: str = "main"
    commit_message: str = "Upload LLM2CLIP model"

    def __post_init__(self) -> None:
        if not _HUB_ID.fullmatch(self.repo_id):
            raise ValueError(f"repo_id={self.repo_id!r} must be 'owner/name'.")
        validate_repo_id(self.repo_id)
        if not self.commit_message.strip():
            raise ValueError("The commit message is blank; say what the commit is.")


@dataclass(frozen=True)
class PlannedFile:
    """A file that is, or would be, uploaded."""

    path: str
    num_bytes: int


def list_files(folder: Path) -> list[PlannedFile]:
    """All files of a folder but hidden ones, by their path inside it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    relative = ((path.relative_to(folder), path.stat().st_size) for path in paths)
    return [
        PlannedFile(path.as_posix(), num_bytes)
        for path, num_bytes in relative
        if not any(part.startswith(".") for part in path.parts)
    ]


def check_publishable(folder: str | Path, *, device: str = "cpu") -> list[PlannedFile]:
    """Refuse a folder that others should not get; nothing is sent.

    Args:
        device: where `doctor` runs the model; see `find_device`.
    Returns: what would be uploaded.
    Raises: ValueError when it is no folder, states no license, is untrained, holds files that can
        carry code, or `doctor` finds an error. There is no way around `doctor`: a folder
        that gives wrong embeddings here gives wrong embeddings everywhere.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no model folder: it has no config.json. Export one first.")
    require_license(read_card_facts(folder), folder)
    config = LLM2CLIPConfig.from_pretrained(folder, local_files_only=True)
    require_trained(config, purpose="publishing", source=folder)
    files = list_files(folder)
    pickles = [file.path for file in files if Path(file.path).suffix in _PICKLES]
    if pickles:
        raise ValueError(
            f"{folder} holds files that can carry code: {pickles[:8]}. Remove them from it."
        )
    require_healthy(folder, device=device)
    return files


def require_healthy(folder: Path, *, device: str = "cpu") -> None:
    """Raise ValueError when `doctor` finds an error."""
    diagnosis = check_model(folder, device=device)
    if not diagnosis.healthy:
        failed = "; ".join(f"{check.name}: {check.message}" for check in diagnosis.failed)
        raise ValueError(
            f"{folder} is not published, because it is not healthy, and an unhealthy folder never "
            f"is. {failed} Repair it until `llm2clip doctor {folder}` passes."
        )


def push_to_hub(
    folder: str | Path,
    destination: Destination,
    *,
    token: str | None = None,
    device: str = "cpu",
) -> str:
    """Upload a folder in one commit, after which the branch holds its files and no others.

    Large files are sent first and become visible by the commit alone. So an upload that breaks off
    shows nothing, and when it is repeated, files that had arrived are not sent again.

    Args:
        token: None for huggingface_hub's own.
        device: where `doctor` runs the model first; see `find_device`.
    Returns: the commit's address; the last part of it is the revision to pin.
    Raises: ValueError as `check_publishable`, and for a repository that exists and is public
        where private was wanted, or the other way about; RuntimeError when the Hub refuses or the
        upload breaks off.
    """
    files = check_publishable(folder, device=device)
    api = HfApi(token=token)
    try:
        _prepare_repository(api, destination)
        commit: CommitInfo = api.upload_folder(
            repo_id=destination.repo_id,
            folder_path=folder,
            allow_patterns=[_quote(file.path) for file in files],
            delete_patterns="*",
            commit_message=destination.commit_message,
            revision=destination.branch,
        )
    except Exception as error:  # what the client raises for lost lines, permissions, full disks
        # Its BadRequestError is a ValueError too.
        if isinstance(error, ValueError) and not isinstance(error, HfHubHTTPError):
            raise
        raise RuntimeError(_explain(error, folder, destination)) from error
    return str(commit.commit_url)


def _prepare_repository(api: HfApi, destination: Destination) -> None:
    repo_id, wanted = destination.repo_id, destination.private
    api.create_repo(repo_id, private=wanted, exist_ok=True)
    found = bool(api.model_info(repo_id).private)
    if found != wanted:
        kinds = {True: "private", False: "public"}
        raise ValueError(
            f"{repo_id} exists and is {kinds[found]}, but it was to be {kinds[wanted]}. Change it "
            "in its settings on the Hub, "
            f"{'leave out' if found else 'pass'} --public, or name another."
        )
    if destination.branch != "main":
        api.create_branch(repo_id, branch=destination.branch, exist_ok=True)


def _quote(path: str) -> str:
    """A pattern that matches this path alone."""
    return re.sub(r"([*?[])", r"[\1]", path)


def _explain(error: Exception, folder: str | Path, destination: Destination) -> str:
    response: Any = error.response if isinstance(error, HfHubHTTPError) else None
    reason = _REFUSED.get(getattr(response, "status_code", 0))
    if reason is not None:
        return (
            f"The Hub refuses the upload to {destination.repo_id}: {reason}. Log in with `hf auth "
            "login` or set HF_TOKEN to a token that may write there."
        )
    return (
        f"The upload to {destination.repo_id} broke off, and nothing of it is visible there "
        f"({type(error).__name__}: {error}). Repeat it with `llm2clip export {folder} --push "
        f"{destination.repo_id}`: files that had arrived are not sent again."
    )
