"""Stage 3: train the text adapter, projections, temperature and, optionally, the towers."""
