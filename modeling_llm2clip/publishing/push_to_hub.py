"""Checks a model folder and uploads it to the Hub in one commit, or not at all.

Credentials come from huggingface_hub: `HF_TOKEN`, or a token stored by `hf auth login`.
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
# Formats that can contain code that runs when they are opened.
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npz", ".npy"}
_REFUSED = {401: "there is no valid token", 403: "the token has no permission"}
# Files that this package, transformers and sentence-transformers write into a model folder.
_OWN_FILES = (
    "README.md", "config.json", "generation_config.json", "model*.safetensors",
    "model.safetensors.index.json", "golden_embeddings.safetensors", "*_llm2clip.py",
    "training_images.safetensors", "tokenizer*.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template.*",
    "processor_config.json", "preprocessor_config.json", "modules.json",
    "config_sentence_transformers.json", "sentence_*_config.json", "[0-9]_*/*",
    "conversion*.json", "handler.py", "requirements.txt",
    "adapter_config.json",  # of a LoRA, whose base transformers would load instead
)  # fmt: skip
_CREDENTIAL_NAME = re.compile(
    r"id_(rsa|dsa|ecdsa|ed25519)(_sk)?|.*\.(pem|key|p12|pfx|ppk|jks|keystore|kdbx|env)"
    # "tokens.txt" is also the name of vocabularies.
    r"|((.*[._-])?token|(.*[._-])?(hf|api|auth|access|refresh)[._-]?tokens)(\.txt|\.ya?ml)?"
    r"|(.*[._-])?(password|passwd|secret|api_?key)s?(\.(txt|ya?ml|csv|tsv|xlsx?|ini|json))?"
    r"|_?netrc|(.*[._-])?(credentials?|client_secret.*|service[_-]account.*)\.(json|csv)"
    r"|token\.json|credentials|git-credentials|pypirc|npmrc|htpasswd|kubeconfig",
    re.IGNORECASE,
)
# Prefixes of tokens and keys. Each pattern starts with a literal, which makes searching large files
# fast; the lookbehind after it prevents a match inside a word.
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
# Start of a text in UTF-16: its byte order mark, or two ASCII characters padded with zeros.
_UTF_16 = re.compile(rb"\xff\xfe|\xfe\xff|(?:[\t-~]\0){2}|(?:\0[\t-~]){2}")
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

    First, the card is updated with the repository's name and the license, keeping manual edits.
    Then all files are listed with their sizes. Large files are sent first, but only become visible
    with the commit: an interrupted upload leaves nothing visible, and a repeated upload skips files
    that were already sent.

    Args:
        model_folder: Folder of a trained, healthy model.
        repo_id: `owner/name`; created if it does not exist.
        license: License of the weights, written to the folder's card; None if the card has one.
        private: Whether only the owners can see the repository. Once public, a model cannot be
            taken back.
        revision: Branch, created from `main` if it does not exist.
        commit_message: Commit message.
        delete_others: Delete files on the branch that are not in the folder; see `list_others`.
        token: Token for the Hub; None for the token that huggingface_hub finds.
        device: Device for checking the model; see `find_device`.
        allow_files: Paths in the folder of files that look like credentials but are not.
        show: Called with a text that lists the files and, with `delete_others`, again with a text
            that lists the deletions. An exception stops the upload.

    Returns:
        URL of the commit; its last part is the revision to pin.

    Raises:
        ValueError: As in `check_publishable`; the repository exists and is public, but `private` is
            set, or the reverse; or the repository has files of another model that would remain.
        RuntimeError: The Hub refuses the upload, or the upload is interrupted.

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
    except Exception as error:  # the client raises many types for network, permissions and disks
        # Its BadRequestError is also a ValueError.
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
    """Refuse a folder that must not be published, without sending or changing anything.

    It must be a trained, healthy and complete model with a license, and must not contain links to
    files outside, files that can contain code, or files that look like credentials (except for
    `allow_files`). The health check cannot be skipped: a folder with wrong embeddings here has
    wrong embeddings everywhere. Returns path → bytes of the files that would be uploaded.
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
        raise ValueError(f"{folder} has files that can contain code: {pickles[:8]}. Remove them.")
    require_no_credentials(folder, files, allowed=allow_files)
    report = check_model(folder, device=device)
    if not report.healthy:
        failed = "; ".join(f"{check.name}: {check.message}" for check in report.failed)
        raise ValueError(
            f"{folder} is not healthy, so it cannot be published. {failed} Repair it until "
            f"`llm2clip doctor {folder}` passes."
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
            f"{repo_id} exists and is {names[is_private]}, not {names[private]}. Change its "
            f"settings on the Hub, {'remove' if is_private else 'pass'} --no-private, or use "
            "another repository."
        )
    if revision != "main":
        api.create_branch(repo_id, branch=revision, exist_ok=True)


def list_others(
    api: HfApi, repo_id: str, files: Iterable[str], *, revision: str = "main"
) -> list[str]:
    """List files on a branch that are not in `files`.

    `.gitattributes` and the community's evaluation results (`.eval_results/`) are not included.
    """
    if not api.repo_exists(repo_id):
        return []
    start = revision if api.revision_exists(repo_id, revision) else "main"  # a new branch's start
    others = set(api.list_repo_files(repo_id, revision=start)) - {".gitattributes", *files}
    return sorted(path for path in others if not path.startswith(".eval_results/"))


def describe_deleted(others: Sequence[str]) -> str:
    return f"Deleted from the repository: {', '.join(others) or 'nothing'}."


def _require_none_of_model(repo_id: str, others: Sequence[str]) -> None:
    """Refuse to leave files of another model, which loaders would mix with the new files."""
    if mixed := [path for path in others if _is_own_file(path)]:
        raise ValueError(
            f"{repo_id} has files of another model that are not in this folder: "
            f"{', '.join(mixed)}. Loaders would mix both models. Push to another --revision or "
            "repository, or delete them with --delete-others (list them first with --dry-run)."
        )


def _match_exactly(paths: Iterable[str]) -> list[str]:
    return [re.sub(r"([*?[])", r"[\1]", path) for path in paths]


def _explain(error: Exception, repo_id: str, again: str) -> str:
    """Explain why an upload failed; `again` is the command to repeat it."""
    response: Any = error.response if isinstance(error, HfHubHTTPError) else None
    reason = _REFUSED.get(getattr(response, "status_code", 0))
    if reason is not None:
        return (
            f"The Hub refused the upload to {repo_id}: {reason}. Log in with `hf auth login`, or "
            "set HF_TOKEN to a token with write access."
        )
    return (
        f"The upload to {repo_id} was interrupted, and none of it is visible there "
        f"({type(error).__name__}: {error}). Repeat it with `{again}`: "
        "files that were already sent are skipped."
    )


def list_files(folder: Path) -> dict[str, int]:
    """List the sizes in bytes of all files in a folder, by their path inside the folder.

    Skips hidden files, and unfinished files that killed processes left. The folder may itself be a
    link, or a snapshot in huggingface_hub's cache. Links to files outside, hidden files or folders,
    and broken links are refused.
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
            f"{folder} has links to files that are not uploaded, such as files outside the folder: "
            f"{'; '.join(errors[:_SHOWN])}{more}. Remove the links, or replace them with copies of "
            "the files."
        )
    return dict(sorted(files.items()))


def require_no_credentials(
    folder: Path, files: Mapping[str, int], *, allowed: Sequence[str] = ()
) -> None:
    """Refuse files that look like credentials, by their names or contents."""
    if unknown := sorted(set(allowed) - set(files)):
        raise ValueError(
            f"allow_files={unknown}: no such files would be uploaded from {folder}. Use paths "
            "relative to the folder."
        )
    credentials = [
        f"{path} ({reason})"
        for path in sorted(set(files) - set(allowed))
        if (reason := _find_credential(folder / path)) is not None
    ]
    if credentials:
        more = f"; and {len(credentials) - _SHOWN} more" if len(credentials) > _SHOWN else ""
        raise ValueError(
            f"{folder} has files that look like credentials: "
            f"{'; '.join(credentials[:_SHOWN])}{more}. Remove them, or pass allow_files with the "
            "ones that are not."
        )


def describe_files(files: Mapping[str, int]) -> str:
    """List files with their sizes and total, and name files that do not belong to a model."""
    lines = [f"{num_bytes:>15,}  {path}" for path, num_bytes in files.items()]
    lines.append(f"{sum(files.values()):>15,}  bytes in {counted(len(files), 'file')}.")
    others = [path for path in files if not (is_legal_file(path) or _is_own_file(path))]
    if others:
        lines.append(f"Other files in the folder, not part of the model: {', '.join(others)}.")
    return "\n".join(lines)


def _is_own_file(path: str) -> bool:
    return any(fnmatch(path, pattern) for pattern in _OWN_FILES)


def _walk(folder: Path) -> Iterator[Path]:
    """Yield every file and link that is not hidden, without following links to folders."""
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
    """Return whether a link points to a file in the folder or in huggingface_hub's cache."""
    content, root = path.resolve(), folder.resolve()
    inside = content.relative_to(root).parts if content.is_relative_to(root) else ()
    is_hidden = any(part.startswith(".") for part in inside)
    return path.is_file() and is_inside(path, folder) and not is_hidden


def _find_credential(file: Path) -> str | None:
    if _CREDENTIAL_NAME.fullmatch(file.name):
        return "its name"
    if file.suffix == ".safetensors" or not file.stat().st_size:
        return None
    with file.open("rb") as opened:
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            text = content[:].replace(b"\0", b"") if _UTF_16.match(content) else content
            reasons = (what for what, pattern in _CREDENTIALS.items() if re.search(pattern, text))
            return next(reasons, None)
