"""Distinguishes a missing folder from a Hub repository, and tries once to reach the Hub.

huggingface_hub tries again and again before it says that there is no network.
"""

from __future__ import annotations

import re
import socket
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.file_download import repo_folder_name

_NAME = r"\w[\w.-]*"
_SECONDS = 5.0
_NAMES_SHOWN = 6


def is_hub_id(source: str | Path) -> bool:
    """Return whether this can only be a Hub repository: `owner/name`, and no folder `owner` here.

    Args:
        source: What a user gave as a model; a `Path` is never one.
    """
    return (
        isinstance(source, str)
        and re.fullmatch(f"{_NAME}/{_NAME}", source) is not None
        and not Path(source).parent.is_dir()
    )


def explain_missing(source: str | Path, *, may_lack_owner: bool = False) -> str | None:
    """Explain why a source is neither a local folder nor a Hub repository that can be reached.

    Args:
        source: What a user gave; it does not exist here.
        may_lack_owner: Whether names without an owner count, as of older Hub repositories ("gpt2").

    Returns:
        A clause; None where the Hub or its cache may have the repository.
    """
    is_short = may_lack_owner and re.fullmatch(_NAME, str(source)) is not None
    if is_short or is_hub_id(source):
        return _explain_unreachable(str(source))
    above = next((parent for parent in Path(source).parents if parent.is_dir()), Path())
    if above in (Path(), Path("/")):
        return "no such folder, and no Hub id like 'owner/name'"
    return f"no such folder, and no Hub id: {above} is here, and has {_list_folders(above)}"


def fetch_hub_file(source: str | Path, name: str, *, revision: str | None = None) -> Path | None:
    """Fetch a small file of a Hub repository, or find it in the cache where there is no Hub.

    Args:
        source: Hub id.
        name: Name of the file.
        revision: Branch, tag or commit.

    Returns:
        The file; None where there is none.
    """
    try:
        return Path(
            hf_hub_download(
                str(source), name, revision=revision, local_files_only=_try_hub() is not None
            )
        )
    except (OSError, ValueError):  # no such file, not in the cache, or not a Hub id
        return None


def _explain_unreachable(source: str) -> str | None:
    cached = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=source, repo_type="model")
    if (cached / "snapshots").is_dir() or (reason := _try_hub()) is None:
        return None
    return (
        "no such folder here, and the Hub, which may have a repository of this name, cannot be "
        f"reached ({reason}: check the network)"
    )


def _try_hub() -> str | None:
    """Why the Hub cannot be reached; None where it can, or where a proxy is between."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    scheme = urlsplit(constants.ENDPOINT).scheme
    return None if getproxies().keys() & {scheme, "all"} else _connect(constants.ENDPOINT)


@cache
def _connect(endpoint: str) -> str | None:
    address = urlsplit(endpoint)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=_SECONDS).close()
    except OSError as error:
        return f"{address.hostname}: {error.strerror or error}"
    return None


def _list_folders(parent: Path) -> str:
    names = sorted(path.name for path in parent.iterdir() if path.is_dir())
    more = ", …" if len(names) > _NAMES_SHOWN else ""
    return f"the folders {', '.join(names[:_NAMES_SHOWN])}{more}" if names else "no folder"
