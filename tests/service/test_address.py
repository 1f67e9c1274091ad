from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from camcal.service.address import client_address, exact_address, parse_proxies

PROXIES = "10.0.0.0/8,2001:db8:ffff::/48,unix"


def scope(peer: str | None, *forwarded: str, trusted: str = PROXIES) -> dict[str, Any]:
    app = SimpleNamespace(state=SimpleNamespace(settings=SimpleNamespace(trusted_proxies=trusted)))
    headers = [(b"x-forwarded-for", line.encode("latin-1")) for line in forwarded]
    return {"app": app, "client": peer and (peer, 4711), "headers": headers}


def test_peer_is_the_client() -> None:
    assert client_address(scope("203.0.113.7")) == "203.0.113.7"
    assert client_address(scope("10.1.2.3")) == "10.1.2.3"  # a request of the proxy itself
    assert client_address(scope(None)) == "unix"
    assert client_address(scope("testclient")) == "unknown"


def test_ipv6_clients_share_64_bits() -> None:
    one, other = scope("2001:db8:1:2:aaaa::1"), scope("2001:db8:1:2:bbbb::2")
    assert client_address(one) == client_address(other) == "2001:db8:1:2::/64"
    assert exact_address(one) == "2001:db8:1:2:aaaa::1"
    assert client_address(scope("fe80::1%eth0")) == "fe80::/64"


def test_ipv4_through_a_socket_for_both() -> None:
    assert client_address(scope("::ffff:203.0.113.7")) == exact_address(scope("::ffff:203.0.113.7")) == "203.0.113.7"
    assert client_address(scope("::ffff:10.1.2.3", "203.0.113.7")) == "203.0.113.7"


def test_forwarded_address_of_a_stranger_is_not_believed() -> None:
    assert client_address(scope("203.0.113.7", "198.51.100.1")) == "203.0.113.7"
    assert client_address(scope("10.1.2.3", "198.51.100.1", trusted="")) == "10.1.2.3"


@pytest.mark.parametrize(
    ("forwarded", "client"),
    [
        (["198.51.100.1"], "198.51.100.1"),
        (["1.2.3.4, 198.51.100.1"], "198.51.100.1"),  # the client wrote the first
        (["1.2.3.4", "198.51.100.1, 10.9.9.9"], "198.51.100.1"),  # two proxies
        (["10.8.8.8, 10.9.9.9"], "10.8.8.8"),
        (["198.51.100.1:4711"], "198.51.100.1"),
        (["[2001:db8:1:2::3]:4711"], "2001:db8:1:2::/64"),
        (["2001:db8:1:2::3, 2001:db8:ffff::1"], "2001:db8:1:2::/64"),
        (["198.51.100.1, rubbish"], "10.1.2.3"),
        (["198.51.100.1, \xff\xfe"], "10.1.2.3"),
        (["198.51.100.1, "], "10.1.2.3"),
        ([""], "10.1.2.3"),
        (["rubbish, 10.9.9.9"], "10.9.9.9"),
        (["[, 999.1.1.1"], "10.1.2.3"),
    ],
)
@pytest.mark.parametrize("peer", ["10.1.2.3", None])
def test_trusted_proxy_names_the_client(peer: str | None, forwarded: list[str], client: str) -> None:
    expected = "unix" if peer is None and client == "10.1.2.3" else client
    assert client_address(scope(peer, *forwarded)) == expected


@pytest.mark.parametrize("text", ["localhost", "10.0.0.1/8", "10.0.0.0/33", "*", "10.0.0.0/8;::1"])
def test_not_a_network(text: str) -> None:
    with pytest.raises(ValueError, match="does not appear|has host bits set"):
        parse_proxies(text)
