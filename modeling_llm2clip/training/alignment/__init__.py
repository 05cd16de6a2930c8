"""Stage 3: adapter, projections, temperature, and the vision tower if wanted, against the LLM."""
