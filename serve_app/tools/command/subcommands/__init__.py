"""One file for each subcommand of `triptych`; COMMANDS in main.py is their table."""
