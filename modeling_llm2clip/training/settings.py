"""Checks of settings that both training stages make before anything runs."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any


def list_errors(
    settings: Any,
    *,
    least: Mapping[str, int],
    positive: Collection[str],
    choices: Mapping[str, Collection[str]],
) -> list[str]:
    """Say what is wrong with the fields of a settings object.

    A number that is None is left to its default, and not looked at. No number may be infinite or
    NaN.

    Args:
        least: smallest value of each field.
        positive: fields that must be more than 0.
        choices: values that each field may have.
    """
    errors = [
        f"{name}={getattr(settings, name)!r}, wanted one of {allowed}"
        for name, allowed in choices.items()
        if getattr(settings, name) not in allowed
    ]
    errors += [
        f"{field.name}={value}, wanted a finite number"
        for field in fields(settings)
        if isinstance(value := getattr(settings, field.name), float) and not math.isfinite(value)
    ]
    errors += [
        f"{name}={getattr(settings, name)}, wanted at least {number}"
        for name, number in least.items()
        if getattr(settings, name) is not None and getattr(settings, name) < number
    ]
    errors += [
        f"{name}={getattr(settings, name)}, wanted more than 0"
        for name in positive
        if getattr(settings, name) is not None and getattr(settings, name) <= 0
    ]
    return errors
