"""How the weights of a component get from its files into a model on a device."""
