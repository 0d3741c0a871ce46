"""Cache-DiT for single requests."""
