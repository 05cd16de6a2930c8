"""What an alignment says of itself: on the terminal, and on the card of the model it made."""

from __future__ import annotations

from ...model_folders.model_card_data import CardResult
from .align import AlignResult
from .held_out import HeldOutScores

NEAR_CHANCE = (
    "Warning: on held-out images this model is near chance, or they are too few to tell. Do not "
    "use it for search. Give more images, check that captions describe them, start from a "
    "caption-tuned language model, or train longer (--max-steps)."
)


def find_caution(result: AlignResult) -> str | None:
    """What the card must warn of, if anything."""
    is_near_chance = result.after is not None and result.after.is_near_chance
    return (
        "On held-out images this model is near chance, or they were too few to tell."
        if is_near_chance
        else None
    )


def list_results(result: AlignResult, data: str) -> tuple[CardResult, ...]:
    """The held-out scores as a card has them.

    Args:
        data: name of the dataset that was trained on.
    """
    if result.after is None:
        return ()
    scores = {
        name: value for name, value in result.after.as_record().items() if name.endswith("_r1")
    }
    dataset = f"{data}, {result.after.num_images} images held out of the alignment"
    return (CardResult("retrieval", dataset, scores),)


def describe_result(result: AlignResult) -> list[str]:
    """Lines that say where a run started and what came of it."""
    lines = [f"Start: {_describe_start(result)}."]
    if result.before is None or result.after is None:
        lines.append("No images were held out, so that nothing tells whether the training helped.")
        return lines
    after = result.after
    lines.append(
        f"R@1 among {after.num_images} held-out images and {after.num_texts} captions "
        "(text to image, image to text):"
    )
    chance = (after.chance_text_to_image_r1, after.chance_image_to_text_r1)
    lines += [
        f"  at the start      {_show(result.before)}",
        f"  after step {result.best_step:<6} {_show(after)}",
        f"  chance            {chance[0]:6.1%} {chance[1]:6.1%}",
    ]
    return lines


def _describe_start(result: AlignResult) -> str:
    closed_form = result.start.closed_form
    if closed_form is not None:
        return (
            f"closed form of {closed_form['num_pairs']:,} pairs, shrinkage "
            f"{closed_form['text_shrinkage']:g} for texts and "
            f"{closed_form['image_shrinkage']:g} for images"
        )
    return "the model as it is" if result.start.is_trained else "random projections"


def _show(scores: HeldOutScores) -> str:
    return f"{scores.text_to_image_r1:6.1%} {scores.image_to_text_r1:6.1%}   loss {scores.loss:.3f}"
