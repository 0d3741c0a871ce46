"""What wraps the making of media; each layer is one file and one row."""
