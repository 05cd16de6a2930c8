"""Official checkpoints into model folders."""

from .checkpoint import CheckpointSource
from .convert import ConversionReport, convert_checkpoint
from .language_model import LLMSource
from .recipes import RECIPES, OutputArguments, Recipe

__all__ = [
    "RECIPES",
    "CheckpointSource",
    "ConversionReport",
    "LLMSource",
    "OutputArguments",
    "Recipe",
    "convert_checkpoint",
]
