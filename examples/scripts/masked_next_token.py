"""Stage 0, optional: adapts an LLM to bidirectional attention by masked next-token prediction.

    python examples/scripts/masked_next_token.py LLM captions.jsonl stage0 --max-steps 1000
    llm2clip build VISION LLM model --prompt chatml --lora stage0

A fifth of the tokens are masked, and each is predicted from the position before it, because that is
where the LLM learned to predict it (LLM2Vec, arXiv:2404.05961; upstream uses a LoRA of rank 16 and
the mask "_"). The authors of LLM2CLIP found that this stage has little effect.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from modeling_llm2clip.base_llm2clip import set_attention_direction
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.training.finetuning.finetune_trainer import name_base_without_path
from modeling_llm2clip.training.trainer_mixins import keep_to_one_gpu


class MaskedNextTokenTrainer(Trainer):
    """Predicts each masked token from the hidden state before it."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Any:
        """Cross-entropy over the masked tokens; labels are -100 elsewhere."""
        labels = inputs.pop("labels")
        outputs = model(**inputs, use_cache=False)
        predicted = outputs.logits[:, :-1].float().flatten(0, 1)
        loss = F.cross_entropy(predicted, labels[:, 1:].flatten(), ignore_index=-100)
        return (loss, outputs) if return_outputs else loss


def main() -> None:
    """Train the LoRA and write it."""
    arguments = _parse()
    torch.manual_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.llm)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "right"  # otherwise, padding precedes a text's first token
    tokenizer.mask_token = arguments.mask
    if tokenizer.mask_token_id in {None, tokenizer.unk_token_id}:
        raise SystemExit(
            f"{arguments.mask!r} is not a token of {arguments.llm}. Use another --mask."
        )
    model, loaded = AutoModelForCausalLM.from_pretrained(
        arguments.llm, dtype=torch.float32, output_loading_info=True
    )
    if loaded["missing_keys"]:
        raise SystemExit(
            f"{arguments.llm} lacks {sorted(loaded['missing_keys'])}, which would stay random. "
            "Use a complete LLM, with its head."
        )
    set_attention_direction(model, bidirectional=True)
    # The LoRA is for the LLM without its head, because later stages load it that way.
    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear")
    model.requires_grad_(False)
    adapted = get_peft_model(model.base_model, config)
    training_arguments = TrainingArguments(
        output_dir=str(arguments.output / "checkpoints"),
        max_steps=arguments.max_steps,
        per_device_train_batch_size=arguments.per_device_train_batch_size,
        learning_rate=arguments.learning_rate,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        seed=arguments.seed,
    )
    keep_to_one_gpu(training_arguments)
    trainer = MaskedNextTokenTrainer(
        model=model,
        args=training_arguments,
        train_dataset=_tokenize(tokenizer, arguments),
        # Every selected token becomes the mask: random or kept tokens teach a causal model nothing.
        data_collator=DataCollatorForLanguageModeling(
            tokenizer,
            mlm_probability=arguments.mask_share,
            mask_replace_prob=1.0,
            random_replace_prob=0.0,
        ),
    )
    trainer.train()
    name_base_without_path(adapted)
    adapted.save_pretrained(str(arguments.output))
    print(f"Wrote {arguments.output}. Next: llm2clip build … --lora {arguments.output}")


def _tokenize(tokenizer: Any, arguments: argparse.Namespace) -> Dataset:
    records = load_records(arguments.data, require_images=False)
    texts = [c for record in records for c in (*record.captions, *record.long_captions)]
    encoded = tokenizer(texts, truncation=True, max_length=arguments.max_length)
    return Dataset.from_dict({"input_ids": encoded["input_ids"]})


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("llm", help="Hub id or folder")
    parser.add_argument("data", help="captions, in any form that llm2clip reads")
    parser.add_argument("output", type=Path)
    parser.add_argument("--max-steps", type=int, default=1000)
    parser.add_argument("--per-device-train-batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--mask", default="_")
    parser.add_argument("--mask-share", type=float, default=0.2)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
