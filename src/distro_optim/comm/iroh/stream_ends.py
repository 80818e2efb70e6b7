"""The two halves of a stream, with our errors, timeouts and limits, and the errors of the ``iroh`` package as ours.

Durations are in seconds; None waits for ever. Every read is bounded by a size that the caller states.
"""

from __future__ import annotations

import asyncio
import re
import types
from collections.abc import Coroutine, Generator, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

from ...errors import (
    ConnectionLostError,
    ExchangeError,
    LimitExceededError,
    PeerTimeoutError,
    StreamResetError,
    StreamStoppedError,
    TruncatedError,
)

__all__ = ["READ_SIZE", "RecvStream", "SendStream", "call", "translate_errors"]

T = TypeVar("T")

READ_SIZE: Final = 256 * 1024
"""One read asks for this much. Measured: throughput is flat from 64 KiB to 1 MiB, and each call costs the same."""

# `Reset(3)`, `Stopped(1)`: what the Rust errors look like as text.
_RESET: Final = re.compile(r"\bReset\((\d+)\)")
_STOPPED: Final = re.compile(r"\bStopped\((\d+)\)")
_PLACE: Final = re.compile(r"\s*\(/[^()]*:\d+:\d+\)")
_LOST: Final = re.compile(r"ConnectionLost|connection lost|closed|timed out|TimedOut|aborted", re.IGNORECASE)
"""Words of the text that mean that the whole connection is gone, not only a stream."""


def _translate(error: Exception) -> ExchangeError | None:
    """One of our errors for an ``iroh.IrohError``, whose ``str`` is empty; None for any other."""
    from iroh import IrohError  # here, and not where calls begin: hardly any of them fails

    if not isinstance(error, IrohError):
        return None
    text = str(error.message())
    # The last line is the innermost cause; places in the sources of the library tell a user nothing.
    line = _PLACE.sub("", text.strip().rpartition("\n")[2]).strip() or "unknown error"
    if match := _RESET.search(text):
        return StreamResetError(f"the peer gave up the stream with code {match[1]}", code=int(match[1]))
    if match := _STOPPED.search(text):
        return StreamStoppedError(f"the peer stopped the stream with code {match[1]}", code=int(match[1]))
    if _LOST.search(text):
        return ConnectionLostError(f"the connection is gone: {line}")
    return ExchangeError(line)


@contextmanager
def translate_errors() -> Iterator[None]:
    """Turns the errors of the ``iroh`` package into those of :mod:`distro_optim.errors`."""
    try:
        yield
    except Exception as error:
        if (ours := _translate(error)) is None:
            raise
        raise ours from error


async def call(work: Coroutine[Any, Any, T], timeout: float | None, what: str) -> T:
    """Awaits a call of the package: its errors become ours, and it may take so many seconds.

    Args:
        work: the call.
        timeout: in seconds; None waits for ever.
        what: the caller does, for the message.

    Raises:
        PeerTimeoutError: it took longer.
        ExchangeError: as the package says.
    """
    try:
        if timeout is None:
            return await work
        # Most calls are answered at once, and a time limit costs as much as one of them.
        try:
            waits_for = work.send(None)
        except StopIteration as answered:
            answer: T = answered.value
            return answer
        async with asyncio.timeout(timeout):
            return await _rest_of(work, waits_for)
    except TimeoutError:
        raise PeerTimeoutError(f"{what} took longer than {timeout} s") from None
    except Exception as error:
        if (ours := _translate(error)) is None:
            raise
        raise ours from error


@types.coroutine
def _rest_of(work: Coroutine[Any, Any, T], waits_for: Any) -> Generator[Any, Any, T]:
    """What comes of a coroutine that was begun by hand and waits for something."""
    try:
        while True:
            try:
                answer = yield waits_for
            except GeneratorExit:
                work.close()
                raise
            except BaseException as error:
                waits_for = work.throw(error)
            else:
                waits_for = work.send(answer)
    except StopIteration as done:
        result: T = done.value
        return result


class SendStream:
    """The sending half of a stream."""

    __slots__ = ("_raw",)

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    async def write(self, data: bytes | bytearray | memoryview, *, timeout: float | None = None) -> None:
        """Hands all of ``data`` to the transport, waiting while the peer does not read.

        Raises:
            StreamStoppedError: the peer wants no more.
            ConnectionLostError, PeerTimeoutError.
        """
        await call(self._raw.write_all(data), timeout, "writing")

    async def finish(self) -> None:
        """Marks the end; what was written is still delivered."""
        await call(self._raw.finish(), None, "finishing")

    async def reset(self, code: int) -> None:
        """Gives the stream up; what was not delivered yet is lost. Does nothing if it has ended already."""
        try:
            await call(self._raw.reset(code), None, "resetting")
        except ExchangeError:
            pass

    async def stopped(self, *, timeout: float | None = None) -> int | None:
        """Waits until the peer has read everything (None) or stopped reading (its code)."""
        code: int | None = await call(self._raw.stopped(), timeout, "waiting for the peer to read")
        return code


class RecvStream:
    """The receiving half of a stream, with a small buffer, so that nothing is lost when a read is cancelled."""

    __slots__ = ("_buffer", "_ended", "_raw")

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self._buffer = bytearray()
        self._ended = False

    async def read(self, limit: int = READ_SIZE, *, timeout: float | None = None) -> bytes:
        """Whatever has arrived, at least 1 and at most ``limit`` bytes; ``b""`` at the end.

        Raises:
            StreamResetError: the peer gave the stream up.
            ConnectionLostError, PeerTimeoutError.
        """
        if self._buffer:
            head = bytes(self._buffer[:limit])
            del self._buffer[:limit]
            return head
        if self._ended:
            return b""
        data: bytes = await call(self._raw.read(limit), timeout, "reading")
        self._ended = not data
        return data

    async def read_exact(self, size: int, *, timeout: float | None = None) -> bytes:
        """Exactly ``size`` bytes. The caller has checked that it wants to hold that many.

        ``timeout`` covers all of it. Bytes that came before a failure stay in the buffer.

        Raises:
            TruncatedError: the stream ends early.
            StreamResetError, ConnectionLostError, PeerTimeoutError.
        """
        if not self._buffer and size <= READ_SIZE:
            # The common case, a whole item at once, without a copy through the buffer.
            data = await self.read(size, timeout=timeout)
            if len(data) == size:
                return data
            self._buffer += data
        await self._fill(size, timeout)
        if len(self._buffer) < size:
            raise TruncatedError(f"{size} bytes are expected, the stream ends after {len(self._buffer)}")
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data

    async def read_to_end(self, limit: int, *, timeout: float | None = None) -> bytes:
        """Everything up to the end of the stream, at most ``limit`` bytes.

        Raises:
            LimitExceededError: there is more.
            StreamResetError, ConnectionLostError, PeerTimeoutError.
        """
        await self._fill(limit + 1, timeout)
        if len(self._buffer) > limit:
            raise LimitExceededError(f"the stream is longer than {limit} bytes")
        data = bytes(self._buffer)
        self._buffer.clear()
        return data

    async def _fill(self, size: int, timeout: float | None) -> None:
        """Reads until ``size`` bytes are in the buffer or the stream ends."""
        try:
            async with asyncio.timeout(timeout):
                while len(self._buffer) < size and not self._ended:
                    data = await call(self._raw.read(min(READ_SIZE, size - len(self._buffer))), None, "reading")
                    self._ended = not data
                    self._buffer += data
        except PeerTimeoutError:
            raise
        except TimeoutError:
            raise PeerTimeoutError(f"reading {size} bytes took longer than {timeout} s") from None

    async def stop(self, code: int) -> None:
        """Tells the peer that no more is wanted. Does nothing if the stream has ended already."""
        try:
            await call(self._raw.stop(code), None, "stopping")
        except ExchangeError:
            pass
