"""Names and templates of the known prompts; imports nothing, so that `--help` is quick."""

from __future__ import annotations

# Templates of the official text towers (upstream `llm2vec.py`, prepare_for_tokenization). The
# tokenizer's own beginning-of-text token comes in front, where it has one.
PROMPT_PRESETS = {
    "llama-3": "<|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>",
    "chatml": "<|im_start|>user\n{text}<|im_end|>",
    "mistral": "[INST] {text} [/INST]",
    "llama-2": "[INST] {text} [/INST]",
    "gemma": "<start_of_turn>user\n{text}<end_of_turn>",
    "phi-3": "<|user|>\n{text}<|end|>\n",
    "none": "{text}",
}
CHAT_TEMPLATE = "chat-template"
PROMPT_NAMES = (*PROMPT_PRESETS, CHAT_TEMPLATE)
