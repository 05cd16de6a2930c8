"""Tasks by name."""

from __future__ import annotations

import pytest

from modeling_llm2clip.evaluation.tasks.task_registry import DEFAULT_TASKS, TASKS, find_task


def test_tasks_are_found_by_their_names() -> None:
    assert all(find_task(name).name == name for name in TASKS)
    with pytest.raises(ValueError, match=r"There is no task 'recall'\. Known: retrieval"):
        find_task("recall")


def test_the_default_task_of_a_dataset_type_takes_that_type() -> None:
    for dataset_type, task in DEFAULT_TASKS.items():
        assert dataset_type in task.dataset_types
