"""Uploads a model folder to the Hub: checked first, then in one commit, or not at all.

Credentials are huggingface_hub's own: `HF_TOKEN`, or what `hf auth login` stored.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id

from ..configuration_llm2clip import LLM2CLIPConfig
from ..data.atomic_files import write_atomically
from ..doctor import check_model
from ..model_folders.model_card import render_model_card
from ..model_folders.model_card_data import read_card_facts, require_license
from ..model_folders.training_state import require_trained

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Formats that can carry code which runs when they are opened.
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npz", ".npy"}
_REFUSED = {401: "no valid token came along", 403: "the token may not do this"}


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


def require_repo_id(repo_id: str) -> None:
    """Raise ValueError for a name that no repository of the Hub can have.

    Args:
        repo_id: `owner/name`.
    """
    if not _HUB_ID.fullmatch(repo_id):
        raise ValueError(f"repo_id={repo_id!r} must be 'owner/name'.")
    validate_repo_id(repo_id)


def check_publishable(
    folder: str | Path, *, license: str | None = None, device: str = "cpu"
) -> list[PlannedFile]:
    """Refuse a folder that others should not get; nothing is changed or sent.

    Args:
        folder: Model folder.
        license: License that will be stated on the card; None for the one that is there.
        device: Where `check_model` runs the model; see `find_device`.

    Returns:
        What would be uploaded.

    Raises:
        ValueError: It is no model folder, states no license, is untrained, holds files that can
            carry code, or `check_model` finds an error. There is no way around `check_model`: a
            folder that gives wrong embeddings here gives wrong embeddings everywhere.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no model folder: it has no config.json. Export one first.")
    facts = read_card_facts(folder)
    if license is None:
        require_license(facts, folder)
    elif license != facts.license_id:
        _render_card_with(folder, license)  # refused now, not after the checks
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


def _render_card_with(folder: Path, license: str) -> str:
    """Return the card of a folder with another license.

    Raises:
        ValueError: The card was edited, and would lose what was written there.
    """
    file = folder / "README.md"
    facts = read_card_facts(folder)
    said = file.read_text(encoding="utf-8") if file.is_file() else ""
    title = re.search(r"^# (.+)$", said, re.MULTILINE)
    name = title[1] if title else folder.resolve().name
    if said and said != render_model_card(folder, facts, name=name):
        raise ValueError(
            f"{file} was edited, so license={license} is not written over it. State the license "
            "in the card, in its metadata (license: …) and its text, and push without license."
        )
    return render_model_card(folder, replace(facts, license_id=license), name=name)


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
    repo_id: str,
    *,
    license: str | None = None,
    private: bool = True,
    revision: str | None = None,
    commit_message: str = "Upload LLM2CLIP model",
    token: str | None = None,
    device: str = "cpu",
) -> str:
    """Upload a folder in one commit, after which the branch holds its files and no others.

    Large files are sent first and become visible by the commit alone. So an upload that breaks off
    shows nothing, and when it is repeated, files that had arrived are not sent again.

    Args:
        folder: Model folder.
        repo_id: `owner/name`; made where it does not exist.
        license: License of the weights, an identifier of the Hub, stated on the folder's card
            first; None for the one that is there.
        private: Whether the repository is shown to its owners alone. Unlike the Hub's own calls
            True by default: a model that was public once cannot be taken back.
        revision: Branch, made from `main` where it does not exist; None for `main`.
        commit_message: Message of the one commit.
        token: None for huggingface_hub's own.
        device: Where `check_model` runs the model first; see `find_device`.

    Returns:
        The commit's address; the last part of it is the revision to pin.

    Raises:
        ValueError: As `check_publishable`, or a repository exists and is public where private was
            wanted, or the other way about.
        RuntimeError: The Hub refuses, or the upload breaks off.
    """
    folder, branch = Path(folder), revision or "main"
    require_repo_id(repo_id)
    if not commit_message.strip():
        raise ValueError("The commit message is blank; say what the commit is.")
    files = check_publishable(folder, license=license, device=device)
    if license is not None and license != read_card_facts(folder).license_id:
        card = _render_card_with(folder, license)
        write_atomically(folder / "README.md", card.encode())
        files = list_files(folder)
    api = HfApi(token=token)
    try:
        _prepare_repository(api, repo_id, private=private, branch=branch)
        commit: CommitInfo = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=[_quote(file.path) for file in files],
            delete_patterns="*",
            commit_message=commit_message,
            revision=branch,
        )
    except Exception as error:  # what the client raises for lost lines, permissions, full disks
        # Its BadRequestError is a ValueError too.
        if isinstance(error, ValueError) and not isinstance(error, HfHubHTTPError):
            raise
        raise RuntimeError(_explain(error, folder, repo_id)) from error
    return str(commit.commit_url)


def _prepare_repository(api: HfApi, repo_id: str, *, private: bool, branch: str) -> None:
    api.create_repo(repo_id, private=private, exist_ok=True)
    found = bool(api.model_info(repo_id).private)
    if found != private:
        kinds = {True: "private", False: "public"}
        raise ValueError(
            f"{repo_id} exists and is {kinds[found]}, but it was to be {kinds[private]}. Change it "
            f"in its settings on the Hub, set private={found}, or name another."
        )
    if branch != "main":
        api.create_branch(repo_id, branch=branch, exist_ok=True)


def _quote(path: str) -> str:
    """A pattern that matches this path alone."""
    return re.sub(r"([*?[])", r"[\1]", path)


def _explain(error: Exception, folder: Path, repo_id: str) -> str:
    response: Any = error.response if isinstance(error, HfHubHTTPError) else None
    reason = _REFUSED.get(getattr(response, "status_code", 0))
    if reason is not None:
        return (
            f"The Hub refuses the upload to {repo_id}: {reason}. Log in with `hf auth "
            "login` or set HF_TOKEN to a token that may write there."
        )
    return (
        f"The upload to {repo_id} broke off, and nothing of it is visible there "
        f"({type(error).__name__}: {error}). Repeat it with `llm2clip push {folder} "
        f"{repo_id}`: files that had arrived are not sent again."
    )
