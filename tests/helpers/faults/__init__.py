"""Trouble on purpose: each harness brings one kind of trouble to every command, input or output."""

import os

# Before transformers and torch are imported, which read these once: a damaged name is looked up in
# no network, and no fork inherits threads.
os.environ.update(
    HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1"
)
