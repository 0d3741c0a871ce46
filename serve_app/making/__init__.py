"""What is made: a GenerationRequest becomes Media."""
