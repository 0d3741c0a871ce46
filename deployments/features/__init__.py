"""What a single request may add to its denoising."""
