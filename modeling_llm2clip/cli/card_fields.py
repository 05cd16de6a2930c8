"""What the flags of a model card state, as the writer of cards takes it."""

from __future__ import annotations

from typing import Any

from ..configs.export_config import CardConfig

_LICENSES = ("license_name", "license_link", "vision_license", "text_license")


def collect_card_fields(config: CardConfig) -> dict[str, Any]:
    """Return the fields of a card that were given; the others are the source's.

    Args:
        config: Holds them.

    Raises:
        ValueError: A file of results cannot be read.
    """
    from ..model_folders.model_card_data import read_results

    fields = {name: getattr(config, name) for name in _LICENSES}
    fields |= {"license_id": config.license, "training_data": config.training_data}
    if config.results:
        fields["results"] = read_results(config.results)
    return {name: value for name, value in fields.items() if value}
