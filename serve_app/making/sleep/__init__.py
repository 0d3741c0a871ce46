"""Models that sleep: whether one does, how it is woken, what is known of it meanwhile."""
