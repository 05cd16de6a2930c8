"""Conversations into token ids and labels: the loss is on the answers alone.

An image is one placeholder in the text and N image tokens among the ids; LLaVA's classes put the
projected patches in their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from llava_conversations import PLACEHOLDER, Conversation
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import LlavaProcessor
from visual_tokens import VisualTokens

from modeling_llm2clip.data.images.image_sources import open_image
from modeling_llm2clip.data.validation_errors import ErrorCollector
from modeling_llm2clip.image_loading_llm2clip import load_images

NOT_LEARNED = -100  # the label that transformers' losses ignore

WORDINGS = ("plain", "chat")


class ConversationDataset(Dataset[dict[str, Tensor]]):
    """Tokens, labels and pixels of each conversation.

    Args:
        tokens: the tower's tokens of an image.
        wording: `"plain"` puts an answer right behind the image, as step 1 of LLaVA does;
            `"chat"` words the turns as the tokenizer's chat template does.
        max_length: most tokens, those of the image included; longer answers are truncated.
        skip_invalid: leave invalid conversations out and count their errors, instead of raising.

    Attributes:
        conversations: those that are kept.
        num_truncated: of these, conversations longer than `max_length`.
        skipped: errors of the others by kind.

    Raises:
        DataValidationError: conversations of which no word of an answer is left, or whose texts
            hold the image token themselves.
        ValueError: the tokenizer has no chat template, or one that rewrites earlier turns.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        processor: LlavaProcessor,
        tokens: VisualTokens,
        *,
        wording: str,
        max_length: int = 2048,
        skip_invalid: bool = False,
        show_progress: bool = False,
    ) -> None:
        if wording not in WORDINGS:
            raise ValueError(f"wording={wording!r}, wanted one of {WORDINGS}.")
        if wording == "chat" and not processor.tokenizer.chat_template:
            raise ValueError("The tokenizer has no chat template. Give one: --chat-template FILE.")
        self.tokenizer = processor.tokenizer
        self.image_processor = processor.image_processor
        self.image_token_id = processor.image_token_id
        self.num_image_tokens = tokens.num_tokens
        self.wording = wording
        self.max_length = max_length
        self.conversations: list[Conversation] = []
        self.num_truncated = 0
        errors = ErrorCollector()
        for conversation in tqdm(conversations, unit=" conversations", disable=not show_progress):
            self._take(conversation, errors)
        if not skip_invalid:
            errors.raise_if_any("The data")
        self.skipped = errors.counts

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        """Return `input_ids` and `labels` (L,), and `pixel_values` (3, H, W) of an image."""
        conversation = self.conversations[item]
        ids, labels = self.encode(conversation)
        encoded = {
            "input_ids": torch.tensor(ids[: self.max_length]),
            "labels": torch.tensor(labels[: self.max_length]),
        }
        if conversation.image is not None:
            image = load_images([open_image(conversation.image)])
            pixels = self.image_processor(images=image, return_tensors="pt")["pixel_values"]
            encoded["pixel_values"] = pixels[0]
        return encoded

    def encode(self, conversation: Conversation) -> tuple[list[int], list[int]]:
        """Token ids and labels, not yet truncated; image tokens and all that is asked are -100."""
        pieces = self._word(conversation)
        text = "".join(piece for piece, _ in pieces)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans, end = [], 0
        for piece, is_answer in pieces:
            end += len(piece)
            spans += [(end - len(piece), end)] if is_answer else []
        ids: list[int] = []
        labels: list[int] = []
        for token, (start, stop) in zip(
            encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            is_image = token == self.image_token_id
            count = self.num_image_tokens if is_image else 1
            # A token over the seam between question and answer is the question's.
            learned = not is_image and any(a <= start and stop <= b for a, b in spans)
            ids += [token] * count
            labels += [token if learned else NOT_LEARNED] * count
        return ids, labels

    def _word(self, conversation: Conversation) -> list[tuple[str, bool]]:
        """The text in pieces, each with whether it is an answer."""
        if self.wording == "plain":
            begin = self.tokenizer.bos_token if self._begins_texts() else ""
            return [
                piece
                for question, answer in conversation.turns
                for piece in ((begin + question, False), (answer + self.tokenizer.eos_token, True))
            ]
        pieces: list[tuple[str, bool]] = []
        messages: list[dict[str, str]] = []
        before = ""
        for question, answer in conversation.turns:
            messages.append({"role": "user", "content": question})
            asked = self._render(messages, add_generation_prompt=True)
            messages.append({"role": "assistant", "content": answer})
            answered = self._render(messages)
            if not asked.startswith(before) or not answered.startswith(asked):
                raise ValueError(
                    "The chat template words earlier turns anew when one is added, so that no text "
                    "holds every answer as it was asked for. Give another: --chat-template FILE."
                )
            pieces += [(asked[len(before) :], False), (answered[len(asked) :], True)]
            before = answered
        return pieces

    def _begins_texts(self) -> bool:
        begin = self.tokenizer.bos_token_id
        return begin is not None and self.tokenizer("")["input_ids"][:1] == [begin]

    def _render(self, messages: list[dict[str, str]], **settings: Any) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **settings)

    def _take(self, conversation: Conversation, errors: ErrorCollector) -> None:
        """Tokenize a conversation once, and keep it or note its errors."""
        ids, labels = self.encode(conversation)
        num_images = int(conversation.image is not None)
        kinds = []
        if ids.count(self.image_token_id) != num_images * self.num_image_tokens:
            kinds.append(f"{PLACEHOLDER} in a text")
        if all(label == NOT_LEARNED for label in labels[1 : self.max_length]):
            kinds.append(f"no answer within {self.max_length} tokens")
        for kind in kinds:
            errors.add(kind, conversation.name)
        if not kinds:
            self.conversations.append(conversation)
            self.num_truncated += len(ids) > self.max_length


class PadOnTheRight:
    """Makes a batch: `input_ids`, `attention_mask`, `labels` (B, L), and the images there are."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Pad to the longest; `pixel_values` are (images, 3, H, W), in the items' order."""
        batch = {
            name: torch.nn.utils.rnn.pad_sequence(
                [item[name] for item in items], batch_first=True, padding_value=value
            )
            for name, value in (("input_ids", self.pad_token_id), ("labels", NOT_LEARNED))
        }
        lengths = torch.tensor([len(item["input_ids"]) for item in items])
        longest = batch["input_ids"].shape[1]
        batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
        images = [item["pixel_values"] for item in items if "pixel_values" in item]
        if images:
            batch["pixel_values"] = torch.stack(images)
        return batch
