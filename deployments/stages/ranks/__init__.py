"""A denoiser stage that several ranks compute: what cannot be had beside, and what each of the ranks builds."""
