"""Keep given texts near their embeddings from the teacher, the vision tower's text encoder.

Captions rarely name classes, so an alignment on captions hardly trains the text side on class
names. To keep classes, only their names are needed, without labels or images: both encoders embed
each name once, and every step compares the text side with the teacher on a sample of the texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from ..._suggestions import counted, list_first
from ...configs.align_config import AlignConfig
from ...configs.encoding_config import DUAL_ENCODERS
from ...data.atomic_files import hash_json
from ...data.labels import Label, make_labels, read_labels
from ...encoding.dual_encoder import DualEncoder, DualEncoderProcessor
from ...encoding.encode import TorchEncoder
from ...encoding.tokenized_texts import TokenizedTexts
from ...evaluation.datasets.classification_dataset import ClassificationDataset
from ...evaluation.datasets.dataset_registry import find_dataset
from ...model_folders.fingerprint import fingerprint_teacher
from ...model_folders.model_folder import find_model_folder
from ...packing_llm2clip import copy_to
from ...processing_llm2clip import LLM2CLIPProcessor, check_texts
from .held_out import load_labeled_images
from .sampling import sample_rows

MOST_SAMPLED = 256
_TOKENIZER_FILES = ("*.json", "*.txt", "*.model")


@dataclass(frozen=True, eq=False)
class KeptTexts:
    """Names to keep, the texts made from them, and the embeddings of each text by both encoders.

    Attributes:
        names: The names, all distinct.
        texts: The names, their own prompts and their classification prompts, N in all.
        teacher: Folder or Hub id of the dual encoder.
        seed: Seed for sampling.
        embeds: (N, D) float32 outputs of the LLM; None before `embed`.
        targets: (N, P) float32 unit-length embeddings from the teacher; None before `embed`.
    """

    names: tuple[str, ...]
    texts: tuple[str, ...]
    teacher: str | Path
    seed: int
    embeds: Tensor | None = None
    targets: Tensor | None = None

    @cached_property
    def fingerprint(self) -> Mapping[str, str]:
        return fingerprint_teacher(self.teacher)

    def identify(self) -> dict[str, Any]:
        """Describe the texts and the teacher for the record of a run."""
        return {
            "num_names": len(self.names),
            "num_texts": len(self.texts),
            "digest": hash_json(self.texts),
            "teacher": self.fingerprint,
        }

    def describe(self) -> str:
        """Summarize the kept names for the model card."""
        return f"{counted(len(self.names), 'name')} ({list_first(self.names)})"

    def embed(self, source: Path, processor: LLM2CLIPProcessor, device: torch.device) -> KeptTexts:
        """Embed the texts with a model's LLM, then with the teacher; unload both."""
        tokens, texts = TokenizedTexts(processor, self.texts), list(self.texts)
        _require_whole(
            texts, tokens.is_truncated, reader="the model's LLM", longest=processor.longest_text
        )
        is_shown = PartialState().is_main_process
        embeds = TorchEncoder(source, processor, device=device).encode_texts(
            tokens, project=False, show_progress=is_shown
        )
        folder = find_model_folder(self.teacher)
        teacher = DualEncoder(folder, DualEncoderProcessor(folder), device)
        targets = teacher.encode_texts(texts, show_progress=is_shown)
        return replace(self, embeds=embeds.to(device), targets=targets.to(device))

    def sample(self, step: int) -> dict[str, Tensor]:
        """Sample additional model inputs for a step, identical on every process."""
        assert self.embeds is not None and self.targets is not None
        rows = sample_rows(len(self.texts), MOST_SAMPLED, seed=self.seed, step=step)
        rows = copy_to(rows, self.embeds.device)
        return {"kept_embeds": self.embeds[rows], "kept_targets": self.targets[rows]}


def read_kept_texts(
    config: AlignConfig, teacher: str | Path | None, labeled: ClassificationDataset | None
) -> KeptTexts | None:
    """Read the texts to keep, if any; raise ValueError if some exceed the teacher's token limit.

    `labeled` is the dataset of `config.zero_shot`. The templates of this dataset also apply to
    names from a file.
    """
    if config.keep_texts is None and teacher is not None:
        raise ValueError(
            f"teacher={teacher} has no effect without keep_texts. Set keep_texts, or omit teacher."
        )
    if config.keep_texts is None or not config.keep_weight:
        return None
    labels, templates = _read_labels(config.keep_texts, config.zero_shot, labeled)
    if teacher is None:
        raise ValueError(
            "keep_texts needs a teacher: the full model that the vision tower was taken from, "
            f"including its text encoder (transformers' {', '.join(DUAL_ENCODERS)}). Towers "
            "without a text encoder, such as DINOv3, cannot use keep_texts."
        )
    texts = dict.fromkeys(
        text
        for label in labels
        for text in (
            label.name,
            *label.prompts,
            *(template.replace("{}", label.name) for template in templates),
        )
    )
    check_texts(list(texts))
    processor = DualEncoderProcessor(find_model_folder(teacher, only=_TOKENIZER_FILES))
    _, is_truncated = processor.list_ids(list(texts))
    _require_whole(texts, is_truncated, reader=str(teacher), longest=processor.longest_text)
    return KeptTexts(tuple(label.name for label in labels), tuple(texts), teacher, config.seed)


def _require_whole(
    texts: Iterable[str], is_truncated: Iterable[bool], *, reader: str, longest: int
) -> None:
    if long := list(compress(texts, is_truncated)):
        raise ValueError(
            f"keep_texts has {counted(len(long), 'text')} longer than {longest} tokens, the limit "
            f"of {reader}: {list_first(long)}. Shorten or remove them."
        )


def _read_labels(
    source: str, zero_shot: str | None, labeled: ClassificationDataset | None
) -> tuple[list[Label], tuple[str, ...]]:
    """Read names from a file or from a dataset's classes, and the classification templates."""
    if Path(source).is_file():
        classes = find_dataset("image-folder") if labeled is None else labeled
        return read_labels(Path(source)), classes.templates
    if labeled is None or source != zero_shot:
        labeled = load_labeled_images(source, option="keep_texts")
    # Some datasets have several classes with the same name.
    return make_labels(list(dict.fromkeys(labeled.class_names))), labeled.templates
