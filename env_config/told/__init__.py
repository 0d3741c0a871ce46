"""What is told of the variables: their table in the docs, and the values that a process has."""
