"""Which addresses callers may send this server to: every row of IANA's registries, and what is in none of them."""

from __future__ import annotations

import ipaddress
import random
from pathlib import Path

import pytest

import serve_app.tools.special_addresses
from serve_app.addresses import TABLE, Address, Network, is_public, special_networks
from serve_app.tools.special_addresses import main, table

IPV4_MAPPED = ipaddress.ip_network("::ffff:0:0/96")


def ends_and_middle(network: Network) -> list[Address]:
    return [network[index] for index in {0, network.num_addresses // 2, network.num_addresses - 1}]


def is_in_a_smaller_one(address: Address, network: Network) -> bool:
    return any(address in other and other.prefixlen > network.prefixlen for other in special_networks())


@pytest.mark.parametrize("network", special_networks(), ids=str)
def test_an_address_of_the_registries_is_public_where_they_say_so_and_nowhere_else(network: Network) -> None:
    own = [each for each in ends_and_middle(network) if not is_in_a_smaller_one(each, network)]
    if network == IPV4_MAPPED:  # the same as the IPv4 address
        own = own[:1]
    if network == ipaddress.ip_network("64:ff9b::/96"):  # reachable where the IPv4 address in it is
        own = [network[int(ipaddress.ip_address("8.8.8.8"))]]
    assert own
    assert {is_public(each) for each in own} == {special_networks()[network]}


LEADING_INSIDE = (
    "168.63.129.16 224.0.0.1 239.255.255.255 192.0.0.192 100.100.100.200 192.88.99.1 ff0e::1 fec0::1 feff::1 4000::1 "
    "::8.8.8.8 200::1 ::ffff:10.0.0.1 ::ffff:168.63.129.16 64:ff9b::10.0.0.1 64:ff9b:1::8.8.8.8 2002:a00:1:: 2001::1 "
    "2002:808:808:: fd00:ec2::254 fd20:ce::254 2600::5efe:10.0.0.1 2600::200:5efe:10.0.0.1 fe80::1%1"
)
OF_THE_INTERNET = "8.8.8.8 93.184.216.34 168.63.129.15 2606:4700::1111 ::ffff:8.8.8.8 64:ff9b::8.8.8.8"


@pytest.mark.parametrize("address", LEADING_INSIDE.split())
def test_an_address_that_leads_inside_without_a_row_of_its_own_is_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", OF_THE_INTERNET.split())
def test_an_address_of_the_internet_is_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


def test_what_is_public_here_is_global_to_python_too() -> None:
    rng = random.Random(0)
    addresses: list[Address] = [ipaddress.IPv4Address(rng.getrandbits(32)) for _ in range(3000)]
    addresses += [ipaddress.IPv6Address((2 << 124) + rng.getrandbits(124)) for _ in range(1000)]
    public = [each for each in addresses if is_public(each)]
    assert len(public) > 2000
    assert [each for each in public if not each.is_global] == []


HEADER = "Address Block,Name,Globally Reachable\n"


def test_the_table_is_made_from_the_registries_as_iana_writes_them() -> None:
    nat64 = '"192.0.0.170/32, 192.0.0.171/32",NAT64,True\n'
    ipv4 = f"{HEADER}192.0.0.0/24 [2],IETF,False [1]\n{nat64}192.88.99.0/24,Old,\n"
    ipv6 = HEADER + '2002::/16 [3],"6to4\n    relays",N/A [3]\n'
    lines = table([ipv4, ipv6], "2026-07-18").splitlines()
    assert "read on 2026-07-18" in lines[0]
    assert lines[2:] == [
        "192.0.0.0/24,False,IETF",
        "192.0.0.170/32,True,NAT64",
        "192.0.0.171/32,True,NAT64",
        "192.88.99.0/24,N/A,Old",
        "2002::/16,N/A,6to4 relays",
    ]


def test_the_command_writes_the_table_that_the_server_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert serve_app.tools.special_addresses.TABLE == TABLE
    monkeypatch.setattr(serve_app.tools.special_addresses, "TABLE", tmp_path / "table.csv")
    (tmp_path / "ipv4.csv").write_text(HEADER + "10.0.0.0/8,Private-Use,False\n")
    assert main([str(tmp_path / "ipv4.csv"), "--read-on", "2026-07-18"]) == 0
    assert (tmp_path / "table.csv").read_text().endswith("10.0.0.0/8,False,Private-Use\n")
