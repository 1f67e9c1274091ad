"""The client's address: the peer of the connection, or what a trusted proxy says of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from starlette.types import Scope

UNIX = "unix"  # the peer of a Unix socket, which has no address
UNKNOWN = "unknown"

IPV6_PREFIX = 64  # a subscriber has at least as many addresses

Address = IPv4Address | IPv6Address


@dataclass(frozen=True)
class TrustedProxies:
    """The peers whose `X-Forwarded-For` is believed."""

    networks: tuple[IPv4Network | IPv6Network, ...] = ()
    unix: bool = False

    def __bool__(self) -> bool:
        return bool(self.networks) or self.unix

    def trust(self, address: Address | None) -> bool:
        """Whether the peer at `address` is a trusted proxy; None is the peer of a Unix socket."""
        return self.unix if address is None else any(address in network for network in self.networks)


@lru_cache(16)
def parse_proxies(text: str) -> TrustedProxies:
    """Addresses, networks and the word `unix`, separated by commas. Raises ValueError for anything else."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    networks = tuple(ip_network(name) for name in names if name != UNIX)
    return TrustedProxies(networks, UNIX in names)


def client_address(scope: Scope) -> str:
    """Whom to count the request of `scope` against: an IPv4 address or an IPv6 network of 64 bits.

    It is the peer of the connection, unless that is one of CAMCAL_TRUSTED_PROXIES: then it is the last address in
    X-Forwarded-For that is not of such a proxy. Nobody else's X-Forwarded-For is read.
    """
    address = _client(scope)
    if isinstance(address, IPv6Address):
        return str(IPv6Network((int(address), IPV6_PREFIX), strict=False))
    return str(address)


def exact_address(scope: Scope) -> str:
    """As `client_address`, but the whole address, for logs."""
    return str(_client(scope))


def _client(scope: Scope) -> Address | str:
    host = scope["client"][0] if scope.get("client") else UNIX
    peer = None if host == UNIX else _parse(host)
    if peer is None and host != UNIX:
        return UNKNOWN  # no server that speaks TCP gives such a peer
    trusted = parse_proxies(scope["app"].state.settings.trusted_proxies)
    if not trusted:
        return peer or UNIX
    for hop in _hops(scope["headers"]):
        if not trusted.trust(peer) or (before := _parse(_without_port(hop))) is None:
            break
        peer = before
    return peer or UNIX


def _hops(headers: Iterable[tuple[bytes, bytes]]) -> Iterable[str]:
    """The entries of X-Forwarded-For, the last first: each proxy appends the peer that it sees."""
    line = b",".join(value for name, value in headers if name == b"x-forwarded-for")
    return (hop.strip() for hop in reversed(line.decode("latin-1").split(",")))


def _without_port(hop: str) -> str:
    """`hop` without the port that some proxies add: 203.0.113.7:4711 or [2001:db8::7]:4711."""
    if hop.startswith("["):
        return hop[1:].partition("]")[0]
    return hop.partition(":")[0] if hop.count(":") == 1 else hop


@lru_cache(4096)
def _parse(text: str) -> Address | None:
    """The address that `text` is, or None. An IPv4 address within IPv6, as a socket for both has it, is IPv4."""
    try:
        address = ip_address(text)
    except ValueError:
        return None
    if isinstance(address, IPv4Address):
        return address
    return address.ipv4_mapped or IPv6Address(int(address))  # without the zone of a link-local one
