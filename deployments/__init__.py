"""The three stages of a diffusion pipeline as Ray Serve deployments, and the plain classes they wrap."""
