"""What a request's pipeline rewires in the denoiser, for its own forwards alone."""
