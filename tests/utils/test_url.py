"""Which addresses count as public; downloads themselves are tested in ``tests/guarantees/test_bad_inputs.py``."""

import pytest

from decinb.utils.url import is_public


@pytest.mark.parametrize(
    "address", ["93.184.216.34", "8.8.8.8", "2606:2800:220:1:248:1893:25c8:1946", "::ffff:8.8.8.8"]
)
def test_addresses_on_the_internet_are_public(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "100.64.0.1",
        "169.254.169.254",
        "192.88.99.1",  # the old relays of 6to4
        "224.0.0.1",
        "239.1.2.3",
        "255.255.255.255",
        "0.0.0.0",
        "::1",
        "::",
        "fe80::1%eth0",
        "fc00::1",
        "fec0::1",  # site-local
        "ff02::1",
        "ff0e::1",  # multicast, of global scope
        "::ffff:127.0.0.1",
        "::ffff:0:127.0.0.1",
        "::127.0.0.1",
        "::8.8.8.8",
        "64:ff9b::127.0.0.1",  # NAT64
        "64:ff9b::8.8.8.8",
        "64:ff9b:1::10.0.0.1",
        "2002:7f00:1::1",  # 6to4 of 127.0.0.1
        "2002:808:808::1",
        "2001:0:0:1::1",  # Teredo
        "2001:db8::1",
    ],
)
def test_other_addresses_are_not_public(address):
    assert not is_public(address)
