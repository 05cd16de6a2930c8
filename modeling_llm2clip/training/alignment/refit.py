"""Once held-out images have chosen, everything is fitted once more on all images.

Shrinkages, temperature of the start, number of steps, batch size and the share of the way from the
start are those of the choice. The images that chose are trained on, too, so that no score of the
model that is written can be measured on them: those of the choice estimate it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from safetensors.torch import load_file
from torch import Tensor

from ...configs.align_config import AlignConfig
from ...scheduling.graceful_stop import StopRequest
from ..run_folder import add_results
from .alignment_fit import AlignmentFit, collect_weights, raise_if_stopped
from .alignment_trainer import RunLength
from .best_weights import BEST_FILE, copy_trained, set_between
from .projection_init import ProjectionInit, repeat_init
from .run_data import RecordData, RunData
from .trained_parts import merge_loras

REFIT_FOLDER = "refit"


@dataclass(frozen=True)
class Choice:
    """What held-out images chose.

    Attributes:
        start: Where the projections start.
        length: Numbers of the run.
        step: Of the best weights; 0 for the start.
        share: Of the way from the start to the weights of that step.
    """

    start: ProjectionInit
    length: RunLength
    step: int
    share: float

    @property
    def is_source(self) -> bool:
        """Whether the best weights are those of the model that the run began with."""
        return self.step == 0 and self.start.cca is None


def is_refitted(config: AlignConfig, data: RunData) -> bool:
    """Return whether a run is fitted once more on all images."""
    if data.held_out is None:
        return False
    return data.is_stored if config.refit is None else config.refit


def refit(fit: AlignmentFit, choice: Choice, stop: StopRequest) -> dict[str, Tensor]:
    """Fit everything once more on all images, and return the weights as `collect_weights` does."""
    assert isinstance(fit.data, RecordData)  # a stream is not fitted twice
    again = replace(fit, data=fit.data.with_held_out(), output=fit.output / REFIT_FOLDER)
    length = replace(choice.length, last_step=choice.step)
    arguments = again.make_arguments()
    model, adapted = again.load()
    # Repeated when resumed, too: weights between start and end need the start.
    start = repeat_init(model, again.data, again.config, choice.start)
    again.make_ready(model, length, arguments.device)
    before = copy_trained(model) if choice.share < 1 else {}
    again.begin()
    objective = again.make_objective(length, record=fit.output, name="refit_objective")
    trainer = again.make_trainer(
        model, arguments, length, stop, name="align, all images", objective=objective
    )
    trainer.run(again.find_checkpoint())
    raise_if_stopped(trainer, again.output, stop, of=" of the fit on all images")
    if before:
        set_between(model, before, copy_trained(model), choice.share)
    if objective is not None:
        objective.record_end()
    if arguments.should_save:
        num_records = again.data.num_items
        add_results(
            fit.output,
            refit={"start": asdict(start), "steps": choice.step, "num_records": num_records},
        )
    return collect_weights(trainer, adapted, fit.output)


def load_chosen(fit: AlignmentFit) -> dict[str, Tensor]:
    """Load the weights that held-out images chose, with LoRAs merged, by name."""
    model, adapted = fit.load()
    model.load_state_dict(load_file(fit.output / BEST_FILE), strict=False)
    return merge_loras(model, adapted)
