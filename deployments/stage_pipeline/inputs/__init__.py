"""What callers may give a pipeline: a field for each argument of its call, told by its signature and docstring."""
