"""What diffusers' split of a sequence over ranks leaves out."""
