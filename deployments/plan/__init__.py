"""The memory plan: what a checkpoint needs on a GPU, told without its weights, and what is chosen for given cards.

Read in this order: measured (what is found), process (the walk as a process of its own), measure (the whole of it),
headers (what the files declare), session (the pipeline's call on the meta device), peak (bytes that live at once),
cards (GPUs by name), budget (what a choice needs on each card), ranks (a denoiser over cards), choose (the choice, and
why).
"""
