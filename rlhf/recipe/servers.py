"""Addresses of servers: what is one, what is on this machine, what travels unencrypted. No torch."""

from __future__ import annotations

import ipaddress
import os
from urllib.parse import urlsplit

from rlhf.errors import UserError
from rlhf.recipe.wording import shown


def addresses(url: str) -> list[str]:
    """The servers of a ``url`` key: one, or several with commas between them that hold the same model."""
    return [part.strip().rstrip("/") for part in url.split(",") if part.strip()]


def wrong_addresses(url: str) -> str | None:
    """Why a ``url`` key cannot work; None where it can."""
    given = addresses(url)
    if not given:
        return "names no server; write http://host:port"
    if len(set(given)) < len(given):
        return "names a server twice; its second half of the work would wait for the first"
    return next((said for address in given if (said := _wrong(address)) is not None), None)


def _wrong(address: str) -> str | None:
    try:
        parts = urlsplit(address)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        return f"{shown(address)} is no address ({error}); write http://host:port"
    if parts.scheme not in ("http", "https") or not host or not _sayable(address):
        return f"{shown(address)} is no address of a server; write http://host:port"
    if "@" in parts.netloc:
        return f"{shown(address)} holds a name or password; put the token into a variable and name it in token_env"
    if parts.query or parts.fragment:
        return f"{shown(address)} has something behind its path; the server's own paths are added to it"
    numeric = _numeric(host)
    if numeric is None and "." in host and host.replace(".", "").isdecimal():
        return f"{shown(address)} is no address: {shown(host)} has the form of an IP address and is none"
    if numeric is not None and numeric.is_link_local:
        return f"{shown(address)} is link-local, where clouds hand out credentials; name the server's own address"
    return None


def _sayable(address: str) -> bool:
    """Neither spaces nor control characters, which no address holds."""
    return address.isprintable() and " " not in address


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the host."""
    found = _numeric(host)
    return host == "localhost" or (found is not None and found.is_loopback)


def unencrypted(url: str) -> list[str]:
    """The servers of a ``url`` key that are reached over a network in plain text."""
    parts = {address: urlsplit(address) for address in addresses(url)}
    return [address for address, at in parts.items() if at.scheme == "http" and not is_loopback(at.hostname or "")]


def token_of(variable: str) -> str:
    """The token in an environment variable, which alone is ever named. Raises UserError."""
    token = os.environ.get(variable, "").strip()
    if not token:
        raise UserError(f"the environment variable {variable} is not set, or empty; export the token in it")
    if not (token.isascii() and token.isprintable()):
        raise UserError(f"the token in {variable} holds characters that an HTTP header cannot; use plain ASCII")
    return token


def _numeric(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
