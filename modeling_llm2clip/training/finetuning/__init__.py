"""Stage 1: caption-contrastive fine-tuning of the LLM."""
