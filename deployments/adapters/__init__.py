"""LoRA adapters: where they come from, which are in memory, and how a forward uses them."""
