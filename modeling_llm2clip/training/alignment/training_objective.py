"""The loss of a batch that is trained on, at the start of a fit and at its end.

Where no images are held out, it alone shows a training that did harm.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...data.records.record_table import Array
from ..run_folder import add_results, read_results
from .alignment_data import AlignmentDataset
from .best_weights import EvaluatedTrainer, find_model
from .held_out import embed_batches, fit_temperature
from .input_times import INPUT_SECONDS
from .sampling import mix

# Of the captions and the noise: no step of a run has it.
_EPOCH = -1


class TrainingObjective(TrainerCallback):
    """Measures the loss of a batch as it is trained on, noise included, at the best temperature.

    Args:
        dataset: Holds the images.
        items: Its items that are trained on.
        size: Images of the batch.
        seed: Of the choice of images.
        output: Folder whose `run.json` gets both losses.
        name: Name of them there.

    Attributes:
        trainer: The trainer that calls back; set before the run.
    """

    def __init__(
        self,
        dataset: AlignmentDataset,
        items: Array,
        *,
        size: int,
        seed: int,
        output: Path,
        name: str,
    ) -> None:
        chosen = np.sort(items[np.argsort(mix(seed, items), kind="stable")[:size]])
        self.trainer: EvaluatedTrainer | None = None
        self._dataset = dataset
        self._samples = np.stack([np.full_like(chosen, _EPOCH), chosen], axis=1)
        self._output = output
        self._name = name

    def on_train_begin(  # noqa: D102
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **_: Any,
    ) -> None:
        if not state.global_step:
            self._record(before=self._measure())

    def record_end(self) -> None:
        """Measure the weights that the model has now; every process calls it."""
        self._record(after=self._measure())

    def _measure(self) -> float:
        assert self.trainer is not None
        batch = self._dataset.__getitems__(self._samples)
        del batch[INPUT_SECONDS]
        model, device, context = find_model(self.trainer, is_stored=self._dataset.is_stored)
        inputs = embed_batches(model, [batch], device, context)
        found = [fit_temperature(self.trainer.alignment_model.loss, inputs)[1]]
        broadcast_object_list(found)
        return found[0]

    def _record(self, **losses: float) -> None:
        assert self.trainer is not None
        if self.trainer.args.should_save:
            earlier = read_results(self._output).get(self._name, {})
            add_results(self._output, **{self._name: {**earlier, **losses}})
