"""The server that a command asks: elsewhere by its address, or one of this command's own on this machine."""
