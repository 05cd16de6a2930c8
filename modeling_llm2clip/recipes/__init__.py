"""Run all stages of LLM2CLIP training from one YAML file."""
