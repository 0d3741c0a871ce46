"""What LoRAs cost: mixed in one batch, forty of them in turns, and with denoisers killed meanwhile."""
