"""The only code that knows HTTP: bodies come in, answers go out."""
