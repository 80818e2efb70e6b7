"""HTTP connections whose every operation ends by a deadline.

The timeouts of sockets count from one received byte to the next, so that a server which sends a byte now and then holds
its client for ever. Here each read and write gets what is left until the deadline of the whole exchange.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import socket
import ssl
import time
from typing import Any
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies, proxy_bypass

from typing_extensions import override

__all__ = ["TimedConnection", "connection_for"]


class TimedConnection(http.client.HTTPConnection):
    """A connection to one host, over TLS if there is a context for it.

    Args:
        host: its name.
        port: its port.
        context: of TLS; None for plain HTTP.

    Attributes:
        deadline: when, by ``time.monotonic()``, what is under way must be over.
        target_prefix: what goes before the path in a request: empty, or the origin when a proxy is asked.
    """

    def __init__(self, host: str, port: int, context: ssl.SSLContext | None) -> None:
        super().__init__(host, port)
        self.deadline = 0.0
        self.target_prefix = ""
        self._context = context
        self._server_name = host

    def through(self, proxy: SplitResult, origin: SplitResult) -> None:
        """Goes by way of a proxy: through a tunnel where TLS is spoken, else by asking it."""
        name, port = self.host, self.port
        self.host, self.port = proxy.hostname or "", proxy.port or 80
        if self._context is not None:
            self.set_tunnel(name, port)
        else:
            self.target_prefix = f"{origin.scheme}://{origin.netloc.rpartition('@')[2]}"

    def abort(self) -> None:
        """Ends what another thread does with it."""
        sock = self.sock
        if isinstance(sock, _TimedSocket):
            sock.abort()

    @override
    def connect(self) -> None:
        raw = socket.create_connection((self.host, self.port), timeout=_left(self.deadline))
        try:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.sock = _TimedSocket(raw, self)
            if getattr(self, "_tunnel_host", None):
                self._tunnel()  # type: ignore[attr-defined]
            if self._context is not None:
                raw.settimeout(_left(self.deadline))
                raw = self._context.wrap_socket(raw, server_hostname=self._server_name)
                self.sock = _TimedSocket(raw, self)
        except BaseException:
            raw.close()
            raise


def connection_for(url: SplitResult, context: ssl.SSLContext) -> TimedConnection:
    """A connection, not opened yet, to whoever answers for ``url``: the host, or the proxy the environment names."""
    host = url.hostname or ""
    secure = url.scheme == "https"
    connection = TimedConnection(host, url.port or (443 if secure else 80), context if secure else None)
    proxy = getproxies().get(url.scheme)
    if proxy and not proxy_bypass(host):
        connection.through(urlsplit(proxy if "://" in proxy else f"http://{proxy}"), url)
    return connection


def _left(deadline: float) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("the time is over")
    return seconds


class _TimedSocket:
    """As much of a socket as :mod:`http.client` uses."""

    def __init__(self, raw: socket.socket, owner: TimedConnection) -> None:
        self._raw = raw
        self._owner = owner

    def sendall(self, data: Any) -> None:
        self._raw.settimeout(_left(self._owner.deadline))
        self._raw.sendall(data)

    def makefile(self, mode: str, *_: Any) -> io.BufferedReader:
        return io.BufferedReader(_TimedReader(self._raw, self._owner))

    def close(self) -> None:
        self._raw.close()

    def abort(self) -> None:
        with contextlib.suppress(OSError):
            self._raw.shutdown(socket.SHUT_RDWR)


class _TimedReader(io.RawIOBase):
    def __init__(self, raw: socket.socket, owner: TimedConnection) -> None:
        self._raw = raw
        self._owner = owner
        # The socket's own reader, so that the socket closes when the last of them does.
        self._file = raw.makefile("rb", buffering=0)

    @override
    def readable(self) -> bool:
        return True

    @override
    def readinto(self, buffer: Any) -> int | None:
        self._raw.settimeout(_left(self._owner.deadline))
        return self._file.readinto(buffer)

    @override
    def close(self) -> None:
        self._file.close()
        super().close()
