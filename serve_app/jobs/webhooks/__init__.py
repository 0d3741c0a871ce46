"""The ends of jobs, told to the addresses that their callers named."""
