"""LoRA: adapters that a request names, at scales of its own."""
