"""All tasks by name."""

from __future__ import annotations

from ..._suggestions import did_you_mean
from .caption_retrieval import CRA
from .choices import CHOICES
from .classification import CLASSIFICATION
from .cross_lingual import CROSS_LINGUAL
from .retrieval import RETRIEVAL
from .task import Task
from .text_length import LENGTHS

TASKS: dict[str, Task] = {
    task.name: task for task in (RETRIEVAL, CROSS_LINGUAL, LENGTHS, CRA, CLASSIFICATION, CHOICES)
}


def find_task(name: str) -> Task:
    """The task of this name.

    Raises: ValueError listing the known ones.
    """
    if name not in TASKS:
        raise ValueError(
            f"No task is called {name!r}; known are {list(TASKS)}.{did_you_mean(name, TASKS)}"
        )
    return TASKS[name]
