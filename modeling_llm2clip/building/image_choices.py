"""Names of the choices for images; imports nothing, so that `--help` is quick."""

from __future__ import annotations

NORMALIZATIONS = ("own", "openai", "half", "imagenet")
