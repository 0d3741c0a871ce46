"""Which forwards share a batch, how they become one, and whether that is right and worth it."""
