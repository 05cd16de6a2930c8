"""How good the vectors are. The metrics know no model."""
