"""Fetches ranges of bytes from web servers that may be slow, broken or lying.

Every answer is checked against what was asked: the range, the size, the length that comes. A failure that may pass
(no connection, a cut one, a slow one, 5xx, 429) is tried again after a wait; one that will not is an error at once.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import random
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, TypeVar
from urllib.parse import SplitResult, urljoin, urlsplit

from ...comm.backoff import BackoffPolicy
from ...errors import ConfigurationError, DataUnavailableError, InvalidDataError
from ..timed_http import TimedConnection, connection_for
from .files import ContentRange, plain_url, read_content_range, shown

__all__ = ["WebClient", "WebPatience"]

T = TypeVar("T")

MAX_REDIRECTS: Final = 5
"""From one URL to the next; stores of models and data sets need one or two."""

MAX_IDLE: Final = 16
"""Connections kept open for the next request; as many as are used at once."""

PASSING: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses that another attempt may not meet (RFC 9110, RFC 6585)."""

_NO_HEAD: Final = frozenset({403, 405, 501})
"""Statuses of servers that do not answer HEAD, among them those of URLs signed for GET alone."""

_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})


@dataclass(frozen=True, kw_only=True)
class WebPatience:
    """How long a web server is waited for.

    Attributes:
        attempts: in all, at each request.
        seconds: until an answer must be there, as in Psyche, plus what its bytes take at the slowest rate.
        slowest: bytes per second below which a server is given up. Chosen for a poor home connection.
        waits: between attempts.
    """

    attempts: int = 5
    seconds: float = 5.0
    slowest: float = 64 * 1024
    waits: BackoffPolicy = field(default_factory=lambda: BackoffPolicy(first=0.5, longest=10.0))

    def __post_init__(self) -> None:
        if self.attempts < 1 or not self.seconds > 0 or not self.slowest > 0:
            raise ConfigurationError(f"attempts, seconds and slowest must be above 0, got {self}", name="patience")


_CLOSED: Final = "this provider of training data is closed"


@functools.cache
def _tls() -> ssl.SSLContext:
    # One for all: reading the system's certificates takes a tenth of a second.
    return ssl.create_default_context()


class _Passing(Exception):
    """A failure after which another attempt is worth while."""


class WebClient:
    """Asks web servers; safe to use from several threads.

    Args:
        patience: how long, and how often.
        draw: uniform numbers in [0, 1), for the waits.
        wait: waits for some seconds, or less; by default until :meth:`close` at most.
    """

    def __init__(
        self,
        patience: WebPatience | None = None,
        *,
        draw: Callable[[], float] = random.random,
        wait: Callable[[float], object] | None = None,
    ) -> None:
        self._patience = patience or WebPatience()
        self._draw = draw
        self._closed = threading.Event()
        self._wait = wait or self._closed.wait
        self._context = _tls()
        self._idle: dict[tuple[str, str], list[TimedConnection]] = {}
        self._busy: set[TimedConnection] = set()
        self._lock = threading.Lock()

    def close(self) -> None:
        """Ends what is under way, with an error, and closes all connections. Calling it again does nothing."""
        self._closed.set()
        with self._lock:
            idle, self._idle = self._idle, {}
            busy = list(self._busy)
        for connections in idle.values():
            for connection in connections:
                connection.close()
        for connection in busy:
            connection.abort()

    def size(self, url: str) -> int:
        """Bytes of a file.

        Raises:
            DataUnavailableError, InvalidDataError: it cannot be known.
        """
        return self._patiently(url, lambda: self._size(url))

    def read(self, url: str, start: int, length: int, total: int) -> bytes:
        """``length`` bytes from byte ``start`` on.

        Args:
            url: of the file.
            start: first byte.
            length: how many.
            total: size of the file, as :meth:`size` told it.

        Raises:
            DataUnavailableError: they cannot be had.
            InvalidDataError: the server contradicts itself.
        """
        return self._patiently(url, lambda: self._read(url, start, length, total))

    def get(self, url: str, most: int) -> bytes:
        """A whole file of at most ``most`` bytes.

        Raises:
            DataUnavailableError, InvalidDataError: see :meth:`read`.
        """
        return self._patiently(url, lambda: self._get(url, most))

    # -- attempts ------------------------------------------------------------------------------------------------------

    def _patiently(self, url: str, attempt: Callable[[], T]) -> T:
        for failures in range(1, self._patience.attempts + 1):
            if self._closed.is_set():
                raise DataUnavailableError(_CLOSED)
            try:
                return attempt()
            except (_Passing, OSError, http.client.HTTPException) as error:
                if isinstance(error, ssl.SSLCertVerificationError):
                    raise DataUnavailableError(f"{shown(url)} is not who it says: {error.verify_message}") from error
                if failures == self._patience.attempts:
                    reason = str(error) or type(error).__name__
                    raise DataUnavailableError(
                        f"{shown(url)} did not give what was asked in {failures} attempts: {reason}"
                    ) from error
                self._wait(self._patience.waits.delay(failures, self._draw()))
        raise AssertionError("unreachable")

    def _size(self, url: str) -> int:
        with self._asked("HEAD", url, {}, 0) as response:
            if response.status == 200:
                length = response.headers.get("Content-Length", "")
                if not length.isascii() or not length.isdigit() or len(length) > 19:
                    raise InvalidDataError(f"{shown(url)} does not say how large it is")
                return int(length)
            if response.status not in _NO_HEAD:
                raise self._refusal(url, response)
        # Who answers to no HEAD may still tell the size beside a byte of it.
        with self._asked("GET", url, {"Range": "bytes=0-0"}, 1) as response:
            if response.status != 206:
                raise self._refusal(url, response)
            total = self._content_range(url, response).total
            if total is None:
                raise InvalidDataError(f"{shown(url)} does not say how large it is")
            return total

    def _read(self, url: str, start: int, length: int, total: int) -> bytes:
        last = start + length - 1
        with self._asked("GET", url, {"Range": f"bytes={start}-{last}"}, length) as response:
            if response.status == 206:
                given = self._content_range(url, response)
                if (given.first, given.last) != (start, last):
                    raise InvalidDataError(
                        f"{shown(url)} was asked for bytes {start} to {last} and answers with {given.first} to "
                        f"{given.last}"
                    )
                if given.total not in (None, total):
                    raise InvalidDataError(
                        f"{shown(url)} had {total} bytes when the run began and has {given.total} now: it was changed"
                    )
            elif response.status == 200:
                if (start, length) != (0, total):
                    raise InvalidDataError(f"{shown(url)} cannot be read in parts: its server knows no ranges of bytes")
            elif response.status == 416:
                raise InvalidDataError(f"{shown(url)} was said to have {total} bytes and ends before byte {start}")
            else:
                raise self._refusal(url, response)
            return self._body(url, response, length, exactly=True)

    def _get(self, url: str, most: int) -> bytes:
        with self._asked("GET", url, {}, most) as response:
            if response.status != 200:
                raise self._refusal(url, response)
            return self._body(url, response, most, exactly=False)

    # -- answers -------------------------------------------------------------------------------------------------------

    def _body(self, url: str, response: http.client.HTTPResponse, length: int, *, exactly: bool) -> bytes:
        if (encoding := response.headers.get("Content-Encoding", "identity")) != "identity":
            raise InvalidDataError(f"{shown(url)} comes encoded as {encoding[:40]!r}, though it was asked for as it is")
        announced = response.length
        if announced is not None and (announced > length or (exactly and announced != length)):
            raise InvalidDataError(f"{shown(url)} answers with {announced} bytes where {length} were asked for")
        # One more than wanted, to see where an answer of unknown length ends.
        body = response.read(length + 1)
        if len(body) > length:
            raise InvalidDataError(f"{shown(url)} answers with more than the {length} bytes that were asked for")
        if response.length or (exactly and len(body) < length):
            raise _Passing(f"the connection was cut after {len(body)} of {announced or length} bytes")
        return body

    @staticmethod
    def _content_range(url: str, response: http.client.HTTPResponse) -> ContentRange:
        try:
            return read_content_range(response.headers.get("Content-Range", ""))
        except InvalidDataError as error:
            raise InvalidDataError(f"{shown(url)}: {error}") from None

    @staticmethod
    def _refusal(url: str, response: http.client.HTTPResponse) -> Exception:
        answer = f"{response.status} {response.reason[:100]}".strip()
        if response.status in PASSING:
            return _Passing(f"the server answers {answer}")
        return DataUnavailableError(f"{shown(url)} cannot be had: the server answers {answer}")

    # -- requests ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _asked(self, method: str, url: str, headers: dict[str, str], length: int) -> Iterator[http.client.HTTPResponse]:
        """The answer to a request, after all redirects; its connection is kept if the answer was read to its end."""
        deadline = time.monotonic() + self._patience.seconds + length / self._patience.slowest
        for _ in range(MAX_REDIRECTS + 1):
            parts = urlsplit(url)
            connection, response = self._send(method, parts, headers, deadline)
            keep = False
            try:
                target = response.headers.get("Location")
                if response.status not in _REDIRECTS or target is None:
                    yield response
                    if method == "HEAD":
                        response.read()  # nothing; but only then the connection counts as free
                    keep = response.isclosed() and not response.will_close
                    return
            finally:
                self._put_back(parts, connection, keep=keep)
                if not keep:
                    response.close()
            url = self._redirected(url, target)
        raise DataUnavailableError(f"{shown(url)} leads on and on: more than {MAX_REDIRECTS} redirects")

    @staticmethod
    def _redirected(url: str, target: str) -> str:
        try:
            following = plain_url(urljoin(url, target))
        except (ConfigurationError, ValueError):
            raise InvalidDataError(f"{shown(url)} leads to {target[:200]!r}, where nothing can be fetched") from None
        if url.startswith("https:") and not following.startswith("https:"):
            raise InvalidDataError(f"{shown(url)} leads to {shown(following)}, which is not protected by TLS")
        return following

    def _send(
        self, method: str, url: SplitResult, headers: dict[str, str], deadline: float
    ) -> tuple[TimedConnection, http.client.HTTPResponse]:
        """Sends a request over an idle connection or a new one."""
        while True:
            with self._lock:
                idle = self._idle.get((url.scheme, url.netloc))
                old = idle.pop() if idle else None
            connection = old or connection_for(url, self._context)
            connection.deadline = deadline
            with self._lock:
                # close() ends those that it finds here, so none may come after it.
                if self._closed.is_set():
                    raise DataUnavailableError(_CLOSED)
                self._busy.add(connection)
            try:
                target = connection.target_prefix + (url.path or "/") + (f"?{url.query}" if url.query else "")
                connection.request(method, target, headers={"Accept-Encoding": "identity", **headers})
                return connection, connection.getresponse()
            except BaseException as error:
                self._put_back(url, connection, keep=False)
                # The server may have closed an idle connection just now; that is no failure of the request.
                if old is None or not isinstance(error, ConnectionError | http.client.BadStatusLine):
                    raise

    def _put_back(self, url: SplitResult, connection: TimedConnection, *, keep: bool) -> None:
        with self._lock:
            self._busy.discard(connection)
            idle = self._idle.setdefault((url.scheme, url.netloc), [])
            if keep and not self._closed.is_set() and len(idle) < MAX_IDLE:
                idle.append(connection)
                return
        connection.close()
