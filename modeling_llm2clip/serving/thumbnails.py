"""Small copies of indexed images for the page; clients name none of the files."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from pathlib import Path

from PIL import Image

from ..image_loading_llm2clip import load_images

_SIDE = 512  # pixels
_QUALITY = 85


class Thumbnails:
    """Files of small copies, the ones used last.

    Threads may share it.

    Args:
        folder: Folder for the files; it exists.
        max_files: Most files to keep.
    """

    def __init__(self, folder: Path, *, max_files: int = 4096) -> None:
        self._folder = folder
        self._max_files = max_files
        self._lock = threading.Lock()
        self._used: OrderedDict[str, None] = OrderedDict()

    def find(self, image: Path, sha256: str) -> Path | None:
        """Return the small copy of an image."""
        if not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise ValueError(f"sha256={sha256!r} is not a digest of 64 hexadecimal digits.")
        file = self._folder / f"{sha256}.jpg"
        if not file.is_file() and not self._write(image, file):
            return None
        with self._lock:
            self._used[file.name] = None
            self._used.move_to_end(file.name)
            while len(self._used) > self._max_files:
                (self._folder / self._used.popitem(last=False)[0]).unlink(missing_ok=True)
        return file

    @staticmethod
    def _write(image: Path, file: Path) -> bool:
        try:
            small: Image.Image = load_images(str(image))
        except ValueError:
            return False
        small.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
        # A reader sees the whole file or none; several writers write the same bytes.
        part = file.with_suffix(f".{threading.get_ident()}.part")
        small.save(part, format="JPEG", quality=_QUALITY)
        part.replace(file)
        return True
