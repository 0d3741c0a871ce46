"""Measured against something else, in one run, as ratios."""
