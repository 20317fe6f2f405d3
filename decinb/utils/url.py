"""Download an image from a URL: from public addresses only, with limits on its size and on the time it takes.

Proxies are used as the environment says (``HTTP_PROXY``, ``HTTPS_PROXY``, ``NO_PROXY``). A proxy looks host names up
itself, so behind a proxy only hosts that are given as IP addresses can be checked here.
"""

import ipaddress
import re
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.utils import get_environ_proxies, select_proxy
from urllib3.exceptions import HTTPError

from decinb.errors import InputError, reason
from decinb.utils.validation import short_repr

MAX_BYTES = 20_000_000
MAX_SECONDS = 20.0  # in all, redirects included
CONNECT_SECONDS = 5.0
READ_SECONDS = 10.0  # of silence
MAX_REDIRECTS = 3
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")  # all IPv6 addresses of hosts on the internet
RELAYS = ipaddress.ip_network("192.88.99.0/24")  # of 6to4, until it was given up
HEADERS = {"User-Agent": "decinb", "Accept": "image/*", "Accept-Encoding": "identity"}


def fetch(url: str, allow_private: bool = False) -> tuple[bytes, str]:
    """Download the body behind a URL; return it, and the host and status for later messages.

    At most three redirects are followed, each checked like the first URL.

    Args:
        url: an http or https URL.
        allow_private: permit the addresses of this machine and its network.

    Raises:
        InputError: the URL is not allowed, fails, is too large or takes too long; the message names the URL, and the
            host and status if one answered.
    """
    name, host, deadline = f"image {_shown(url)}", "", time.monotonic() + MAX_SECONDS
    with requests.Session() as session:
        session.headers = HEADERS
        session.auth = lambda request: request  # without it, requests sends a password from ~/.netrc
        for scheme in ("http://", "https://"):
            session.mount(scheme, _CheckedAdapter(name, allow_private))
        for _ in range(MAX_REDIRECTS + 1):
            try:
                host = urlsplit(url).hostname or ""
                response, body = _finish_by(deadline, _get, session, url, name, allow_private)
                if not response.is_redirect:
                    return body, f"{host}, status {response.status_code}"
                url = urljoin(url, response.headers["location"])
            except InputError:
                raise
            except TimeoutError as error:
                raise InputError(f"{name}: {host} took more than {MAX_SECONDS:g} s") from error
            except (OSError, ValueError, HTTPError) as error:
                raise InputError(_failure(error, name, host)) from error
    raise InputError(f"{name} was redirected more than {MAX_REDIRECTS} times, last by {host} to {_shown(url)}")


def is_public(address: str) -> bool:
    """Return whether an IP address is that of one host on the internet, rather than of this machine or its network.

    IPv6 addresses that stand for an IPv4 address (NAT64, 6to4, Teredo and older forms) can lead back to this network,
    so they are not public, except ``::ffff:a.b.c.d``, which the system itself reads as ``a.b.c.d``.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6 and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    if not ip.is_global or ip.is_multicast:
        return False
    if ip.version == 4:
        return ip not in RELAYS
    return ip in GLOBAL_UNICAST and ip.sixtofour is None and ip.teredo is None


def _finish_by(deadline: float, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a thread, and raise TimeoutError at the deadline.

    requests limits each wait for a host, but neither the sum of them nor the lookup of the host's name.
    """
    result: Future[Any] = Future()

    def run() -> None:
        try:
            result.set_result(function(*arguments))
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return result.result(max(0, deadline - time.monotonic()))


def _get(session: requests.Session, url: str, name: str, allow_private: bool) -> tuple[requests.Response, bytes]:
    """Request a URL once; return the response and its body, which is empty for a redirect."""
    _check(url, name, allow_private)
    timeout = (CONNECT_SECONDS, READ_SECONDS)
    with session.get(url, timeout=timeout, stream=True, allow_redirects=False) as response:
        if response.is_redirect:
            return response, b""
        name = f"{name}: {urlsplit(url).hostname}"
        if response.status_code != 200:
            raise InputError(f"{name} answered with status {response.status_code}")
        length = response.raw.length_remaining or 0  # 0 if the server does not announce it
        body = response.raw.read(MAX_BYTES + 1) if length <= MAX_BYTES else b""
    if max(length, len(body)) > MAX_BYTES:
        raise InputError(f"{name}, status 200: more than {MAX_BYTES // 10**6} MB")
    if len(body) < length:
        raise InputError(f"{name}, status 200: the connection broke after {len(body)} of {length} bytes")
    kind = response.headers.get("content-type", "")
    if kind.startswith("text/html"):
        raise InputError(f"{name}, status 200: a web page ({short_repr(kind)}), not an image")
    return response, body


def _check(url: str, name: str, allow_private: bool) -> None:
    """Refuse a URL of another scheme, one with a password, and one whose host is unknown or has a private address."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        leads = f" (it leads to {shown})" if (shown := _shown(url)) not in name else ""
        raise InputError(f"{name} must be an http or https URL without a user name{leads}")
    is_proxied = select_proxy(url, get_environ_proxies(url)) is not None
    try:
        only_addresses = socket.AI_NUMERICHOST if is_proxied else 0
        found = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_STREAM, flags=only_addresses)
    except (OSError, ValueError) as error:
        if is_proxied:
            return
        raise InputError(f"{name}: the host {short_repr(parts.hostname)} is not known ({error})") from error
    if not allow_private and not all(is_public(str(address[4][0])) for address in found):
        raise _private(name, parts.hostname)


class _CheckedAdapter(HTTPAdapter):
    """Check the address of each connection itself: a host name may lead elsewhere when it is looked up again."""

    def __init__(self, name: str, allow_private: bool):
        super().__init__()
        self.name, self.allow_private = name, allow_private
        self.sockets: list[socket.socket] = []

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
        pool, adapter = super().get_connection_with_tls_context(*args, **kwargs), self

        class CheckedConnection(type(pool).ConnectionCls):
            def connect(self) -> None:
                super().connect()  # the request itself is sent later
                adapter.sockets.append(self.sock)
                allowed = adapter.allow_private or self.proxy is not None
                if not allowed and not is_public(self.sock.getpeername()[0]):
                    raise _private(adapter.name, self.host)

        pool.ConnectionCls = CheckedConnection
        return pool

    def close(self) -> None:
        for connected in self.sockets:  # ends a thread that still reads after the deadline
            with suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)
        super().close()


def _private(name: str, host: str) -> InputError:
    return InputError(f"{name} leads to {host}, a private address; allow_private=True of load_image permits that")


def _failure(error: BaseException, name: str, host: str) -> str:
    """Return a message with the first cause, which requests and urllib3 wrap several times."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    if isinstance(error, TimeoutError):
        return f"{name}: {host} does not answer"
    return f"{name} could not be fetched from {host}: {type(error).__name__}, {reason(error)}"


def _shown(url: str) -> str:
    """Return a URL as an error message repeats it: short, and without a password."""
    return short_repr(re.sub("//[^/@]*@", "//…@", url))
