"""The files of a folder that leave this machine: no links out of it, and no credentials."""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from .._suggestions import counted
from ..data.atomic_files import is_unfinished
from ..model_folders.model_folder import is_inside
from ..model_folders.model_writing import is_legal_file

# What this package, transformers and sentence-transformers write into a model folder.
_OWN_FILES = (
    "README.md", "config.json", "generation_config.json", "model*.safetensors",
    "model.safetensors.index.json", "golden_embeddings.safetensors", "*_llm2clip.py",
    "training_images.safetensors", "tokenizer*.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template.*",
    "processor_config.json", "preprocessor_config.json", "modules.json",
    "config_sentence_transformers.json", "sentence_*_config.json", "[0-9]_*/*",
    "conversion*.json", "handler.py", "requirements.txt", "space/*",
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


@dataclass(frozen=True)
class PlannedFile:
    """A file that is, or would be, uploaded.

    Attributes:
        path: Path inside the folder.
        num_bytes: Its size.
    """

    path: str
    num_bytes: int


def list_files(folder: Path) -> list[PlannedFile]:
    """List all files of a folder, by their path inside it.

    Hidden ones are left out, and what killed writers left unfinished.

    Args:
        folder: Any folder; it may itself be a link, or a snapshot in huggingface_hub's cache.

    Raises:
        ValueError: A link leads out of the folder, to a hidden file, to a folder or nowhere.
        OSError: A folder in it cannot be listed.
    """
    files, errors = [], []
    for path in _walk(folder):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() and (reason := _find_wrong_link(path, folder)):
            errors.append(f"{name} {reason}")
        elif path.is_file():
            files.append(PlannedFile(name, path.stat().st_size))
    if errors:
        more = f"; and {len(errors) - _SHOWN} more" if len(errors) > _SHOWN else ""
        raise ValueError(
            f"{folder} has links whose targets are not its own files: "
            f"{'; '.join(errors[:_SHOWN])}{more}. Remove them, or put copies of the files in their "
            "places."
        )
    return sorted(files, key=lambda file: file.path)


def list_own_files(folder: Path) -> list[PlannedFile]:
    """List the files that are part of a model folder, without what else somebody put there.

    Args:
        folder: Model folder.
    """
    files = ((path.relative_to(folder).as_posix(), path) for path in _walk(folder))
    return sorted(
        (PlannedFile(name, path.stat().st_size) for name, path in files
         if path.is_file() and _is_own(name)),
        key=lambda file: file.path,
    )  # fmt: skip


def require_no_credentials(
    folder: Path, files: Sequence[PlannedFile], *, allowed: Sequence[str] = ()
) -> None:
    """Refuse files that look like credentials, by their names or contents.

    Args:
        folder: The folder.
        files: Its files.
        allowed: Paths in the folder of files that may look so.

    Raises:
        ValueError: A file looks like a credential, or an allowed one is not there.
    """
    paths = {file.path for file in files}
    if unknown := sorted(set(allowed) - paths):
        raise ValueError(
            f"allow_files={unknown}: {folder} has no such files that would be uploaded. Give paths "
            "as they are listed."
        )
    found = [
        f"{path} ({reason})"
        for path in sorted(paths - set(allowed))
        if (reason := _find_credential(folder / path)) is not None
    ]
    if found:
        more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise ValueError(
            f"{folder} holds what looks like credentials: {'; '.join(found[:_SHOWN])}{more}. "
            "Remove them from it; name a file that has none with allow_files (--allow-files)."
        )


def describe_files(files: Sequence[PlannedFile]) -> str:
    """Return a line for each file with its size, the sum, and what is not part of a model folder.

    Args:
        files: Files of a folder.
    """
    lines = [f"{file.num_bytes:>15,}  {file.path}" for file in files]
    lines.append(
        f"{sum(file.num_bytes for file in files):>15,}  bytes in {counted(len(files), 'file')}."
    )
    if others := [file.path for file in files if not _is_own(file.path)]:
        lines.append(f"Not of the model, but in its folder: {', '.join(others)}.")
    return "\n".join(lines)


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


def _find_wrong_link(path: Path, folder: Path) -> str | None:
    """Return why a link is not uploaded; None if it is, as a file of the folder."""
    target = path.readlink()
    if not path.exists():
        return f"links to {target}, which is not there"
    if not is_inside(path, folder):
        return f"links to {target}, outside of the folder"
    if path.is_dir():
        return f"links to the folder {target}, whose files would be left out"
    content, root = path.resolve(), folder.resolve()
    if content.is_relative_to(root):  # else it is in the cache, whose contents have no names
        if any(part.startswith(".") for part in content.relative_to(root).parts):
            return f"links to {target}, which is hidden"
    return None


def _is_own(path: str) -> bool:
    return is_legal_file(path) or any(fnmatch(path, pattern) for pattern in _OWN_FILES)


def _find_credential(file: Path) -> str | None:
    if _CREDENTIAL_NAME.fullmatch(file.name):
        return "its name"
    if file.suffix == _WEIGHTS or not file.stat().st_size:
        return None
    with file.open("rb") as opened:
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            text = content[:].replace(b"\0", b"") if _UTF_16.match(content) else content
            found = (what for what, pattern in _CREDENTIALS.items() if re.search(pattern, text))
            return next(found, None)
