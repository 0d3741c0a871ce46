"""Make special_addresses.csv, the table of serve_app.addresses, from IANA's registries of special-purpose addresses."""

from __future__ import annotations

import argparse
import csv
import datetime
import io
import ipaddress
import re
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

REGISTRY = "https://www.iana.org/assignments/iana-{0}-special-registry/iana-{0}-special-registry-1.csv"
TABLE = Path(__file__).parents[1] / "special_addresses.csv"
FOOTNOTE = re.compile(r"\s*\[\d+\]")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m serve_app.tools.special_addresses", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="the registries' CSV files; default: fetched from IANA")
    parser.add_argument("--read-on", default=f"{datetime.date.today()}", help="the day of the files, as 2026-07-18")
    asked = parser.parse_args(arguments)
    texts = [file.read_text(encoding="utf-8") for file in asked.files] or [fetched("ipv4"), fetched("ipv6")]
    TABLE.write_text(table(texts, asked.read_on), encoding="utf-8")
    print(f"{TABLE} is written; look at what changed before you commit it")
    return 0


def fetched(family: str) -> str:
    with urllib.request.urlopen(REGISTRY.format(family), timeout=30) as answer:
        return str(answer.read().decode("utf-8"))


def table(registries: list[str], read_on: str) -> str:
    """The table as text: a row for each network of the registries, `globally_reachable` as they have it."""
    file = io.StringIO()
    file.write(f"# {REGISTRY.format('ipv4')} and the same of ipv6, read on {read_on}\n")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("network", "globally_reachable", "name"))
    for registry in registries:
        writer.writerows(rows(registry))
    return file.getvalue()


def rows(registry: str) -> Iterator[tuple[str, str, str]]:
    """One a network: IANA writes several into a cell, footnotes behind values, nothing where a row has ended."""
    for row in csv.DictReader(io.StringIO(registry)):
        reachable = FOOTNOTE.sub("", row["Globally Reachable"]).strip()
        name = " ".join(row["Name"].split())
        for network in FOOTNOTE.sub("", row["Address Block"]).split(","):
            yield str(ipaddress.ip_network(network.strip())), reachable or "N/A", name


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
