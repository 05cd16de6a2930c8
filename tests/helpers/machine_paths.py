"""Finds absolute paths of one machine in documents and notebooks."""

from __future__ import annotations

import re

MACHINE_PATH = re.compile(r"(?<![\w.~])/(?:work|tmp|root|home|opt|Users|mnt|content)/|\b[A-Z]:\\")
