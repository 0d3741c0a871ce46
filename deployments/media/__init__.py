"""Pixels, files and the processes that write them."""
