"""What a command shows: progress and warnings on stderr, tables, pictures in the terminal."""
