"""Make an API key: `new LABEL` prints the line for the file of `api_keys_file`, and the key once."""

from __future__ import annotations

import argparse
import sys

from serve_app.api_keys import new_key


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m serve_app.tools.keys", description=__doc__)
    parser.add_argument("command", choices=["new"])
    parser.add_argument("label", help="who uses the key: letters, digits and . _ @ -")
    label = parser.parse_args(arguments).label
    try:
        key, line = new_key(label)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"add to the file of api_keys_file:  {line}")
    print(f"the key, shown only now:           {key}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
