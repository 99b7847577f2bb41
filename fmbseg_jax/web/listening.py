"""Where the page listens, and how this process reaches it, whatever proxies there are."""

from __future__ import annotations

import errno
import importlib.util
import re
import socket
from collections.abc import Iterable, MutableMapping

from fmbseg_jax.errors import UserError
from fmbseg_jax.io import machine

_HERE = "localhost", "127.0.0.1", "::1"
_PROXIES = "all_proxy", "http_proxy", "https_proxy"


def check_host(host: str) -> None:
    """Raises UserError where `host` is no address of this machine."""
    try:
        family, *_, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind(address)
    except (OSError, UnicodeError) as error:  # of a name that no host can have, the latter
        machine.let_through(error)
        code = getattr(error, "errno", 0)
        without = (":" in host and code in _NO_IPV6) or (
            host == "::1" and code == errno.EADDRNOTAVAIL
        )
        told = "this machine has no IPv6, or it is switched off: " if without else ""
        raise UserError(
            f"--host={host} is no address of this machine ({told}{error}). Give one that it "
            "has, 127.0.0.1 for this machine alone, or 0.0.0.0 for every machine that reaches it."
        ) from None


_NO_IPV6 = errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT


def names(host: str, others: Iterable[str]) -> frozenset[str]:
    """What requests to a page may call its host; empty where it listens to every machine.

    Whoever can make a browser believe that a name of his is this machine's address would else read
    the page from within his own (DNS rebinding).
    """
    if host in ("0.0.0.0", "::"):
        return frozenset()
    return frozenset(name.lower().strip("[].") for name in (host, *_HERE, *others))


def host_of(header: str) -> str:
    """The host in a Host header, which may have a port: `[::1]:7860` → `::1`."""
    found = re.fullmatch(r"(?:\[([\da-f:.]+)\]|([\w.-]+))(?::\d+)?", header.lower())
    return (found[1] or found[2]).rstrip(".") if found else header[:100]


def in_address(host: str) -> str:
    """A host as it stands in an address: of IPv6, in brackets."""
    return f"[{host}]" if ":" in host else host


def reach_directly(host: str, environment: MutableMapping[str, str]) -> None:
    """Keeps proxies out of the way of a process to itself; what was excepted stays so.

    A SOCKS proxy that httpx could not use is taken out: it would refuse to start.
    """
    kept = ",".join(environment.get(name, "") for name in ("no_proxy", "NO_PROXY")).split(",")
    names = [name.strip() for name in (*kept, *_HERE, host) if name.strip()]
    for name in ("no_proxy", "NO_PROXY"):
        environment[name] = "*" if "*" in names else ",".join(dict.fromkeys(names))
    if importlib.util.find_spec("socksio") is None:
        for name in (*_PROXIES, *map(str.upper, _PROXIES)):
            if environment.get(name, "").lower().startswith("socks"):
                del environment[name]
