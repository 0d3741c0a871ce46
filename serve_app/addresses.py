"""Which addresses are of the public internet: by IANA's registries of special-purpose addresses, checked in as data.

`special_addresses.csv` is made by `python -m serve_app.tools.special_addresses`; its first line says from when it is.
"""

from __future__ import annotations

import csv
import ipaddress
from functools import cache
from pathlib import Path

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

TABLE = Path(__file__).with_name("special_addresses.csv")
IPV6_UNICAST = ipaddress.IPv6Network("2000::/3")  # all that IANA has ever given out for the public internet
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # IPv4 addresses written as IPv6, for a translating router
NOT_IN_THE_REGISTRIES: tuple[Network, ...] = (
    ipaddress.IPv4Network("224.0.0.0/4"),  # multicast has a registry of its own
    ipaddress.IPv4Network("168.63.129.16/32"),  # Azure's platform, of a public block, answers its virtual machines
)
ISATAP = (0x0000_5EFE, 0x0200_5EFE)  # the upper half of an interface's id, when its lower half is an IPv4 address


def is_public(address: Address) -> bool:
    """Whether the address is globally reachable; of IPv4 inside of IPv6, also whether that is."""
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in NOT_IN_THE_REGISTRIES) and _is_reachable(address, True)
    if address.ipv4_mapped is not None:
        return is_public(address.ipv4_mapped)
    return _is_reachable(address, address in IPV6_UNICAST) and all(map(is_public, _inner_addresses(address)))


def special_networks() -> dict[Network, bool]:
    """Each network of the registries, and whether it is globally reachable; where IANA does not say, it is not."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        return {ipaddress.ip_network(row["network"]): row["globally_reachable"] == "True" for row in rows}


def _is_reachable(address: Address, where_unlisted: bool) -> bool:
    """By the smallest network that has it, as the registries mean their rows."""
    return next((reachable for network, reachable in _smallest_first() if address in network), where_unlisted)


@cache
def _smallest_first() -> list[tuple[Network, bool]]:
    return sorted(special_networks().items(), key=lambda row: -row[0].prefixlen)


def _inner_addresses(address: ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """Those that a router on the way would take out of it; 6to4 and Teredo are not reachable by their own rows."""
    last = ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    is_isatap = (int(address) >> 32) & 0xFFFF_FFFF in ISATAP
    return [last] if is_isatap or address in NAT64 else []
