"""Trouble on purpose: files damaged, runs killed, disks full; it is named and costs nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from faults.__main__ import KINDS
from faults.commands import COMMANDS
from faults.counts import FEWEST_CASES, Counts, Outcome, judge_refusal
from launches import run_python

from modeling_llm2clip.__main__ import LINE

LONGEST_S = 3600  # beyond the time for cases: on a busy machine, the first of each row alone
MUST_BE_0 = ("unnamed", "silently_wrong", "hung", "lost")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_all_trouble_is_named_and_costs_nothing(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    seconds, seed = map(request.config.getoption, ("--fault-seconds", "--fault-seed"))
    options = ["--only", kind, "--seconds", seconds, "--seed", seed]
    printed = run_python(
        "-m", "faults", *options, "--output", tmp_path / "faults.json", timeout=seconds + LONGEST_S
    )
    harnesses = json.loads((tmp_path / "faults.json").read_text(encoding="utf-8"))["harnesses"]
    if kind not in harnesses:
        pytest.skip(printed)
    counts = harnesses[kind]
    assert counts["cases"] >= FEWEST_CASES
    assert {name: counts[name] for name in MUST_BE_0} == dict.fromkeys(MUST_BE_0, 0)


def test_every_command_that_writes_has_a_row() -> None:
    names = {name for name in LINE if not name.startswith("-")}
    rows = {command.words[0] for command in COMMANDS}
    assert names - rows == {"demo", "doctor", "env", "push", "serve"}
    assert rows <= names and len({command.name for command in COMMANDS}) == len(COMMANDS)


def test_a_message_that_names_its_cause_is_a_refusal_and_others_are_not() -> None:
    named = "\nllm2clip tag: /tmp/tags.csv already exists. Choose a new file, or remove this one.\n"
    for code, log, outcome in (
        (2, named, "refused_by_name"),
        (1, named, "unnamed"),
        (None, named, "hung"),
        (-9, named, "unnamed"),
        (2, "tags.csv\nllm2clip tag: [Errno 39] Directory not empty\n", "unnamed"),
        (2, f"Traceback (most recent call last):\n{named}", "unnamed"),
    ):
        assert judge_refusal(code, log, ["tags.csv"]) == outcome


def test_failures_are_counted_and_kept_and_other_cases_only_counted() -> None:
    counts = Counts()
    outcomes: tuple[Outcome, ...] = ("harmless", "refused_by_name", "lost")
    for outcome in outcomes:
        counts.add(outcome, f"case of {outcome}", "details")
    assert (counts.cases, counts.refused_by_name, counts.lost) == (3, 1, 1)
    assert counts.failures == ["lost: case of lost: details"]
