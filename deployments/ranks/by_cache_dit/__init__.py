"""The sequence of a denoiser split by cache-dit's plans, for models that diffusers has none for, or none that works."""
