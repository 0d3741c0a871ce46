"""Two styles of emoji-flux as LoRAs, sketch and neon: their pictures, training, judge and page."""
