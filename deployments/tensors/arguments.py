"""The names that the arguments of denoising models have, whatever their family."""

TIME_PARAMETERS = frozenset({"timestep", "timesteps", "timestep_ratio", "timestep_img", "t", "r", "sigma"})
LATENT_PARAMETERS = ("hidden_states", "sample", "x", "latents")  # the noisy latents
