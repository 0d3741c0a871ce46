"""Thousands of hostile requests against real models: `make test TESTS=fuzz`."""
