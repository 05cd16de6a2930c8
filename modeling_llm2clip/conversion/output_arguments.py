"""What a conversion writes; imports nothing costly."""

from __future__ import annotations

from dataclasses import dataclass

COMPONENTS = ("full", "vision", "text")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class OutputArguments:
    """What is written, and how.

    Attributes:
        components: `"full"`, or one half: `"vision"` without the LLM's weights, `"text"` without
            the vision tower's.
        dtype: of all weights but the temperature, which is float32.
        shard_size_mb: most megabytes of one weight file; twice as much memory is taken by it.
        base_models: Hub ids of the vision tower and of the LLM, for the card; None for the names
            of the sources.
        name: what the card calls the model; None for the folder's last name.
        requires_license: refuse, before anything is opened, what could not be published.
    """

    components: str = "full"
    dtype: str = "float32"
    shard_size_mb: int = 1000
    base_models: tuple[str, str] | None = None
    name: str | None = None
    requires_license: bool = False

    def __post_init__(self) -> None:
        errors = [
            f"{name}={getattr(self, name)!r} must be one of {allowed}"
            for name, allowed in (("components", COMPONENTS), ("dtype", DTYPES))
            if getattr(self, name) not in allowed
        ]
        if self.shard_size_mb < 1:
            errors.append("shard_size_mb must be at least 1")
        if errors:
            raise ValueError("OutputArguments: " + "; ".join(errors))
