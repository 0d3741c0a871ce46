"""`python -m serve_app.tools`: the command `triptych`."""

from serve_app.tools.command.main import main

if __name__ == "__main__":
    main()
