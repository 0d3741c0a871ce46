"""The work of each stage, without Ray."""
