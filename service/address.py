"""Client addresses: the peer of the connection, or the address that a trusted proxy forwards."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from starlette.types import Scope

UNIX = "unix"  # the peer of a Unix socket has no address
UNKNOWN = "unknown"

IPV6_PREFIX = 64  # bits; internet providers assign each subscriber at least a /64

Address = IPv4Address | IPv6Address


@dataclass(frozen=True)
class TrustedProxies:
    """Peers whose `X-Forwarded-For` header is trusted."""

    networks: tuple[IPv4Network | IPv6Network, ...] = ()
    unix: bool = False

    def __bool__(self) -> bool:
        return bool(self.networks) or self.unix

    def trust(self, address: Address | None) -> bool:
        """Whether the peer at `address` is a trusted proxy. None stands for the peer of a Unix socket."""
        return self.unix if address is None else any(address in network for network in self.networks)


@lru_cache(16)
def parse_proxies(text: str) -> TrustedProxies:
    """Parse a comma-separated list of addresses, networks and the word `unix`. Raises ValueError if it is invalid."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    networks = tuple(ip_network(name) for name in names if name != UNIX)
    return TrustedProxies(networks, UNIX in names)


def client_address(scope: Scope) -> str:
    """The client that per-address limits apply to: an IPv4 address or a /64 IPv6 network.

    This is the peer of the connection. If the peer is one of CAMCAL_TRUSTED_PROXIES, it is the last address in
    X-Forwarded-For that is not a trusted proxy. X-Forwarded-For from any other peer is ignored.
    """
    address = _client(scope)
    if isinstance(address, IPv6Address):
        return str(IPv6Network((int(address), IPV6_PREFIX), strict=False))
    return str(address)


def exact_address(scope: Scope) -> str:
    """Like `client_address`, but the full address, for logs."""
    return str(_client(scope))


def _client(scope: Scope) -> Address | str:
    host = scope["client"][0] if scope.get("client") else UNIX
    peer = None if host == UNIX else _parse(host)
    if peer is None and host != UNIX:
        return UNKNOWN  # never the case with a TCP server
    trusted = parse_proxies(scope["app"].state.settings.trusted_proxies)
    if not trusted:
        return peer or UNIX
    for hop in _hops(scope["headers"]):
        if not trusted.trust(peer) or (previous := _parse(_without_port(hop))) is None:
            break
        peer = previous
    return peer or UNIX


def _hops(headers: Iterable[tuple[bytes, bytes]]) -> Iterable[str]:
    """The entries of X-Forwarded-For in reverse order. Each proxy appends its own peer."""
    line = b",".join(value for name, value in headers if name == b"x-forwarded-for")
    return (hop.strip() for hop in reversed(line.decode("latin-1").split(",")))


def _without_port(hop: str) -> str:
    """`hop` without the port that some proxies append: 203.0.113.7:4711 or [2001:db8::7]:4711."""
    if hop.startswith("["):
        return hop[1:].partition("]")[0]
    return hop.partition(":")[0] if hop.count(":") == 1 else hop


@lru_cache(4096)
def _parse(text: str) -> Address | None:
    """Parse an address; None if it is invalid. IPv4-mapped IPv6 addresses of dual-stack sockets become IPv4."""
    try:
        address = ip_address(text)
    except ValueError:
        return None
    if isinstance(address, IPv4Address):
        return address
    return address.ipv4_mapped or IPv6Address(int(address))  # drops the zone of a link-local address
