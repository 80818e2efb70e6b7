"""Blobs on a node: serving a store to peers, and fetching blobs from them into it.

Everything decided here is about time and numbers: how long a peer may take, how many streams it may have. What is
said on a stream is decided in :mod:`.provider` and :mod:`.getter`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

from ....callbacks import SafeCallback
from ....errors import (
    ConfigurationError,
    DistroError,
    ExchangeError,
    NodeClosedError,
    PeerTimeoutError,
    ProtocolError,
    StoreFullError,
)
from ..connection import READ_SIZE, Connection, RecvStream, SendStream
from ..endpoint import Node
from ..pool import ConnectionPool
from .decoder import Piece
from .encoder import PIECE_LEN
from .getter import Attempt, Download, Purpose
from .provider import ERR_LIMIT, Action, Finish, KeepOpen, ProviderStream, Reset, Send, StopReading
from .request import ALPN
from .store import Blob, BlobStore, PartialBlob
from .switch_interval import prompt_switching

__all__ = ["BlobService", "FetchLimits", "ServeLimits"]

T = TypeVar("T")

_log = logging.getLogger(__name__)

_REQUEST_READ: Final = 64 * 1024
_FIRST_READ: Final = 1024
"""Of a request; ours have 39 bytes. The package zeroes as much memory as a read asks for: with 64 or 256 KiB it drives
out of the processor's cache what comes next."""

_MAX_READ: Final = 1024 * 1024
"""Beside a thread that computes in Python every call into the transport costs a wait for the interpreter lock, so bulk
goes in large steps. A read that is filled to its end is followed by one twice as large, up to this,."""

# and as long as only a few streams are answered, so that memory does not matter, their pieces are larger too.
_LARGE_PIECE: Final = 1024 * 1024
_FEW_STREAMS: Final = 16
_SHORT_ANSWER: Final = 16 * 1024
"""Bytes of an answer that is left to the transport once it is written. It holds no slot while the peer takes it; what
the transport keeps for a peer that does not is bounded by the streams that the peer may have open. Nor does it take
prompt switching, which would have the thread of the transport and that of the loop take the interpreter lock from each
other in the middle of their work: with sixteen peers and results of 5 KB, a tenth of what a round cost."""

_LONG_REQUEST: Final = 16 * 1024
"""Above it, reading a request may take long: a megabyte of boundaries takes about half a second. Ours have 39 bytes."""

_END_SECONDS: Final = 1.0
"""Long enough for the end of a stream whose data is all here, short enough not to matter if it never comes."""

_NO_MORE: Final = 0
"""The code with which quinn stops a stream that is dropped."""

Progress = Callable[[int, int], None]
"""(bytes proven, size)"""
OnFailure = Callable[[bytes, Exception], None]
"""(provider's endpoint id, what it failed with)"""


@dataclass(frozen=True, kw_only=True)
class ServeLimits:
    """What a peer that fetches may take. A peer that exceeds a time is cut off.

    Attributes:
        streams_per_connection: answered at a time; more have to wait. Chosen, as the next.
        streams: of all peers together. Each holds at most a few pieces of 256 KiB; the first 16, of 1 MiB.
        request_seconds: from the opening of a stream to the end of the request.
        write_seconds: for the peer to make room for one piece, and to take the last of them.
        observe_seconds: after which an observer, who has been told all, is let go.
    """

    streams_per_connection: int = 32
    streams: int = 512
    request_seconds: float = 10.0
    write_seconds: float = 30.0
    observe_seconds: float = 60.0


@dataclass(frozen=True, kw_only=True)
class FetchLimits:
    """What a provider may take.

    Attributes:
        dial_attempts: dials of a provider before the next one is tried.
        open_seconds: to let us open a stream and take the request.
        stall_seconds: within each such time, ``stall_bytes`` must arrive, or the rest of the blob.
        stall_bytes: see there. 16 KiB in 15 s is what a usable provider exceeds a hundredfold; chosen.
        downloads: at a time; more wait.
    """

    dial_attempts: int = 1
    open_seconds: float = 10.0
    stall_seconds: float = 15.0
    stall_bytes: int = 16 * 1024
    downloads: int = 64


class _Turn:
    """The queue of those who want one blob."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.waiting = 0


class BlobService:
    """Serves a store on a node and fetches into it. The coroutines belong to the node's loop.

    Args:
        node: gets a handler for ``/iroh-bytes/4``.
        store: what is served, and where fetched blobs go.
        pool: dials providers; one of its own if None.
    """

    def __init__(
        self,
        node: Node,
        store: BlobStore,
        *,
        pool: ConnectionPool | None = None,
        serve_limits: ServeLimits | None = None,
        fetch_limits: FetchLimits | None = None,
    ) -> None:
        self.store = store
        self._node = node
        self._pool = pool if pool is not None else ConnectionPool(node)
        self._serve_limits = serve_limits if serve_limits is not None else ServeLimits()
        self._fetch_limits = fetch_limits if fetch_limits is not None else FetchLimits()
        self._working = asyncio.Lock()
        self._serving = asyncio.Semaphore(self._serve_limits.streams)
        self._fetching = asyncio.Semaphore(self._fetch_limits.downloads)
        self._answered_now = 0
        self._under_way: dict[bytes, _Turn] = {}
        node.accept(ALPN, self._serve_connection)

    # -- fetching ------------------------------------------------------------------------------------------------------

    async def fetch(
        self,
        root: bytes,
        providers: Sequence[bytes],
        *,
        max_size: int,
        tag: str | None = None,
        progress: Progress | None = None,
        on_failure: OnFailure | None = None,
    ) -> Blob:
        """The blob ``root``, from the store or from the first provider that has it.

        Providers are tried in order; what one of them delivered before it failed is kept, and the next is asked only
        for the rest. Cancelling keeps it too, for the next call. Several calls for one blob take turns.

        Args:
            providers: endpoint ids whose addresses the node's address book, or its lookup, knows.
            max_size: largest size to accept, in bytes.
            tag: set when the blob is there; without one the next garbage collection drops it.
            progress: called on the loop after each proven stretch; what it raises is logged and stops nothing.
            on_failure: called on the loop for each provider that failed.

        Raises:
            BlobUnavailableError: no provider gave it.
            StoreFullError: there is no room for it.
        """
        if max_size < 0:
            raise ConfigurationError(f"max_size must not be negative, got {max_size}", name="max_size", value=max_size)
        progress = SafeCallback(progress, "progress") if progress is not None else None
        async with self._alone(root):
            blob = self.store.get(root)
            if blob is None:
                begun = await self._begin(root)
                try:
                    await self._download(begun, providers, max_size, progress, on_failure)
                    if self.store.is_prompt:
                        self.store.complete(begun, tag=tag)
                    else:
                        await _to_its_end(asyncio.to_thread(self.store.complete, begun, tag=tag))
                finally:
                    begun.close()
                blob = self.store.get(root)
                if blob is None:
                    raise ExchangeError(f"blob {root.hex()} was collected as soon as it came: give it a tag")
            elif tag is not None and self.store.is_prompt:
                self.store.set_tag(tag, root)
            elif tag is not None:
                await asyncio.to_thread(self.store.set_tag, tag, root)
            return blob

    @asynccontextmanager
    async def _alone(self, root: bytes) -> AsyncIterator[None]:
        """One download of a blob at a time, and not too many of all."""
        turn = self._under_way.setdefault(root, _Turn())
        turn.waiting += 1
        try:
            async with turn.lock, self._fetching:
                yield
        finally:
            turn.waiting -= 1
            if not turn.waiting:
                del self._under_way[root]

    async def _begin(self, root: bytes) -> PartialBlob:
        if self.store.is_prompt:
            return self.store.begin(root)
        beginning = asyncio.ensure_future(asyncio.to_thread(self.store.begin, root))
        try:
            return await _to_its_end(beginning)
        except asyncio.CancelledError:
            if not beginning.cancelled() and beginning.exception() is None:
                beginning.result().close()
            raise

    async def _download(
        self,
        begun: PartialBlob,
        providers: Sequence[bytes],
        max_size: int,
        progress: Progress | None,
        on_failure: OnFailure | None,
    ) -> None:
        download = Download(
            begun.root,
            [provider for provider in dict.fromkeys(providers) if provider != self._node.endpoint_id],
            max_size=max_size,
            prefix=begun.prefix,
            new_outboard=begun.new_outboard,
        )
        while (attempt := download.next_attempt()) is not None:
            error: Exception | None = None
            try:
                await self._ask(attempt, begun, progress)
            except StoreFullError:
                # More was proven than could be stored.
                begun.restart()
                raise
            except NodeClosedError:
                raise
            except DistroError as failure:
                _log.info("%s did not give blob %s: %s", attempt.provider.hex()[:10], begun.root.hex(), failure)
                error = failure
            except OSError:
                # The disk is full. (A peer's timeout is an OSError too, but one of our own, above.)
                begun.restart()
                raise
            failed_before = len(download.failures)
            download.ended(attempt, error)
            if download.must_discard:
                begun.restart()
                download.must_discard = False
            if on_failure is not None:
                for provider, reason in download.failures[failed_before:]:
                    on_failure(provider, reason)
        download.raise_if_failed()

    async def _ask(self, attempt: Attempt[bytes], begun: PartialBlob, progress: Progress | None) -> None:
        """Carries one attempt through; what it proves is kept in whatever way it ends."""

        def keep(pieces: Iterator[Piece]) -> None:
            if attempt.purpose is not Purpose.DATA:
                for _ in pieces:
                    pass
                return
            stored = False
            try:
                for piece in pieces:
                    begun.append(piece.data)
                    stored = True
            finally:
                begun.prefix = attempt.prefix
            if stored and progress is not None and attempt.prefix is not None:
                progress(attempt.prefix.length, attempt.prefix.size)

        limits = self._fetch_limits
        async with self._pool.lease(attempt.provider, ALPN, attempts=limits.dial_attempts) as connection:
            send, recv = await connection.open_bi(timeout=limits.open_seconds)
            try:
                with connection.awaited():
                    await self._converse(attempt, send, recv, keep)
            except BaseException:
                attempt.was_silent = connection.has_lost_its_way
                # Not left to the garbage collector: a failure that is remembered holds on to the stream, and until it
                # is stopped the provider fills its window, waits in vain, and in the end cuts the whole connection.
                await recv.stop(_NO_MORE)
                raise

    async def _converse(
        self, attempt: Attempt[bytes], send: SendStream, recv: RecvStream, keep: Callable[[Iterator[Piece]], None]
    ) -> None:
        limits = self._fetch_limits
        try:
            await send.write(attempt.request, timeout=limits.open_seconds)
            await send.finish()
            await self._read_response(attempt, recv, keep)
        except (ExchangeError, asyncio.CancelledError):
            try:
                keep(attempt.receive_end())
            except ProtocolError:
                pass
            raise
        keep(attempt.receive_end())
        try:
            # Takes the end of the stream off the transport, so that the provider sees all of it delivered.
            await recv.read(1, timeout=_END_SECONDS)
        except ExchangeError:
            pass

    async def _read_response(
        self, attempt: Attempt[bytes], recv: RecvStream, keep: Callable[[Iterator[Piece]], None]
    ) -> None:
        clock = asyncio.get_running_loop().time
        limits = self._fetch_limits
        deadline, due = clock() + limits.stall_seconds, limits.stall_bytes
        size = _SHORT_ANSWER
        is_long = False
        with ExitStack() as while_it_is_long:
            while not attempt.is_complete:
                try:
                    data = await recv.read(size, timeout=max(0.0, deadline - clock()))
                except PeerTimeoutError:
                    raise PeerTimeoutError(
                        f"it sent fewer than {limits.stall_bytes} bytes within {limits.stall_seconds} s"
                    ) from None
                if not data:
                    return
                size = min(2 * size, _MAX_READ) if len(data) == size else min(size, READ_SIZE)
                keep(attempt.receive(data))
                if attempt.received >= due:
                    deadline, due = clock() + limits.stall_seconds, attempt.received + limits.stall_bytes
                if attempt.received > _SHORT_ANSWER and not is_long:
                    is_long = True
                    while_it_is_long.enter_context(prompt_switching())

    # -- serving -------------------------------------------------------------------------------------------------------

    async def _serve_connection(self, connection: Connection) -> None:
        """Answers the requests of one peer until it leaves, or has to."""
        limits = self._serve_limits
        connection.limit_streams(uni=0)
        own = asyncio.Semaphore(limits.streams_per_connection)
        async with asyncio.TaskGroup() as streams:
            while True:
                try:
                    send, recv = await connection.accept_bi()
                except ExchangeError:
                    return
                # Further streams wait at the peer, whom the transport holds to its own number of open ones.
                await own.acquire()
                await self._serving.acquire()
                self._answered_now += 1
                task = streams.create_task(self._serve_stream(connection, send, recv))
                task.add_done_callback(lambda _: own.release())
                task.add_done_callback(self._stream_ended)

    def _stream_ended(self, _: asyncio.Task[None]) -> None:
        self._answered_now -= 1
        self._serving.release()

    async def _serve_stream(self, connection: Connection, send: SendStream, recv: RecvStream) -> None:
        limits = self._serve_limits
        few = self._answered_now <= _FEW_STREAMS
        stream = ProviderStream(self.store.get, piece_len=_LARGE_PIECE if few else PIECE_LEN)
        try:
            async with asyncio.timeout(limits.request_seconds):
                length, size = 0, _FIRST_READ
                while data := await recv.read(size):
                    length, size = length + len(data), _REQUEST_READ if len(data) == size else _FIRST_READ
                    for action in stream.receive(data):
                        await self._act(action, send, recv)
                    if stream.is_answered:
                        return
            if length > _LONG_REQUEST:
                answer = await self._aside(stream.receive_end)
            else:
                answer = stream.receive_end()
            written = 0
            with ExitStack() as while_it_is_long:
                while True:
                    take = partial(next, answer, None)
                    step = await self._aside(take) if stream.is_costly else take()
                    if step is None:
                        return
                    if isinstance(step, Send):
                        if written <= _SHORT_ANSWER < written + len(step.data):
                            while_it_is_long.enter_context(prompt_switching())
                        written += len(step.data)
                    elif isinstance(step, Finish) and written <= _SHORT_ANSWER:
                        await send.finish()
                        continue
                    await self._act(step, send, recv)
        except TimeoutError:
            # Also PeerTimeoutError. Slots are for those who use them.
            connection.close(ERR_LIMIT, b"limit")
        except ExchangeError as error:
            _log.debug("answering on %r ended: %s", connection, error)

    async def _aside(self, work: Callable[[], T]) -> T:
        """Does what a peer can make expensive beside the loop, one piece at a time, so that it costs others little."""
        async with self._working:
            return await asyncio.to_thread(work)

    async def _act(self, action: Action, send: SendStream, recv: RecvStream) -> None:
        match action:
            case Send(data):
                await send.write(data, timeout=self._serve_limits.write_seconds)
            case Finish():
                await send.finish()
                await send.stopped(timeout=self._serve_limits.write_seconds)
            case Reset(code):
                await send.reset(code)
            case StopReading(code):
                await recv.stop(code)
            case KeepOpen():
                try:
                    await send.stopped(timeout=self._serve_limits.observe_seconds)
                except PeerTimeoutError:
                    await send.finish()


async def _to_its_end(work: Awaitable[T]) -> T:
    """Awaits ``work``; cancelled, waits for its end all the same: a thread cannot be stopped, and it uses our files."""
    future = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait([future])
        raise
