"""In which precision the weights of a component are held, where that is another than the dtype it computes in."""
