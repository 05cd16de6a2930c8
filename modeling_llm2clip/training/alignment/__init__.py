"""Stage 3: trains text adapter, projections, temperature and, by choice, the towers."""
