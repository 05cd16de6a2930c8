"""Find tasks by name, and the default task for each dataset type."""

from __future__ import annotations

from ..._suggestions import did_you_mean
from ..datasets.dataset_spec import DatasetType
from .choices import CHOICES
from .classification import CLASSIFICATION
from .retrieval import CRA, CROSS_LINGUAL, RETRIEVAL
from .task import Task
from .text_length import LENGTH

TASKS: dict[str, Task] = {
    task.name: task for task in (RETRIEVAL, CROSS_LINGUAL, LENGTH, CRA, CLASSIFICATION, CHOICES)
}
DEFAULT_TASKS: dict[DatasetType, Task] = {
    "retrieval": RETRIEVAL,
    "captions": CRA,
    "classification": CLASSIFICATION,
    "choice": CHOICES,
}


def find_task(name: str) -> Task:
    if name not in TASKS:
        raise ValueError(
            f"There is no task {name!r}. Known tasks: {', '.join(TASKS)}."
            f"{did_you_mean(name, TASKS)}"
        )
    return TASKS[name]
