"""The pipeline's own call in a small size, by which it is found out what matters."""
