"""Every kind of model behind one interface: told from its files, the same vectors as its own code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_encoders import MODEL_KINDS, TEXTS, save_tiny_encoder, save_tiny_pictures
from torch import Tensor

from modeling_llm2clip.data.correspondence import Correspondence  # type: ignore[import-not-found]
from modeling_llm2clip.evaluation.encoders.encoder import Encoder, EncoderSettings
from modeling_llm2clip.evaluation.encoders.kinds import open_encoder, tell_kind

BATCH_SIZES = (1, 7, 64)
# Sums of float32 numbers in another order, over two layers, on unit-length vectors.
ROUNDING = 1e-5
