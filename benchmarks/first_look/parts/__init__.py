"""What is looked at, a file each."""
