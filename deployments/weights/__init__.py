"""Checkpoints: found, read, streamed and loaded."""
