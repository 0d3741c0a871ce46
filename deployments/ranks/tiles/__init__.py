"""An autoencoder's tiles made by several ranks: the calls of its coder are recorded, made anywhere, and played back."""
