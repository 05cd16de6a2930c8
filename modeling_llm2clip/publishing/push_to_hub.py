"""Uploads a model folder to the Hub: checked first, then in one commit, or not at all.

Credentials are huggingface_hub's own: `HF_TOKEN`, or what `hf auth login` stored.
"""

from __future__ import annotations

import mmap
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id

from .._suggestions import counted
from ..configuration_llm2clip import LLM2CLIPConfig
from ..data.atomic_files import is_unfinished
from ..doctor.check_model import check_model
from ..model_folders.model_card import (
    read_card_data,
    read_edited_card,
    relicense,
    require_license,
    write_model_card,
)
from ..model_folders.model_folder import is_inside
from ..model_folders.model_loading import require_trained
from ..model_folders.model_writing import explain_incomplete, is_legal_file

COMMIT_MESSAGE = "Upload LLM2CLIP model"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Formats that can carry code which runs when they are opened.
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npz", ".npy"}
_REFUSED = {401: "there is no valid token", 403: "the token has no permission"}
# What this package, transformers and sentence-transformers write into a model folder.
_OWN_FILES = (
    "README.md", "config.json", "generation_config.json", "model*.safetensors",
    "model.safetensors.index.json", "golden_embeddings.safetensors", "*_llm2clip.py",
    "training_images.safetensors", "tokenizer*.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template.*",
    "processor_config.json", "preprocessor_config.json", "modules.json",
    "config_sentence_transformers.json", "sentence_*_config.json", "[0-9]_*/*",
    "conversion*.json", "handler.py", "requirements.txt",
)  # fmt: skip
_CREDENTIAL_NAME = re.compile(
    r"id_(rsa|dsa|ecdsa|ed25519)(_sk)?|.*\.(pem|key|p12|pfx|ppk|jks|keystore|kdbx|env)"
    # A vocabulary is "tokens.txt", too.
    r"|((.*[._-])?token|(.*[._-])?(hf|api|auth|access|refresh)[._-]?tokens)(\.txt|\.ya?ml)?"
    r"|(.*[._-])?(password|passwd|secret|api_?key)s?(\.(txt|ya?ml|csv|tsv|xlsx?|ini|json))?"
    r"|_?netrc|(.*[._-])?(credentials?|client_secret.*|service[_-]account.*)\.(json|csv)"
    r"|token\.json|credentials|git-credentials|pypirc|npmrc|htpasswd|kubeconfig",
    re.IGNORECASE,
)
# What tokens and keys begin with. Each pattern begins with a literal, so that large files are
# searched fast; a lookbehind after it keeps it from matching inside a word.
_SECRET_KEY = rb"[\"']?\s{0,3}[=:]\s{0,3}[\"']?[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+=])"
_CREDENTIALS = {
    "a private key": rb"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY",
    "a token of Hugging Face": rb"hf_(?<![A-Za-z0-9]hf_)[A-Za-z0-9]{30,}",
    "an access key of AWS": rb"AKIA(?<![A-Za-z0-9]AKIA)[A-Z0-9]{16}(?![A-Za-z0-9])",
    "a temporary access key of AWS": rb"ASIA(?<![A-Za-z0-9]ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])",
    "a secret key of AWS": rb"aws_secret_access_key" + _SECRET_KEY,
    "a secret key of AWS, as a variable": rb"AWS_SECRET_ACCESS_KEY" + _SECRET_KEY,
    "a secret key of AWS, in JSON": rb"SecretAccessKey" + _SECRET_KEY,
    "a token of GitHub": rb"gh[pousr]_(?<![A-Za-z0-9]gh._)[A-Za-z0-9]{36}",
    "a fine-grained token of GitHub": rb"github_pat_[A-Za-z0-9_]{50}",
    "a token of GitLab": rb"glpat-[A-Za-z0-9_-]{20}",
    "an API key": rb"sk-(?<![A-Za-z0-9]sk-)(?=[A-Za-z_-]*[0-9])[A-Za-z0-9_-]{32}",
    "an API key of Google": rb"AIza(?<![A-Za-z0-9]AIza)[A-Za-z0-9_-]{35}",
    "a token of Slack": rb"xox[abprs]-[A-Za-z0-9-]{20}",
    "a token of npm": rb"npm_(?<![A-Za-z0-9]npm_)[A-Za-z0-9]{36}",
    "a token of PyPI": rb"pypi-AgEI[A-Za-z0-9_-]{50}",
}
# How a text in UTF-16 begins: with its mark, or with two characters of ASCII beside zeros.
_UTF_16 = re.compile(rb"\xff\xfe|\xfe\xff|(?:[\t-~]\0){2}|(?:\0[\t-~]){2}")
_WEIGHTS = ".safetensors"
_SHOWN = 8


def push_to_hub(
    model_folder: str | Path,
    repo_id: str,
    *,
    license: str | None = None,
    private: bool = True,
    revision: str = "main",
    commit_message: str = COMMIT_MESSAGE,
    delete_others: bool = False,
    token: str | None = None,
    device: str = "auto",
    allow_files: Sequence[str] = (),
    show: Callable[[str], object] = print,
) -> str:
    """Upload a model folder in one commit.

    The card is first written with the repository's name and the license; what somebody edited
    stays. Then all files are shown with their sizes. Large files are sent
    first and become visible by the commit alone: an upload that breaks off shows nothing, and when
    it is repeated, files that had arrived are not sent again.

    Args:
        model_folder: Folder of a trained, healthy model.
        repo_id: `owner/name`; created where it does not exist.
        license: License of the weights, stated on the folder's card; None where that has one.
        private: Whether only its owners see it. A model cannot be taken back once it was public.
        revision: Branch, created from `main` where it does not exist.
        commit_message: Message of the commit.
        delete_others: Delete the branch's files that the folder lacks; see `list_others`.
        token: None for huggingface_hub's own.
        device: Where the model is checked first; see `find_device`.
        allow_files: Paths in the folder of files that look like credentials and are not.
        show: Called with the list of the files and with what is deleted; what it raises stops the
            upload.

    Returns:
        Address of the commit; its last part is the revision to pin.

    Raises:
        ValueError: As `check_publishable`; the repository exists and is public where private was
            wanted, or the reverse; or it has files of another model that would remain.
        RuntimeError: The Hub refuses, or the upload breaks off.

    Examples:
        >>> push_to_hub("my-model", "me/my-model", license="apache-2.0")  # doctest: +SKIP
    """
    require_repo_id(repo_id)
    folder = Path(model_folder)
    check_publishable(folder, license=license, device=device, allow_files=allow_files)
    write_model_card(folder, relicense(read_edited_card(folder), license), name=repo_id)
    files = list_files(folder)
    show(describe_files(files))
    api = HfApi(token=token)
    try:
        _prepare_repository(api, repo_id, private=private, revision=revision)
        others = list_others(api, repo_id, files, revision=revision)
        if delete_others:
            show(describe_deleted(others))
        else:
            _require_none_of_model(repo_id, others)
        commit: CommitInfo = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=_match_exactly(files),
            delete_patterns=_match_exactly(others) if delete_others else None,
            commit_message=commit_message,
            revision=revision,
        )
    except Exception as error:  # the client raises anything for connections, permissions, disks
        # Its BadRequestError is a ValueError too.
        if isinstance(error, ValueError) and not isinstance(error, HfHubHTTPError):
            raise
        again = shlex.join([
            "llm2clip", "push", str(folder), repo_id,
            *([] if private else ["--no-private"]),
            *([] if revision == "main" else ["--revision", revision]),
            *([] if commit_message == COMMIT_MESSAGE else ["--commit-message", commit_message]),
            *(["--allow-files", *allow_files] if allow_files else []),
            *(["--delete-others"] if delete_others else []),
        ])  # fmt: skip
        raise RuntimeError(_explain(error, repo_id, again)) from error
    return str(commit.commit_url)


def check_publishable(
    model_folder: str | Path,
    *,
    license: str | None = None,
    device: str = "auto",
    allow_files: Sequence[str] = (),
) -> dict[str, int]:
    """Refuse a folder that must not be published; send and change nothing.

    It must be a trained, healthy and complete model with a license, without links that leave it,
    files that can carry code, or files that look like credentials (but for `allow_files`). There is
    no way around health: a folder that gives wrong embeddings here gives wrong embeddings
    everywhere. Returns path → bytes of the files that would be uploaded.
    """
    folder = Path(model_folder)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} is not a model folder: it has no config.json. Export a model first."
        )
    if incomplete := explain_incomplete(folder):
        raise ValueError(incomplete)
    require_license(relicense(read_card_data(folder), license), folder)
    config = LLM2CLIPConfig.from_pretrained(folder, local_files_only=True)
    require_trained(config, purpose="publishing", source=folder)
    files = list_files(folder)
    pickles = [path for path in files if Path(path).suffix.lower() in _PICKLES]
    if pickles:
        raise ValueError(
            f"{folder} holds files that can carry code: {pickles[:8]}. Remove them from it."
        )
    require_no_credentials(folder, files, allowed=allow_files)
    report = check_model(folder, device=device)
    if not report.healthy:
        failed = "; ".join(f"{check.name}: {check.message}" for check in report.failed)
        raise ValueError(
            f"{folder} is not published, because it is not healthy, and an unhealthy folder never "
            f"is. {failed} Repair it until `llm2clip doctor {folder}` passes."
        )
    return files


def require_repo_id(repo_id: str) -> None:
    if not _HUB_ID.fullmatch(repo_id):
        raise ValueError(f"repo_id={repo_id!r} must be 'owner/name'.")
    validate_repo_id(repo_id)


def _prepare_repository(api: HfApi, repo_id: str, *, private: bool, revision: str) -> None:
    api.create_repo(repo_id, private=private, exist_ok=True)
    is_private = bool(api.model_info(repo_id).private)
    if is_private != private:
        names = {True: "private", False: "public"}
        raise ValueError(
            f"{repo_id} exists and is {names[is_private]}, but {names[private]} was wanted. Change "
            "it in its settings on the Hub, "
            f"{'leave out' if is_private else 'pass'} --no-private, or name another."
        )
    if revision != "main":
        api.create_branch(repo_id, branch=revision, exist_ok=True)


def list_others(
    api: HfApi, repo_id: str, files: Iterable[str], *, revision: str = "main"
) -> list[str]:
    """List the files of a branch that a folder lacks.

    Evaluation results of the community (`.eval_results/`) and `.gitattributes` are not among them.
    """
    if not api.repo_exists(repo_id):
        return []
    start = revision if api.revision_exists(repo_id, revision) else "main"  # of the new branch
    others = set(api.list_repo_files(repo_id, revision=start)) - {".gitattributes", *files}
    return sorted(path for path in others if not path.startswith(".eval_results/"))


def describe_deleted(others: Sequence[str]) -> str:
    return f"Deleted from the repository: {', '.join(others) or 'nothing'}."


def _require_none_of_model(repo_id: str, others: Sequence[str]) -> None:
    """Refuse to leave files of another model that loaders would read with the new ones."""
    if mixed := [path for path in others if _is_own_file(path)]:
        raise ValueError(
            f"{repo_id} has files of another model that this folder lacks: {', '.join(mixed)}. "
            "Loaders would mix both models. Push to another --revision or repository, or delete "
            "all files that the folder lacks with --delete-others (list them first with --dry-run)."
        )


def _match_exactly(paths: Iterable[str]) -> list[str]:
    """Return patterns that match these paths alone."""
    return [re.sub(r"([*?[])", r"[\1]", path) for path in paths]


def _explain(error: Exception, repo_id: str, again: str) -> str:
    """Say why an upload failed; `again` is the command that repeats it."""
    response: Any = error.response if isinstance(error, HfHubHTTPError) else None
    reason = _REFUSED.get(getattr(response, "status_code", 0))
    if reason is not None:
        return (
            f"The Hub refuses the upload to {repo_id}: {reason}. Log in with `hf auth login`, or "
            "set HF_TOKEN to a token that may write there."
        )
    return (
        f"The upload to {repo_id} broke off, and nothing of it is visible there "
        f"({type(error).__name__}: {error}). Repeat it with `{again}`: "
        "files that had arrived are not sent again."
    )


def list_files(folder: Path) -> dict[str, int]:
    """List the sizes in bytes of all files of a folder, by their path inside it.

    Hidden ones are left out, and files that killed writers left unfinished. The folder may itself
    be a link, or a snapshot in huggingface_hub's cache. A link out of it, to a hidden file, to a
    folder or nowhere is refused.
    """
    files, errors = {}, []
    for path in _walk(folder):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() and not _is_uploaded(path, folder):
            errors.append(f"{name} links to {path.readlink()}")
        elif path.is_file():
            files[name] = path.stat().st_size
    if errors:
        more = f"; and {len(errors) - _SHOWN} more" if len(errors) > _SHOWN else ""
        raise ValueError(
            f"{folder} has links to what is not uploaded, such as files outside of it: "
            f"{'; '.join(errors[:_SHOWN])}{more}. Remove them, or put copies of the files in their "
            "places."
        )
    return dict(sorted(files.items()))


def require_no_credentials(
    folder: Path, files: Mapping[str, int], *, allowed: Sequence[str] = ()
) -> None:
    """Refuse files that look like credentials, by their names or contents."""
    if unknown := sorted(set(allowed) - set(files)):
        raise ValueError(
            f"allow_files={unknown}: {folder} has no such files that would be uploaded. Give paths "
            "as they are listed."
        )
    credentials = [
        f"{path} ({reason})"
        for path in sorted(set(files) - set(allowed))
        if (reason := _find_credential(folder / path)) is not None
    ]
    if credentials:
        more = f"; and {len(credentials) - _SHOWN} more" if len(credentials) > _SHOWN else ""
        raise ValueError(
            f"{folder} holds what looks like credentials: {'; '.join(credentials[:_SHOWN])}{more}. "
            "Remove them from it; name a file that has none with allow_files."
        )


def describe_files(files: Mapping[str, int]) -> str:
    """List files with their sizes and sum, and name files that are not part of a model folder."""
    lines = [f"{num_bytes:>15,}  {path}" for path, num_bytes in files.items()]
    lines.append(f"{sum(files.values()):>15,}  bytes in {counted(len(files), 'file')}.")
    others = [path for path in files if not (is_legal_file(path) or _is_own_file(path))]
    if others:
        lines.append(f"Not of the model, but in its folder: {', '.join(others)}.")
    return "\n".join(lines)


def _is_own_file(path: str) -> bool:
    return any(fnmatch(path, pattern) for pattern in _OWN_FILES)


def _walk(folder: Path) -> Iterator[Path]:
    """Yield every file and every link that is not hidden; links to folders are not followed."""

    for parent, folders, files in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in [*folders, *files]:
            path = Path(parent, name)
            if name.startswith(".") or is_unfinished(path):
                continue
            if path.is_symlink() or not path.is_dir():
                yield path


def _raise(error: OSError) -> None:
    raise error


def _is_uploaded(path: Path, folder: Path) -> bool:
    """Return whether a link is to a file of the folder, or to one in huggingface_hub's cache."""
    content, root = path.resolve(), folder.resolve()
    inside = content.relative_to(root).parts if content.is_relative_to(root) else ()
    is_hidden = any(part.startswith(".") for part in inside)
    return path.is_file() and is_inside(path, folder) and not is_hidden


def _find_credential(file: Path) -> str | None:
    if _CREDENTIAL_NAME.fullmatch(file.name):
        return "its name"
    if file.suffix == _WEIGHTS or not file.stat().st_size:
        return None
    with file.open("rb") as opened:
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            text = content[:].replace(b"\0", b"") if _UTF_16.match(content) else content
            reasons = (what for what, pattern in _CREDENTIALS.items() if re.search(pattern, text))
            return next(reasons, None)
