"""Fetches ranges of bytes from web servers that may be slow, broken or lying.

Every answer is checked against what was asked: the range, the size, the length that comes. A failure that may pass
(no connection, a cut one, a slow one, 5xx, 429) is tried again after a wait; one that will not is an error at once.

aiohttp does the work, on an event loop in a thread that all clients of a process share.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import os
import random
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from ...comm.backoff import BackoffPolicy
from ...comm.loop import LoopThread
from ...errors import ConfigurationError, DataUnavailableError, InvalidDataError, NodeClosedError
from .files import ContentRange, plain_url, read_content_range, shown

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession

__all__ = ["WebClient", "WebTimeouts"]

T = TypeVar("T")

MAX_REDIRECTS: Final = 5
"""From one URL to the next; stores of models and data sets need one or two."""

MAX_CONNECTIONS: Final = 64
"""Open at once. Chosen above the threads that ask for sizes; a request beyond it waits for its turn."""

KEEP_SECONDS: Final = 90.0
"""An idle connection is kept so long for the next request; a round of a run takes less."""

PASSING: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses that another attempt may not meet (RFC 9110, RFC 6585)."""

_NO_HEAD: Final = frozenset({403, 405, 501})
"""Statuses of servers that do not answer HEAD, among them those of URLs signed for GET alone."""

_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})

_CLOSED: Final = "this provider of training data is closed"


@dataclass(frozen=True, kw_only=True)
class WebTimeouts:
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
            raise ConfigurationError(f"attempts, seconds and slowest must be above 0, got {self}", name="timeouts")


class _PassingError(Exception):
    """A failure after which another attempt is worth while."""


@functools.cache
def _loop_of(process: int) -> LoopThread:
    """The thread that all clients of a process share; a forked process cannot use that of its parent."""
    return LoopThread("distro-optim-web")


class WebClient:
    """Asks web servers; safe to use from several threads.

    Args:
        timeouts: how long, and how often.
        draw: uniform numbers in [0, 1), for the waits.
        wait: waits for some seconds, or less; by default until :meth:`close` at most.
    """

    def __init__(
        self,
        timeouts: WebTimeouts | None = None,
        *,
        draw: Callable[[], float] = random.random,
        wait: Callable[[float], object] | None = None,
    ) -> None:
        self._timeouts = timeouts or WebTimeouts()
        self._draw = draw
        self._closed = threading.Event()
        self._wait = wait or self._closed.wait
        self._lock = threading.Lock()
        self._sessions: dict[LoopThread, ClientSession] = {}
        self._under_way: set[concurrent.futures.Future[Any]] = set()
        weakref.finalize(self, _end_sessions, self._sessions)

    def close(self) -> None:
        """Ends what is under way, with an error, and closes all connections. Calling it again does nothing."""
        with self._lock:
            # No request starts once this is set, so that none is missed here.
            self._closed.set()
            under_way = list(self._under_way)
        for future in under_way:
            future.cancel()
        _end_sessions(self._sessions)

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
            DataUnavailableError: they cannot be fetched.
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

    def _patiently(self, url: str, attempt: Callable[[], Coroutine[Any, Any, T]]) -> T:
        failures = 0
        while True:
            try:
                return self._run(_plainly(url, attempt))
            except _PassingError as error:
                failures += 1
                if failures == self._timeouts.attempts:
                    raise DataUnavailableError(
                        f"{shown(url)} did not give what was asked in {failures} attempts: {error}"
                    ) from error
            self._wait(self._timeouts.waits.delay(failures, self._draw()))

    def _run(self, attempt: Coroutine[Any, Any, T]) -> T:
        """Has the loop's thread do it, and waits here."""
        with self._lock:
            if self._closed.is_set():
                attempt.close()
                raise DataUnavailableError(_CLOSED)
            try:
                future = _loop_of(os.getpid()).submit(attempt)
            except NodeClosedError as error:  # the interpreter ends
                raise DataUnavailableError(_CLOSED) from error
            self._under_way.add(future)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise DataUnavailableError(_CLOSED) from None
        finally:
            future.cancel()  # nobody waits for it any more, if an interrupt came in between
            with self._lock:
                self._under_way.discard(future)

    async def _size(self, url: str) -> int:
        async with self._asked("HEAD", url, {}, 0) as response:
            if response.status == 200:
                length = response.headers.get("Content-Length", "")
                if not length.isascii() or not length.isdigit() or len(length) > 19:
                    raise InvalidDataError(f"{shown(url)} does not say how large it is")
                return int(length)
            if response.status not in _NO_HEAD:
                raise self._refusal(url, response)
        # A server that does not answer HEAD may still tell the size beside a byte of the file.
        async with self._asked("GET", url, {"Range": "bytes=0-0"}, 1) as response:
            if response.status != 206:
                raise self._refusal(url, response)
            total = self._content_range(url, response).total
            if total is None:
                raise InvalidDataError(f"{shown(url)} does not say how large it is")
            return total

    async def _read(self, url: str, start: int, length: int, total: int) -> bytes:
        last = start + length - 1
        async with self._asked("GET", url, {"Range": f"bytes={start}-{last}"}, length) as response:
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
            return await self._body(url, response, length, exactly=True)

    async def _get(self, url: str, most: int) -> bytes:
        async with self._asked("GET", url, {}, most) as response:
            if response.status != 200:
                raise self._refusal(url, response)
            return await self._body(url, response, most, exactly=False)

    # -- answers -------------------------------------------------------------------------------------------------------

    async def _body(self, url: str, response: ClientResponse, length: int, *, exactly: bool) -> bytes:
        from aiohttp import ClientPayloadError

        if (encoding := response.headers.get("Content-Encoding", "identity")) != "identity":
            raise InvalidDataError(f"{shown(url)} comes encoded as {encoding[:40]!r}, though it was asked for as it is")
        announced = response.content_length
        if announced is not None and (announced > length or (exactly and announced != length)):
            raise InvalidDataError(f"{shown(url)} answers with {announced} bytes where {length} were asked for")
        body = bytearray()
        cut = False
        try:
            # One more than wanted, to see where an answer of unknown length ends.
            while len(body) <= length and (more := await response.content.read(length + 1 - len(body))):
                body += more
        except ClientPayloadError:
            cut = True
        if len(body) > length:
            raise InvalidDataError(f"{shown(url)} answers with more than the {length} bytes that were asked for")
        if cut or (exactly and len(body) < length):
            raise _PassingError(f"the connection was cut after {len(body)} of {announced or length} bytes")
        return bytes(body)

    @staticmethod
    def _content_range(url: str, response: ClientResponse) -> ContentRange:
        try:
            return read_content_range(response.headers.get("Content-Range", ""))
        except InvalidDataError as error:
            raise InvalidDataError(f"{shown(url)}: {error}") from None

    @staticmethod
    def _refusal(url: str, response: ClientResponse) -> Exception:
        answer = f"{response.status} {(response.reason or '')[:100]}".strip()
        if response.status in PASSING:
            return _PassingError(f"the server answers {answer}")
        return DataUnavailableError(f"{shown(url)} cannot be fetched: the server answers {answer}")

    # -- requests ------------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _asked(
        self, method: str, url: str, headers: dict[str, str], length: int
    ) -> AsyncIterator[ClientResponse]:
        """The answer to a request, after all redirects; its connection is kept if the answer is read to its end."""
        from aiohttp import ClientTimeout
        from yarl import URL

        session = self._session()
        now = asyncio.get_running_loop().time
        deadline = now() + self._timeouts.seconds + length / self._timeouts.slowest
        for _ in range(MAX_REDIRECTS + 1):
            # What is left of the time is the total of this request, body included. (0 would mean: without end.)
            timeout = ClientTimeout(total=max(deadline - now(), 1e-3))
            async with session.request(
                method,
                URL(url, encoded=True),
                headers=headers,
                timeout=timeout,
                allow_redirects=False,
                proxy=_proxy_for(url),
            ) as response:
                target = response.headers.get("Location")
                if response.status not in _REDIRECTS or target is None:
                    yield response
                    return
            url = self._redirected(url, target)
        raise DataUnavailableError(f"{shown(url)} leads on and on: more than {MAX_REDIRECTS} redirects")

    def _session(self) -> ClientSession:
        """The connections of this client; to be called on the loop's thread."""
        from aiohttp import ClientSession, DummyCookieJar, TCPConnector

        home = _loop_of(os.getpid())
        session = self._sessions.get(home)
        if session is None:
            session = self._sessions[home] = ClientSession(
                connector=TCPConnector(limit=MAX_CONNECTIONS, keepalive_timeout=KEEP_SECONDS),
                cookie_jar=DummyCookieJar(),
                headers={"Accept-Encoding": "identity"},
                skip_auto_headers=("User-Agent",),
                auto_decompress=False,
            )
        return session

    @staticmethod
    def _redirected(url: str, target: str) -> str:
        try:
            following = plain_url(urljoin(url, target))
        except (ConfigurationError, ValueError):
            raise InvalidDataError(f"{shown(url)} leads to {target[:200]!r}, where nothing can be fetched") from None
        if url.startswith("https:") and not following.startswith("https:"):
            raise InvalidDataError(f"{shown(url)} leads to {shown(following)}, which is not protected by TLS")
        return following


async def _plainly(url: str, attempt: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """The errors of aiohttp and of sockets as ours.

    Raises:
        _PassingError: another attempt may succeed.
        DataUnavailableError, InvalidDataError: no attempt will.
    """
    from aiohttp import ClientConnectorCertificateError, ClientError, ClientResponseError

    try:
        return await attempt()
    except ClientConnectorCertificateError as error:
        reason = getattr(error.certificate_error, "verify_message", None) or error.certificate_error
        raise DataUnavailableError(f"{shown(url)} is not who it says: {reason}") from error
    except ClientResponseError as error:  # not HTTP
        if "content-length" in error.message.lower():
            raise InvalidDataError(f"{shown(url)} does not say how large it is") from error
        raise _PassingError(f"the server does not speak HTTP ({' '.join(error.message.split())[:100]})") from error
    except TimeoutError as error:
        raise _PassingError("the answer took too long") from error
    except (ClientError, OSError) as error:
        number = getattr(error, "errno", None)
        reason = os.strerror(number) if isinstance(number, int) and number > 0 else str(error)
        raise _PassingError(reason or type(error).__name__) from error


def _proxy_for(url: str) -> str | None:
    """The proxy that the environment names. (aiohttp's ``trust_env`` would send passwords of ``~/.netrc`` as well.)"""
    parts = urlsplit(url)
    proxy = getproxies().get(parts.scheme)
    if not proxy or proxy_bypass(parts.hostname or ""):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def _end_sessions(sessions: dict[LoopThread, ClientSession]) -> None:
    """Closes the connections of this process. Those that a fork brought along are its parent's."""
    session = sessions.pop(_loop_of(os.getpid()), None)
    if session is not None:
        # If its loop is stopped, so is all that it did.
        with contextlib.suppress(NodeClosedError):
            _loop_of(os.getpid()).submit(session.close())
