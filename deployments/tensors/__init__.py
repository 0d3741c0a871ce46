"""Values of pipelines: trees of tensors, and how they cross a process boundary."""
