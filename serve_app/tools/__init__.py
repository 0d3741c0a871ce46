"""Command lines; no other module imports them."""
