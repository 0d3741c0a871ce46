"""How a process of stages fits on its device: autoencoders by tiles, weights that wait on the host, out of memory."""
