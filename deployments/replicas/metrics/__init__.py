"""What a replica measures, told to its meter: a file for each part of it."""
