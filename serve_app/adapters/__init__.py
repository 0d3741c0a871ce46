"""The LoRAs that requests may name: those of the configuration, and those that were added while running."""
