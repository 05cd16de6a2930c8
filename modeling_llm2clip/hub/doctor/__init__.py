"""Examines a checkpoint from the outside: does it give the vectors it was made to give?"""

from .diagnosis import Check, Diagnosis
from .examination import diagnose

__all__ = ["Check", "Diagnosis", "diagnose"]
