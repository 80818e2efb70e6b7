"""QUIC connections with our errors and timeouts, and whether they answer: a thin layer over the ``iroh`` package.

All coroutines here run on the loop of the node the connection belongs to. Durations are in seconds; None waits for
ever. The streams of a connection are in :mod:`.stream_ends`.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

from typing_extensions import override

from ...errors import ExchangeError
from .stream_ends import READ_SIZE, RecvStream, SendStream, call, translate_errors
from .watching.silence import Silence

__all__ = [
    "IDLE_LOOK_SECONDS",
    "READ_SIZE",
    "SILENT_REASON",
    "Connection",
    "ConnectionStats",
    "RecvStream",
    "SendStream",
    "Way",
]

SILENT_REASON: Final = b"silent"
"""Word with which a connection is closed that does not answer, once there is another one."""

NUDGE_SECONDS: Final = 0.5
"""Without a byte, after which a peer that owes an answer is sent a packet that it has to acknowledge. Twice the pause
between two states of a coordinator is a second; chosen below it."""

_NUDGE: Final = bytes(64)
"""A datagram that nobody reads: it takes room in the other side's buffer, of about a megabyte, until newer ones drive
it out. Not empty, since that buffer counts bytes."""

IDLE_LOOK_SECONDS: Final = 1.0
"""Between two looks at a connection over which nobody waits for anything: a peer has one or two to each of the others
for results, and needs each of them for a moment in a round."""

# `closed by peer: 2` and `closed by peer: bye (code 9)`: how the package writes the peer's code.
_CLOSE_CODE: Final = re.compile(r"(?:\(code |: )(\d+)\)?$")


class Way(NamedTuple):
    """How a connection reaches the peer at present.

    Attributes:
        path: "direct" over UDP, "relayed" through a relay server, "none" while no path is selected.
        remote_addr: the far end of that path, as text; empty if none.
        rtt: round-trip time in seconds, in steps of a millisecond; None if not known.
    """

    path: Literal["direct", "relayed", "none"]
    remote_addr: str
    rtt: float | None


_NO_WAY: Final = Way("none", "", None)


@dataclass(frozen=True, kw_only=True)
class ConnectionStats:
    """A connection's present path and its counters since the handshake.

    Attributes:
        way: the path.
        bytes_sent, bytes_received: UDP payload, all paths together.
        lost_packets: our packets that had to be sent again.
    """

    way: Way
    bytes_sent: int
    bytes_received: int
    lost_packets: int


class Connection:
    """A connection to one peer for one protocol (ALPN).

    The node keeps it open until one of the two sides closes it; dropping the last reference does not.

    Attributes:
        remote_id: the peer's endpoint id, 32 bytes, proven by the handshake.
        alpn: the protocol.
        dialled: whether we dialled; else the peer did.
        endpoint: which of the node's endpoints it is on.
        opened: loop time in seconds.
        is_patient: whoever uses it decides himself when it has been silent for too long.
        has_relay: there is a path through a relay server, or may be. The transport keeps it alive beside the one that
            is used, so that something comes on the connection even if nothing of what is sent arrives.
        awaiting: how many wait for the peer to say something over it. While they do, it is made to acknowledge
            something whenever nothing has come for half a second, so that a dead way shows.
    """

    def __init__(self, raw: Any, *, dialled: bool, endpoint: Any = None) -> None:
        self._raw = raw
        self.endpoint = endpoint
        self.opened = asyncio.get_running_loop().time()
        self.is_patient = False
        self.has_relay = False
        self.awaiting = 0
        self._received = (-1, self.opened)  # bytes, and when so many had come
        self._counted = (0, 0)
        self._looked_at = -math.inf
        self._nudged_at = self.opened
        self._has_spoken = False
        self._silence = Silence(self.opened)
        self._is_silent = False
        self._silence_hooks: list[Callable[[], None]] = []
        self.remote_id: bytes = raw.remote_id().to_bytes()
        self.alpn: bytes = raw.alpn()
        self.dialled = dialled
        self._reason: str | None = None
        self._closed = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None

    @override
    def __repr__(self) -> str:
        state = f"closed: {self._reason}" if self.is_closed else "open"
        how = "dialled" if self.dialled else "taken"
        return f"<Connection {self.remote_id.hex()[:10]} {self.alpn.decode(errors='replace')} {how}, {state}>"

    @property
    def is_closed(self) -> bool:
        """Whether one of the sides has closed it, or it was lost."""
        if self._reason is None:
            self._reason = self._raw.close_reason()
        return self._reason is not None

    @property
    def has_ended(self) -> bool:
        """Whether its end has been noticed. Unlike :attr:`is_closed` it asks nobody, which costs as much as a look."""
        return self._reason is not None

    @property
    def close_reason(self) -> str | None:
        """Why it is closed, as text; None while it is open."""
        return self._reason if self.is_closed else None

    @property
    def close_code(self) -> int | None:
        """The application code with which the peer closed it; None if open, or ended otherwise."""
        match = _CLOSE_CODE.search(self.close_reason or "")
        return int(match[1]) if match else None

    async def closed(self) -> str:
        """Waits for the end and returns the reason."""
        await self._closed.wait()
        return self._reason or "closed"

    def watch(self) -> asyncio.Task[None]:
        """Starts noticing the end; called once, by the node."""

        async def wait() -> None:
            try:
                self._reason = await self._raw.closed()
            finally:
                self._closed.set()

        self._watcher = asyncio.get_running_loop().create_task(wait())
        return self._watcher

    def close(self, code: int = 0, reason: bytes = b"") -> None:
        """Ends it at once; streams that are not finished are lost. Does nothing if it is closed."""
        if not self.is_closed:
            with translate_errors():
                self._raw.close(code, reason)

    def close_as_silent(self) -> None:
        """Ends it since it does not answer, as both sides can tell from :attr:`has_lost_its_way`."""
        self.close(reason=SILENT_REASON)

    async def open_uni(self, *, timeout: float | None = None) -> SendStream:
        """A new one-way stream to the peer; waits while the peer allows no further one."""
        return SendStream(await call(self._raw.open_uni(), timeout, "opening a stream"))

    async def open_bi(self, *, timeout: float | None = None) -> tuple[SendStream, RecvStream]:
        """A new two-way stream; waits while the peer allows no further one."""
        pair = await call(self._raw.open_bi(), timeout, "opening a stream")
        return SendStream(pair.send()), RecvStream(pair.recv())

    async def accept_uni(self, *, timeout: float | None = None) -> RecvStream:
        """The next one-way stream of the peer; raises ConnectionLostError when there will be none."""
        return RecvStream(await call(self._raw.accept_uni(), timeout, "waiting for a stream"))

    async def accept_bi(self, *, timeout: float | None = None) -> tuple[SendStream, RecvStream]:
        """The next two-way stream of the peer; raises ConnectionLostError when there will be none."""
        pair = await call(self._raw.accept_bi(), timeout, "waiting for a stream")
        return SendStream(pair.send()), RecvStream(pair.recv())

    # -- whether it answers --------------------------------------------------------------------------------------------

    @property
    def is_silent(self) -> bool:
        """Whether it does not answer, as of the last :meth:`look`."""
        return self._is_silent

    @property
    def heard_at(self) -> float:
        """Loop time of the last look that found that something had come."""
        return self._received[1]

    def heard_nothing_since(self, time: float) -> bool:
        """Whether it was open at a loop time, and nothing has come on it since, as far as looks tell: what came just
        before may have been found by a look a second later."""
        return self.opened < time and self.heard_at <= time + IDLE_LOOK_SECONDS

    @property
    def counted(self) -> tuple[int, int]:
        """Bytes sent and received as of the last :meth:`look`: :meth:`traffic` for those who ask all the time."""
        return self._counted

    def has_spoken(self) -> None:
        """To be told by whoever reads what the peer says all the time: a look would find nothing else."""
        self._has_spoken = True

    def is_due(self, now: float) -> bool:
        """Whether a :meth:`look` is due: while somebody waits for the peer, whenever it has said nothing since it was
        asked last; always if it has not answered."""
        has_spoken, self._has_spoken = self._has_spoken, False
        if self._silence.since is not None or now - self._looked_at >= IDLE_LOOK_SECONDS:
            return True
        if has_spoken and not self.has_relay:  # with a relay it matters by which way it came
            self._received = self._received[0], now
            return False
        return bool(self.awaiting)

    @property
    def has_lost_its_way(self) -> bool:
        """Whether it does not answer, or was closed for that by one of the sides. It says nothing about the peer."""
        return self._is_silent or SILENT_REASON.decode() in (self.close_reason or "")

    @property
    def unanswered_since(self) -> float | None:
        """Loop time since which nothing that was sent is answered; None if it is."""
        return self._silence.since

    def on_silence(self, hook: Callable[[], None]) -> None:
        """Has ``hook`` called on the loop when the connection has become silent."""
        self._silence_hooks.append(hook)

    def look(self, now: float, *, at_ways: bool = True) -> bool:
        """Looks at the counters; returns whether the connection is silent. Called by the node's watch.

        Args:
            now: loop time.
            at_ways: looks, too, whether the connection has any path left, which costs twice as much.
        """
        self._looked_at = now
        if self.has_ended:
            self._is_silent = False
            return False
        was_silent = self._is_silent
        counters = self._raw.stats()
        self._counted = counters.udp_tx_bytes, counters.udp_rx_bytes
        sent, received = self._counted_on_its_way() if self.has_relay else self._counted
        if received != self._received[0]:
            self._received = received, now
        elif self.awaiting and now - max(self._received[1], self._nudged_at) >= NUDGE_SECONDS:
            self._nudged_at = now
            self._nudge()
        has_way = not at_ways or bool(self._raw.paths())
        self._is_silent = self._silence.look(sent, received, now, has_way=has_way)
        if self._is_silent and not was_silent:
            for hook in self._silence_hooks:
                hook()
        return self._is_silent

    def _counted_on_its_way(self) -> tuple[int, int]:
        """Bytes sent and received by the path that is used; by all of them while none is."""
        for path in self._raw.paths():
            if path.is_selected:
                return path.stats.udp_tx_bytes, path.stats.udp_rx_bytes
        return self._counted

    def _nudge(self) -> None:
        """Sends something that has to be acknowledged, if the peer takes such things at all."""
        try:
            with translate_errors():
                if self._raw.max_datagram_size() is not None:
                    self._raw.send_datagram(_NUDGE)
        except ExchangeError:
            pass  # it has just ended, or so much waits that silence shows anyway

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """For the time of a ``with`` block somebody waits for the peer; see :attr:`awaiting`."""
        self.awaiting += 1
        try:
            yield
        finally:
            self.awaiting -= 1

    def limit_streams(self, *, uni: int | None = None, bi: int | None = None) -> None:
        """How many streams of each kind the peer may have open at a time; the transport's default is 100."""
        if uni is not None:
            self._raw.set_max_concurrent_uni_streams(uni)
        if bi is not None:
            self._raw.set_max_concurrent_bi_streams(bi)

    def places(self) -> tuple[str, ...]:
        """Where the peer is by all paths that are open and direct."""
        return () if self.is_closed else tuple(path.remote_addr for path in self._raw.paths() if not path.is_relay)

    def traffic(self) -> tuple[int, int]:
        """Bytes sent and received since the handshake; of a closed connection, up to its end. Half of :meth:`stats`."""
        counters = self._raw.stats()
        return counters.udp_tx_bytes, counters.udp_rx_bytes

    def way(self) -> Way:
        """The present path. A part of :meth:`stats`."""
        # A closed connection has no path.
        selected = None
        if not self.has_ended:
            selected = next((path for path in self._raw.paths() if path.is_selected), None)
        if selected is None:
            return _NO_WAY
        return Way("relayed" if selected.is_relay else "direct", selected.remote_addr, selected.rtt_ms / 1000)

    def stats(self) -> ConnectionStats:
        """The present path and the counters; those of a closed connection are of its last moment."""
        counters = self._raw.stats()
        return ConnectionStats(
            way=_NO_WAY if self.is_closed else self.way(),
            bytes_sent=counters.udp_tx_bytes,
            bytes_received=counters.udp_rx_bytes,
            lost_packets=counters.lost_packets,
        )
