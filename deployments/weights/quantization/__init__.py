"""Formats of quantized weights."""
