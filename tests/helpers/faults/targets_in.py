"""Every input: data of a user, images, configurations of models and towers, options in YAML."""

from __future__ import annotations

from functools import partial

from faults import inputs_data, inputs_models
from faults.damage import repeat, run_targets

TARGETS = (*inputs_data.TARGETS, *inputs_models.TARGETS)
run = partial(run_targets, TARGETS)

if __name__ == "__main__":
    repeat(TARGETS)
