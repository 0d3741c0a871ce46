"""Training and judging of the embedded emoji models."""
