"""Connections to peers, dialled when needed, shared, retried, and closed when nobody uses them.

A node that needs a peer dials it. If both dial at once both connections live, each for the protocol exchange it was
opened for. A peer that cannot be dialled is tried again after a while, never written off.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from random import Random
from typing import Final

from ...errors import ConnectionLostError, NodeClosedError, PeerUnreachableError
from ..backoff import BackoffPolicy, DialSchedule
from .connection import Connection
from .endpoint import DIAL_SECONDS, Node

__all__ = ["ConnectionPool"]

IDLE_SECONDS: Final = 60.0
"""Psyche's pool closes a connection that nobody used for a minute (``shared/network/src/lib.rs``)."""

# Code and word of iroh-blobs' own pool.
_IDLE_CODE: Final = 0
_IDLE_REASON: Final = b"idle"

_Key = tuple[bytes, bytes]


class _Entry:
    __slots__ = ("connection", "idle_timer", "leases")

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.leases = 0
        self.idle_timer: asyncio.TimerHandle | None = None


class ConnectionPool:
    """At most one outgoing connection per peer and protocol. Used on the node's loop.

    Args:
        node: dials, and owns the loop.
        dial_timeout: seconds for one attempt.
        idle_timeout: seconds after which a connection that nobody leases is closed.
        policy: waits between attempts.
        random: for the jitter of these waits; a fresh one if None.
    """

    def __init__(
        self,
        node: Node,
        *,
        dial_timeout: float = DIAL_SECONDS,
        idle_timeout: float = IDLE_SECONDS,
        policy: BackoffPolicy | None = None,
        random: Random | None = None,
    ) -> None:
        self._node = node
        self._dial_timeout = dial_timeout
        self._idle_timeout = idle_timeout
        self._schedule = DialSchedule(policy or BackoffPolicy(), (random or Random()).random)
        self._entries: dict[_Key, _Entry] = {}
        self._dials: dict[_Key, asyncio.Task[_Entry]] = {}
        self._waiting: Counter[_Key] = Counter()  # callers for whom a dial is made, and who have not come for it yet
        self._watchers: set[asyncio.Task[None]] = set()
        self._closed = False
        node.on_close(self.aclose)

    def __len__(self) -> int:
        return len(self._entries)

    async def connect(self, peer: bytes, alpn: bytes, *, attempts: int = 3) -> Connection:
        """A connection to ``peer`` for ``alpn``, shared with others who ask; stays open until someone closes it.

        Up to ``attempts`` dials, with the waits of the policy between them; waits of earlier failures count.

        Raises:
            PeerUnreachableError: no attempt succeeded; the message holds the last reason.
            PeerRefusedError: the peer is not on our allow-list; not retried.
            NodeClosedError.
        """
        entry = await self._entry(peer, alpn, attempts)
        self._keep(entry)
        # Never counted down: it leaves the pool when it is closed.
        entry.leases += 1
        return entry.connection

    @asynccontextmanager
    async def lease(self, peer: bytes, alpn: bytes, *, attempts: int = 3) -> AsyncIterator[Connection]:
        """As :meth:`connect`, for the time of a ``with`` block; unused connections are closed after a while."""
        entry = await self._entry(peer, alpn, attempts)
        self._keep(entry)
        entry.leases += 1
        try:
            yield entry.connection
        finally:
            entry.leases -= 1
            self._release(peer, alpn, entry)

    def get(self, peer: bytes, alpn: bytes) -> Connection | None:
        """The open connection, if there is one; never dials."""
        entry = self._entries.get((peer, alpn))
        return entry.connection if entry is not None and not entry.connection.is_closed else None

    async def aclose(self) -> None:
        """Closes all connections and gives up all dials."""
        self._closed = True
        for task in list(self._dials.values()):
            task.cancel()
        for entry in list(self._entries.values()):
            if entry.idle_timer is not None:
                entry.idle_timer.cancel()
            entry.connection.close()
        self._entries.clear()

    async def _entry(self, peer: bytes, alpn: bytes, attempts: int) -> _Entry:
        if self._closed:
            raise NodeClosedError("the connection pool is closed")
        key = (peer, alpn)
        entry = self._entries.get(key)
        if entry is not None:
            if not entry.connection.is_closed:
                return entry
            self._drop(key, entry)
        task = self._dials.get(key)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._dial(key, attempts))
            self._dials[key] = task
            task.add_done_callback(lambda done: self._dial_done(key, done))
        self._waiting[key] += 1
        try:
            # Shielded: others may wait for the same dial, and one that comes too late still fills the pool.
            return await asyncio.shield(task)
        finally:
            self._waiting[key] -= 1
            if not self._waiting[key]:
                del self._waiting[key]

    def _dial_done(self, key: _Key, task: asyncio.Task[_Entry]) -> None:
        self._dials.pop(key, None)
        if not task.cancelled():
            task.exception()  # the callers that waited have it; if none is left, that is expected

    async def _dial(self, key: _Key, attempts: int) -> _Entry:
        peer, alpn = key
        for attempt in range(attempts):
            wait = self._schedule.wait(peer, time.monotonic())
            if wait:
                await asyncio.sleep(wait)
            try:
                connection = await self._node.connect(peer, alpn, timeout=self._dial_timeout)
            except PeerUnreachableError:
                self._schedule.failed(peer, time.monotonic())
                if attempt + 1 == attempts:
                    raise
                continue
            self._schedule.succeeded(peer)
            if self._closed:
                connection.close()
                raise NodeClosedError("the connection pool is closed")
            entry = _Entry(connection)
            self._entries[key] = entry
            connection.on_silence(partial(self._let_go, key, entry))
            watcher = asyncio.get_running_loop().create_task(self._watch(key, entry))
            self._watchers.add(watcher)
            watcher.add_done_callback(self._watchers.discard)
            # The caller can have been cancelled meanwhile, so that nobody comes for it.
            self._release(peer, alpn, entry)
            return entry
        raise ConnectionLostError("no attempt was allowed")

    async def _watch(self, key: _Key, entry: _Entry) -> None:
        await entry.connection.closed()
        self._drop(key, entry)

    def _let_go(self, key: _Key, entry: _Entry) -> None:
        """It does not answer: whoever asks again gets a new connection, and nobody waits on this one."""
        self._drop(key, entry)
        entry.connection.close_as_silent()

    def _drop(self, key: _Key, entry: _Entry) -> None:
        self._keep(entry)
        if self._entries.get(key) is entry:
            del self._entries[key]

    def _keep(self, entry: _Entry) -> None:
        if entry.idle_timer is not None:
            entry.idle_timer.cancel()
            entry.idle_timer = None

    def _release(self, peer: bytes, alpn: bytes, entry: _Entry) -> None:
        if entry.leases or self._closed or entry.connection.has_ended:
            return

        def idle() -> None:
            if self._waiting[peer, alpn]:  # on a busy loop they come later than this
                self._release(peer, alpn, entry)
            elif not entry.leases:
                self._drop((peer, alpn), entry)
                entry.connection.close(_IDLE_CODE, _IDLE_REASON)

        self._keep(entry)
        entry.idle_timer = asyncio.get_running_loop().call_later(self._idle_timeout, idle)
