"""What a library logs while a public name is imported: one message is hidden, all others stay."""

from __future__ import annotations

import logging

import pytest

from modeling_llm2clip._library_warnings import hide_known_warnings, imports_hidden

NOTE = "Failed to load CPU gemm_4bit_forward from kernels-community: No module named 'kernels'."


def test_the_note_of_bitsandbytes_is_hidden_during_an_import_alone(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    monkeypatch.setattr(logger, "filters", [])  # a command of another test hides the note for good
    with imports_hidden():
        logger.warning(NOTE)
        logger.warning("Failed to load the library")
    logger.warning(NOTE)
    assert caplog.messages == ["Failed to load the library", NOTE]
    assert logger.filters == []


def test_what_a_command_hides_stays_hidden_after_an_import(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    monkeypatch.setattr(logger, "filters", [])
    hide_known_warnings()
    with imports_hidden():
        pass
    logger.warning(NOTE)
    assert caplog.messages == []
