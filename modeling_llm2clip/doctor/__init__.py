"""Examines a checkpoint from the outside: does it give the embeddings it was made to give?"""

from .check_model import check_model
from .model_report import Check, ModelReport

__all__ = ["Check", "ModelReport", "check_model"]
