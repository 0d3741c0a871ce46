"""Which pipelines are served, and how: every class that diffusers exports, against diffusers' own tests."""
