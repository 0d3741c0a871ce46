"""What the process was told: the 45 documented environment variables, read once and checked."""
