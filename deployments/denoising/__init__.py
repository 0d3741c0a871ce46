"""The denoiser stage without Ray."""
