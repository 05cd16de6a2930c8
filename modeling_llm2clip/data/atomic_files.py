"""Files and folders that are complete or absent: written atomically, locked, hashed.

A folder is written into a hidden folder beside the target, `.NAME-` and eight characters. It also
holds a claim: a file with the target's name, under a lock of the kernel that ends with the process
that holds it, however that ends. So a claim that nobody locks belongs to a dead writer. Where the
file system has no `flock`, nothing is claimed and nothing is cleared.
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
# Bytes of a name; that of a temporary file beside it is 37 longer, and file systems allow 255.
_LONGEST_NAME = 218
_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Errors of torch.save and of safetensors (28: no space, 122: quota, 27: file too large).
_WRITE_FAILED = re.compile(
    r"inline_container|PytorchStreamWriter|iostream error|(os error|code:) (28|122|27)\b"
)
_FREE_DISK = "Free some space, or write to another disk"
# Remedy of `explain_full_disk` for a temporary folder.
FREE_TEMPORARY_FOLDER = (
    "Free some space, or name another folder for temporary files by the variable TMPDIR"
)


def default_cache_folder() -> Path:
    """Return the folder for files that the package can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm2clip"


@cache
def temporary_folder() -> Path:
    """Return a folder that is removed when this process ends; every call gives the same one."""
    parent = Path(tempfile.gettempdir())
    with explain_full_disk(parent, "for temporary files", FREE_TEMPORARY_FOLDER):
        folder = Path(tempfile.mkdtemp(prefix="llm2clip-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@contextmanager
def explain_full_disk(folder: Path, what: str, remedy: str) -> Iterator[None]:
    """Say what to do when the disk of a folder is full.

    torch and safetensors raise other errors then. An error that names another place stays.
    """
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        # A copy that failed names its source, too.
        file = getattr(error, "filename2", None) or getattr(error, "filename", None)
        if not isinstance(error, OSError) and _WRITE_FAILED.search(str(error)):
            number = errno.ENOSPC
        is_elsewhere = file and not Path(file).absolute().is_relative_to(folder.absolute())
        if number not in _DISK_IS_FULL or is_elsewhere:
            raise
        message = f"No room {what} ({os.strerror(number)}). {remedy}"
        raise OSError(number, message, str(folder)) from error


def require_writable(folder: Path) -> None:
    """Refuse a folder that cannot be made or written, before the work for it is done."""
    place = folder.absolute()
    while not os.path.lexists(place):
        if len(os.fsencode(place.name)) > _LONGEST_NAME:
            raise ValueError(
                f"{folder} cannot be written: the name {place.name} has more than {_LONGEST_NAME} "
                "bytes. Choose a shorter name."
            )
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(
            f"{folder} cannot be written: {place} is not a folder. Name another folder."
        )
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(
            f"{folder} cannot be written: this process may not write into {place}. Name another "
            "folder, or change its permissions."
        )


def require_new_file(file: Path) -> None:
    """Refuse a file that exists, or cannot be made or written."""
    if os.path.lexists(file):
        raise FileExistsError(f"{file} exists. Name a new file, or remove it.")
    require_writable(file)


def write_atomically(file: Path, content: bytes) -> None:
    """Write or replace a file as `atomic_file` does."""
    with atomic_file(file, replaces=True) as opened:
        opened.write(content)


@contextmanager
def atomic_file(file: Path, *, replaces: bool = False) -> Iterator[IO[bytes]]:
    """Yield a file that gets its name when it is complete and synced, or never.

    Several processes may write at once, each beside the target under a name of its own. Unless it
    `replaces`, a file that has the name by then stays; this one is kept, and the error says where.
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
            _lock(opened, shared=False)
            yield opened
            opened.flush()
            os.fsync(opened.fileno())
            if replaces:
                unfinished.replace(file)
            elif not rename_to_new(unfinished, file):
                kept = unfinished.rename(file.with_stem(f"{file.stem}-{unique[:8]}"))
                raise FileExistsError(
                    f"{file} was written by another process meanwhile. It stays, and what this "
                    f"process wrote is {kept}."
                )
    finally:
        unfinished.unlink(missing_ok=True)
    sync(file.parent)


def rename_to_new(unfinished: Path, file: Path) -> bool:
    """Rename a file unless the new name is taken; a file system without links may replace it."""
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
    """Remove what killed writers of a file left: nobody locks it, and it is not just begun."""
    for left in file.parent.glob(f"{glob.escape(file.name)}.{'[0-9a-f]' * 32}{_UNFINISHED}"):
        with suppress(OSError), left.open("rb") as opened:
            if left.stat().st_size and lock_file(opened, shared=True, wait=False):
                left.unlink()


def is_unfinished(file: Path) -> bool:
    """Tell whether a killed `atomic_file` left this file behind."""
    return file.name.endswith(_UNFINISHED)


def lock_file(opened: IO[Any] | int, *, shared: bool = False, wait: bool = True) -> bool:
    """Take the kernel's lock on an open file.

    The lock is released when the file is closed or its process ends, however that happens. Needs
    a file system with `flock`: Linux or macOS, local or NFS 4.
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
    """Make a folder and hold its lock; yield False if another process does, and this one is not to
    wait. A file system without locks lets everybody in.
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
    """Take the lock on an open file that still has its name, if the file system has locks."""
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
    """Hash a file; it is read in pieces."""
    digest = hashlib.new(algorithm)
    with file.open("rb") as opened:
        while piece := opened.read(_HASHED_AT_ONCE):
            digest.update(piece)
    return digest.hexdigest()


def hash_json(value: Any) -> str:
    """Hash a value that JSON can hold; the order of names in objects does not matter."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def sync(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, which becomes the target unless an error is raised inside.

    Its files are synced, and get the permissions that the umask gives.
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
            if _lock(claim, shared=False):
                claim.write(folder.name)  # only now: an empty claim is ignored
                claim.flush()
            unfinished.mkdir()
            yield unfinished
            allowed = unfinished.stat().st_mode & 0o777
            for path in unfinished.rglob("*"):
                if path.is_file():  # safetensors writes for its owner alone
                    path.chmod((path.stat().st_mode & 0o111 | 0o666) & allowed)
                sync(path)
            sync(unfinished)
            _require_empty(folder)  # another process may have begun at the same moment
            unfinished.replace(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    sync(folder.parent)


def require_new_folder(folder: Path, *, is_renamed: bool = True) -> None:
    """Refuse a folder that exists and is not empty, cannot be made, or is being written.

    A temporary folder beside it gets the name at the end, unless `is_renamed` is false.
    """
    require_writable(folder.parent if os.path.lexists(folder) else folder)
    _require_empty(folder)
    if is_renamed and (folder.is_symlink() or os.path.ismount(folder) or not folder.name):
        raise FileExistsError(
            f"{folder} is a link, a mount or the current folder, which no new folder can replace. "
            f"Name a folder below it, such as {folder / 'model'}."
        )
    clear_leftovers(folder)


def _require_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty. Name a new folder, or remove it.")


def clear_leftovers(folder: Path) -> None:
    """Remove what killed writers of this folder left; refuse one that a living process writes.

    Any other hidden folder beside it is kept: one without a claim, or claimed for another target.
    Several processes may clear at once.
    """
    for claim in folder.parent.glob(f".{glob.escape(folder.name)}-*/{_CLAIM}"):
        is_abandoned = None if claim.parent.is_symlink() else _is_abandoned(claim, folder.name)
        if is_abandoned:
            shutil.rmtree(claim.parent, ignore_errors=True)
        elif is_abandoned is False:
            raise FileExistsError(
                f"{folder} is being written by another process. Wait until it has ended, or name "
                "a new folder."
            )


def _is_abandoned(claim: Path, name: str) -> bool | None:
    """Tell whether the writer of a claim has died; None for a claim that is none on this name."""
    try:
        with claim.open(encoding="utf-8") as opened:
            if opened.read() != name:
                return None
            is_free = lock_file(opened, shared=True, wait=False)
            return is_free if claim.exists() else None  # its writer may have finished in between
    except OSError:  # so may one that removed the claim; or it is another user's
        return None


def _lock(file: IO[Any], *, shared: bool) -> bool:
    """Lock an open file; False if another process has locked it, or nothing can."""
    try:
        return lock_file(file, shared=shared, wait=False)
    except OSError:
        return False
