"""A denoiser on several devices: one process for each, which make every forward together."""
