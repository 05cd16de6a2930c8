"""The result of checking a model, as data and as text."""

from __future__ import annotations

from dataclasses import dataclass, field


class NotApplicableError(Exception):
    """A check has nothing to look at in this folder or on this machine; the text says why."""


class ConcernError(Exception):
    """A check found no error, but something that a user must know; the text says what."""


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: Name of the check.
        passed: False also where it was skipped.
        message: What was found; for an error, what was wanted and what to do.
        skipped: Whether it could not run; `message` says why.
        concern: Whether it passed and `message` says what a user must know; the summary repeats it.
    """

    name: str
    passed: bool
    message: str
    skipped: bool = False
    concern: bool = False

    @property
    def verdict(self) -> str:
        """`"ok"`, `"warning"`, `"skipped"` or `"FAILED"`."""
        if self.concern:
            return "warning"
        return "ok" if self.passed else "skipped" if self.skipped else "FAILED"


@dataclass(frozen=True)
class ModelReport:
    """All checks of one model; printing it shows a line per check.

    Attributes:
        source: Folder or Hub id of the model.
        checks: The checks, in the order in which they were made.
    """

    source: str
    checks: list[Check] = field(default_factory=list)

    @property
    def failed(self) -> list[Check]:
        """The checks that found an error."""
        return [check for check in self.checks if not check.passed and not check.skipped]

    @property
    def healthy(self) -> bool:
        """Whether no check found an error."""
        return not self.failed

    def __str__(self) -> str:
        """Return one line per check, and a last line that sums up."""
        width = max((len(check.name) for check in self.checks), default=0)
        lines = [f"{c.verdict:<8} {c.name:<{width}}  {c.message}" for c in self.checks]
        num_skipped = sum(check.skipped for check in self.checks)
        verdict = "healthy" if self.healthy else f"{len(self.failed)} of {len(self.checks)} FAILED"
        verdict += "".join(f", but {check.message}" for check in self.checks if check.concern)
        skipped = f", {num_skipped} skipped" if num_skipped else ""
        return "\n".join([*lines, f"{self.source}: {verdict}{skipped}"])
