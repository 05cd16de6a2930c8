"""Runs a table of checks and reports the results."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from ..encoding.precision import float32_as_such

T = TypeVar("T")


class NotApplicableError(Exception):
    """A check does not apply to this folder or machine; the message says why."""


class ConcernError(Exception):
    """A check passed, but its message has a warning for the user."""


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: Name of the check.
        passed: True if it passed; False if it failed or was skipped.
        message: The finding; for a failure, also the expected value and the remedy.
        skipped: True if it could not run; `message` has the reason.
        concern: True if it passed with a warning in `message`, which the summary repeats.
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
    """The results of all checks of one model; printing it shows a line per check.

    Attributes:
        source: Folder or Hub id of the model, or URL of the endpoint.
        checks: The checks, in the order in which they ran.
    """

    source: str
    checks: list[Check] = field(default_factory=list)

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.passed and not check.skipped]

    @property
    def healthy(self) -> bool:
        return not self.failed

    def __str__(self) -> str:
        width = max((len(check.name) for check in self.checks), default=0)
        lines = [f"{c.verdict:<8} {c.name:<{width}}  {c.message}" for c in self.checks]
        num_skipped = sum(check.skipped for check in self.checks)
        verdict = "healthy" if self.healthy else f"{len(self.failed)} of {len(self.checks)} FAILED"
        verdict += "".join(f", but {check.message}" for check in self.checks if check.concern)
        skipped = f", {num_skipped} skipped" if num_skipped else ""
        return "\n".join([*lines, f"{self.source}: {verdict}{skipped}"])


@dataclass(frozen=True)
class PlannedCheck(Generic[T]):
    """A check, the earlier checks that it needs, and the modality it is about, if only one."""

    name: str
    run: Callable[[T], str]
    needs: tuple[str, ...] = ()
    about: str | None = None


def run_checks(
    planned: Iterable[PlannedCheck[T]],
    tested: T,
    find_obstacle: Callable[[str | None], str | None],
) -> Iterator[Check]:
    """Run the checks in order.

    `find_obstacle` takes the `about` of a check and returns why such checks do not apply, or None.
    A check is skipped if it does not apply, or if a check it depends on failed or did not run.
    """
    unmet: dict[str, str] = {}
    for check in planned:
        obstacle = find_obstacle(check.about)
        reasons = [f"needs {name!r}, which {unmet[name]}" for name in check.needs if name in unmet]
        if obstacle is not None:
            yield Check(check.name, False, obstacle, skipped=True)
        elif reasons:
            unmet[check.name] = "did not run"
            yield Check(check.name, False, "; ".join(reasons), skipped=True)
        else:
            result = _run(check, tested)
            if not result.passed and not result.skipped:
                unmet[check.name] = "failed"
            yield result


def _run(planned: PlannedCheck[T], tested: T) -> Check:
    try:
        with float32_as_such():
            return Check(planned.name, True, planned.run(tested))
    except NotApplicableError as reason:
        return Check(planned.name, False, str(reason), skipped=True)
    except ConcernError as concern:
        return Check(planned.name, True, str(concern), concern=True)
    # A broken model can raise any error; each becomes a failed check.
    except Exception as error:
        return Check(planned.name, False, describe_error(error))


def describe_error(error: Exception) -> str:
    """Return an error's message, prefixed with its type unless the message is meant for users."""
    text = re.sub(r"\s*\n\s*", " ", str(error)).strip() or "no message"
    is_own = type(error) is ValueError or type(error).__module__.startswith(f"{__package__}.")
    return text if is_own else f"{type(error).__name__}: {text}"
