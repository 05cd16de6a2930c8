"""Outcomes of the cases of a harness, counted, and the judgment of an error message."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

Outcome = Literal["harmless", "refused_by_name", "unnamed", "silently_wrong", "hung", "lost"]
FEWEST_CASES = 6  # of a harness, also on a machine where they take longer than its time
_MOST_CHARACTERS = 2000  # of the details of a failure


class NotHereError(Exception):
    """This machine lacks something that a harness needs."""


@dataclass
class Counts:
    """Outcomes of one harness; all but the first two must be 0.

    Attributes:
        cases: all of them, those that ended with the undisturbed result included.
        refused_by_name: ended with a message that names the cause.
        unnamed: ended with a traceback, or with a message that does not name the cause.
        silently_wrong: ended well with another result than the undisturbed one.
        hung: still running at the time limit.
        lost: the same call does not end with the undisturbed result once the trouble is over.
        failures: seed, row and details of every case of the last four.
    """

    cases: int = 0
    refused_by_name: int = 0
    unnamed: int = 0
    silently_wrong: int = 0
    hung: int = 0
    lost: int = 0
    failures: list[str] = field(default_factory=list)

    def add(self, outcome: Outcome, case: str, details: str = "") -> None:
        """Count a case; `case` holds seed and row, so that it can be repeated."""
        self.cases += 1
        if outcome == "harmless":
            return
        setattr(self, outcome, getattr(self, outcome) + 1)
        if outcome != "refused_by_name":
            self.failures.append(f"{outcome}: {case}: {details[-_MOST_CHARACTERS:]}")


def judge_refusal(code: int | None, log: str, names: Iterable[str]) -> Outcome:
    """Judge a command that did not end well, by its exit code and what it printed.

    Args:
        code: exit code; negative for a signal, None where the time limit ended it.
        log: what it printed.
        names: file or folder names, one of which the last line of the message must have.
    """
    if code is None:
        return "hung"
    _, separator, message = log.rpartition("\nllm2clip ")
    message = message if separator else log
    is_reported = code == 2 and "Traceback (most recent call last)" not in log
    is_named = any(name in message for name in names)
    return "refused_by_name" if is_reported and is_named else "unnamed"
