"""Where outputs are kept. Knows nothing of HTTP."""
