"""Writes files and folders atomically, so they are complete or absent; also locks and hashes them.

A folder is written into a hidden folder next to the target, named `.NAME-` plus eight characters.
The hidden folder also holds a claim: a file that contains the target's name. The writing process
holds a kernel lock on the claim, which ends with the process, even in a crash. An unlocked claim
therefore belongs to a dead writer. On a file system without `flock`, nothing is claimed and nothing
is cleaned up.
"""

from __future__ import annotations

import atexit
import errno
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_UNFINISHED = ".tmp"
_CLAIM = ".llm2clip-is-writing"
_HASHED_AT_ONCE = 2**20  # bytes
# In bytes: the name of a temporary file is 37 bytes longer, and file systems allow 255.
_LONGEST_NAME = 218
_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Errors from torch.save and safetensors (28: no space, 122: quota, 27: file too large).
_WRITE_FAILED = re.compile(
    r"inline_container|PytorchStreamWriter|iostream error|(os error|code:) (28|122|27)\b"
)
_FREE_DISK = "Free some space, or write to another disk"
# Remedy for `explain_full_disk` if the temporary folder is full.
FREE_TEMPORARY_FOLDER = "Free some space, or set TMPDIR to another folder for temporary files"


def default_cache_folder() -> Path:
    """Return the cache folder, for files that the package can recreate."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm2clip"


@cache
def temporary_folder() -> Path:
    """Return this process's temporary folder, which is removed when the process ends."""
    parent = Path(tempfile.gettempdir())
    with explain_full_disk(parent, "for temporary files", FREE_TEMPORARY_FOLDER):
        folder = Path(tempfile.mkdtemp(prefix="llm2clip-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@contextmanager
def explain_full_disk(folder: Path, what: str, remedy: str) -> Iterator[None]:
    """Explain what to do if the disk of a folder is full.

    On a full disk, torch and safetensors do not raise OSError. An error about a file outside the
    folder is re-raised unchanged.
    """
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        # A failed copy also names its source.
        file = getattr(error, "filename2", None) or getattr(error, "filename", None)
        if not isinstance(error, OSError) and _WRITE_FAILED.search(str(error)):
            number = errno.ENOSPC
        is_elsewhere = file and not Path(file).absolute().is_relative_to(folder.absolute())
        if number not in _DISK_IS_FULL or is_elsewhere:
            raise
        message = f"No room {what} ({os.strerror(number)}). {remedy}"
        raise OSError(number, message, str(folder)) from error


def require_writable(folder: Path) -> None:
    """Refuse a folder that cannot be created or written to, before any work is done for it."""
    place = folder.absolute()
    while not os.path.lexists(place):
        if len(os.fsencode(place.name)) > _LONGEST_NAME:
            raise ValueError(
                f"{folder} cannot be written: the name {place.name} is longer than {_LONGEST_NAME} "
                "bytes. Choose a shorter name."
            )
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(
            f"{folder} cannot be written: {place} is not a folder. Choose another folder."
        )
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(
            f"{folder} cannot be written: this process may not write into {place}. Choose another "
            "folder, or change its permissions."
        )


def require_new_file(file: Path) -> None:
    """Refuse a file that already exists or cannot be created."""
    if os.path.lexists(file):
        raise FileExistsError(f"{file} already exists. Choose a new file, or remove this one.")
    require_writable(file)


def write_atomically(file: Path, content: bytes) -> None:
    """Write or replace a file like `atomic_file`."""
    with atomic_file(file, replaces=True) as opened:
        opened.write(content)


@contextmanager
def atomic_file(file: Path, *, replaces: bool = False) -> Iterator[IO[bytes]]:
    """Yield a temporary file that gets its final name only once it is complete and synced.

    Several processes may write at once, each to its own temporary file next to the target. If
    another process has created the target by then and `replaces` is false, the target is left
    alone, and the new file is kept under another name, which the error reports.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    _clear_unfinished(file)
    unique = uuid4().hex
    unfinished = file.with_name(f"{file.name}.{unique}{_UNFINISHED}")
    try:
        with (
            explain_full_disk(file.parent, f"to write {file.name}", _FREE_DISK),
            unfinished.open("xb") as opened,
        ):
            _try_lock(opened)
            yield opened
            opened.flush()
            os.fsync(opened.fileno())
            if replaces:
                unfinished.replace(file)
            elif not rename_to_new(unfinished, file):
                kept = unfinished.rename(file.with_stem(f"{file.stem}-{unique[:8]}"))
                raise FileExistsError(
                    f"{file} was written by another process in the meantime, so this process kept "
                    f"its own version as {kept}. Choose one of them."
                )
    finally:
        unfinished.unlink(missing_ok=True)
    sync(file.parent)


def rename_to_new(unfinished: Path, file: Path) -> bool:
    """Rename a file, or return False if the new name is taken.

    On a file system without hard links, a file created at the same moment may be replaced.
    """
    try:
        os.link(unfinished, file)
    except FileExistsError:
        return False
    except OSError:
        if file.exists():
            return False
        unfinished.replace(file)
    unfinished.unlink(missing_ok=True)
    return True


def _clear_unfinished(file: Path) -> None:
    """Remove temporary files left by killed writers: unlocked, and not empty (just created)."""
    for left in file.parent.glob(f"{glob.escape(file.name)}.{'[0-9a-f]' * 32}{_UNFINISHED}"):
        with suppress(OSError), left.open("rb") as opened:
            if left.stat().st_size and lock_file(opened, shared=True, wait=False):
                left.unlink()


def is_unfinished(file: Path) -> bool:
    """Return whether a killed `atomic_file` left this file behind."""
    return file.name.endswith(_UNFINISHED)


def lock_file(opened: IO[Any] | int, *, shared: bool = False, wait: bool = True) -> bool:
    """Take the kernel's lock on an open file, or return False if another process holds it.

    The lock is released when the file is closed or the process ends, even in a crash. Requires a
    file system with `flock`: Linux or macOS, local or NFS 4.
    """
    if fcntl is None:
        raise OSError(errno.ENOLCK, "This operating system has no flock. Use Linux or macOS")
    flags = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    try:
        fcntl.flock(opened, flags)
    except BlockingIOError:
        return False
    return True


@contextmanager
def lock_folder(folder: Path, *, wait: bool = True) -> Iterator[bool]:
    """Create a folder and hold its lock.

    Yields False if another process holds the lock and `wait` is false. Without flock support, no
    lock is taken.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, is_free = os.open(folder, os.O_RDONLY), True
    try:
        with suppress(OSError):
            is_free = lock_file(descriptor, wait=wait)
        yield is_free
    finally:
        os.close(descriptor)


def lock_unless_held(file: Path, opened: IO[Any] | int) -> bool:
    """Lock an open file, or return False if another process has locked or removed it.

    Without flock support, the function only checks if the file still exists.
    """
    with suppress(OSError):
        if not lock_file(opened, wait=False):
            return False
    try:
        return os.path.samestat(
            file.stat(), os.fstat(opened if isinstance(opened, int) else opened.fileno())
        )
    except FileNotFoundError:
        return False


def hash_file(file: Path, algorithm: str = "sha256") -> str:
    """Hash a file, reading it in chunks."""
    digest = hashlib.new(algorithm)
    with file.open("rb") as opened:
        while piece := opened.read(_HASHED_AT_ONCE):
            digest.update(piece)
    return digest.hexdigest()


def hash_json(value: Any) -> str:
    """Hash a JSON value, regardless of the order of object keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def sync(path: Path) -> None:
    """Flush the content of a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes the target unless an error is raised inside.

    The folder's files are synced and get the umask's default permissions.
    """
    require_new_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    unfinished = scratch / folder.name
    try:
        with (
            explain_full_disk(folder.parent, f"to write {folder.name}", _FREE_DISK),
            (scratch / _CLAIM).open("w", encoding="utf-8") as claim,
        ):
            if _try_lock(claim):
                claim.write(folder.name)  # after locking: an empty claim is ignored
                claim.flush()
            unfinished.mkdir()
            yield unfinished
            allowed = unfinished.stat().st_mode & 0o777
            for path in unfinished.rglob("*"):
                if path.is_file():  # only the owner can read what safetensors writes
                    path.chmod((path.stat().st_mode & 0o111 | 0o666) & allowed)
                sync(path)
            sync(unfinished)
            _require_empty(folder)  # another process may have started at the same time
            unfinished.replace(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    sync(folder.parent)


def require_new_folder(folder: Path, *, is_renamed: bool = True) -> None:
    """Refuse a folder that is not empty, cannot be created, or is being written to.

    If `is_renamed` is true, links and mounts are also refused, because a temporary folder cannot
    replace them.
    """
    require_writable(folder.parent if os.path.lexists(folder) else folder)
    _require_empty(folder)
    if is_renamed and (folder.is_symlink() or os.path.ismount(folder) or not folder.name):
        raise FileExistsError(
            f"{folder} is a link, a mount or the current folder, which cannot be replaced. Choose "
            f"a folder inside it, such as {folder / 'model'}."
        )
    clear_leftovers(folder)


def _require_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"{folder} exists and is not empty. Choose a new folder, or remove this one."
        )


def clear_leftovers(folder: Path) -> None:
    """Remove what killed writers of a folder left; raise if a live process is still writing.

    Hidden folders without a claim, or with a claim for another target, are kept. Several processes
    may clean up at once.
    """
    for claim in folder.parent.glob(f".{glob.escape(folder.name)}-*/{_CLAIM}"):
        is_abandoned = None if claim.parent.is_symlink() else _is_abandoned(claim, folder.name)
        if is_abandoned:
            shutil.rmtree(claim.parent, ignore_errors=True)
        elif is_abandoned is False:
            raise FileExistsError(
                f"{folder} is being written by another process. Wait until it has finished, or "
                "choose a new folder."
            )


def _is_abandoned(claim: Path, name: str) -> bool | None:
    """Return whether a claim's writer has died; None if the claim is for another target."""
    try:
        with claim.open(encoding="utf-8") as opened:
            if opened.read() != name:
                return None
            is_free = lock_file(opened, shared=True, wait=False)
            return is_free if claim.exists() else None  # the writer may have just finished
    except OSError:  # the claim was just removed, or is another user's
        return None


def _try_lock(file: IO[Any]) -> bool:
    """Lock an open file; return False if another process has locked it or flock is missing."""
    try:
        return lock_file(file, wait=False)
    except OSError:
        return False
