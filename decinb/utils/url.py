"""A picture's bytes from a URL: from public addresses, and bounded in size and time while they are read.

Each address is looked up once, checked, and then connected to itself, so that a name cannot lead elsewhere the second
time it is asked for. For the same reason no proxy is used.
"""

import http.client
import io
import ipaddress
import re
import socket
import ssl
import time
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from decinb.errors import InputError
from decinb.utils.validation import short_repr

MAX_BYTES = 20_000_000
MAX_SECONDS = 20.0  # in all, redirects included
CONNECT_SECONDS = 5.0
READ_SECONDS = 10.0  # of silence
MAX_REDIRECTS = 3

PORTS = {"http": 80, "https": 443}
HEADERS = {"User-Agent": "decinb", "Accept": "image/*", "Accept-Encoding": "identity", "Connection": "close"}


def fetch(url: str, allow_private: bool = False) -> tuple[bytes, str]:
    """The body behind a URL, and the host that sent it; after three redirects at most, of which each is checked anew.

    Args:
        url: an http or https address.
        allow_private: follow it into the own network.

    Raises:
        InputError: it leads elsewhere, fails, is too large or takes too long; the message names the URL, and the host
            and status where one answered.
    """
    named, host, deadline = f"image {_shown(url)}", "", time.monotonic() + MAX_SECONDS
    for _ in range(MAX_REDIRECTS + 1):
        try:
            parts = urlsplit(url)
            host = parts.hostname or ""
            addresses = _addresses(parts, named, allow_private)
            response = _ask(parts, addresses, deadline)
            if response.status in (301, 302, 303, 307, 308) and response.getheader("location"):
                url = urljoin(url, response.getheader("location"))
                response.close()
                continue
            if response.status != 200:
                raise InputError(f"{named}: {host} answered with status {response.status}")
            return _body(response, f"{named}: {host}, status {response.status}"), f"{host}, status {response.status}"
        except InputError:
            raise
        except (OSError, ValueError, http.client.HTTPException) as error:
            if time.monotonic() >= deadline:
                raise InputError(f"{named}: {host} took more than {MAX_SECONDS:g} s") from error
            if isinstance(error, TimeoutError):
                raise InputError(f"{named}: {host} does not answer") from error
            why = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise InputError(f"{named} could not be fetched from {host}: {' '.join(why.split())}") from error
    raise InputError(f"{named} was redirected more than {MAX_REDIRECTS} times, last by {host} to {_shown(url)}")


def _shown(url: str) -> str:
    """A URL as an error repeats it: without a password."""
    return short_repr(re.sub("//[^/@]*@", "//…@", url))


def _addresses(parts: SplitResult, named: str, allow_private: bool) -> list[str]:
    """Where a URL's host lies, if one may go there."""
    if parts.scheme not in PORTS or not parts.hostname or parts.username is not None:
        leads = f" (it leads to {shown})" if (shown := _shown(parts.geturl())) not in named else ""
        raise InputError(f"{named} must be an http or https URL without a user name{leads}")
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port or PORTS[parts.scheme], type=socket.SOCK_STREAM)
    except (OSError, ValueError) as error:
        raise InputError(f"{named}: the host {short_repr(parts.hostname)} is not known ({error})") from error
    addresses = [str(address[4][0]) for address in found]
    if not allow_private and not all(map(is_public, addresses)):
        raise InputError(
            f"{named} leads to {parts.hostname}, inside the own network; allow_private=True of load_image permits that"
        )
    return addresses


def is_public(address: str) -> bool:
    """Whether an address lies in the world outside, and not in this machine or its network."""
    return ipaddress.ip_address(address.partition("%")[0]).is_global


def _ask(parts: SplitResult, addresses: list[str], deadline: float) -> http.client.HTTPResponse:
    host, port = parts.hostname or "", parts.port or PORTS[parts.scheme]
    connected = _connect(addresses, port, deadline)
    try:
        if parts.scheme == "https":
            from requests.certs import where  # the roots of trust: Python on a Mac has none of its own

            context = ssl.create_default_context(cafile=where())
            connected = context.wrap_socket(connected, server_hostname=host)
        connection = http.client.HTTPConnection(host, port)
        connection.sock = _Bounded(connected, deadline)
        target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", quote(target, safe="/%:@!$&'()*+,;=~?#[]"), headers=HEADERS)
        return connection.getresponse()
    except BaseException:
        connected.close()
        raise


def _connect(addresses: list[str], port: int, deadline: float) -> socket.socket:
    for last, address in enumerate(addresses, 1 - len(addresses)):
        try:
            return socket.create_connection((address, port), _left(deadline, CONNECT_SECONDS))
        except OSError:
            if last == 0:
                raise
    raise OSError("no address")


def _left(deadline: float, most: float) -> float:
    left = min(most, deadline - time.monotonic())
    if left <= 0:
        raise TimeoutError
    return left


class _Bounded:
    """A socket for http.client of which every read ends by the deadline."""

    def __init__(self, connected: socket.socket, deadline: float):
        self.connected, self.deadline = connected, deadline

    def sendall(self, data: bytes) -> None:
        self.connected.settimeout(_left(self.deadline, READ_SECONDS))
        self.connected.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Reader(self.connected, self.deadline))

    def close(self) -> None:
        """Not yet: http.client says it when the answer begins, and the reader when it ends."""


class _Reader(io.RawIOBase):
    """What comes from a socket until the deadline. A timeout of its own would begin anew with every byte."""

    def __init__(self, connected: socket.socket, deadline: float):
        self.connected, self.deadline = connected, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        self.connected.settimeout(_left(self.deadline, READ_SECONDS))
        return self.connected.recv_into(buffer)

    def close(self) -> None:
        self.connected.close()
        super().close()


def _body(response: http.client.HTTPResponse, named: str) -> bytes:
    with response:
        length = response.length  # None where the server does not say it
        body = b"" if (length or 0) > MAX_BYTES else response.read(MAX_BYTES + 1)
    if (length or 0) > MAX_BYTES or len(body) > MAX_BYTES:
        raise InputError(f"{named}: more than {MAX_BYTES // 10**6} MB")
    if length is not None and len(body) < length:
        raise InputError(f"{named}: the connection broke after {len(body)} of {length} bytes")
    kind = response.getheader("content-type", "")
    if kind.startswith("text/html"):
        raise InputError(f"{named}: a web page ({short_repr(kind)}) and no picture")
    return body
