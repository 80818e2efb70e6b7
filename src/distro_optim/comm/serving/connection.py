"""One connection as the server sees it: handshake, limits, and what is still to be sent. No I/O."""

from __future__ import annotations

import functools
from collections import deque
from typing import Any

from ...errors import LimitExceededError
from ..changes import change_of
from ..framing import LinkState, ServerLink, encode_frame, payload_of
from ..postcard import Codec
from .limits import Bucket, ServerLimits

__all__ = ["Connection", "changed_frame"]


@functools.lru_cache(maxsize=16)  # for most clients the same
def changed_frame(before: bytes, frame: bytes) -> bytes:
    """A frame for who has the one before, where changes were agreed on."""
    return encode_frame(change_of(payload_of(before), payload_of(frame)))


class Connection:
    """A client of a server, known by its key once that is proved.

    Times are monotonic seconds.

    Args:
        challenge: 32 fresh random bytes.
        incoming: codec of what the client sends, with its envelope.
        outgoing: codec of what the server sends, with its envelope.
        address: of the client, for the log.
        limits: how much it may ask for.
        now: when it connected.
        takes_questions: see :class:`~distro_optim.comm.framing.ServerLink`.
    """

    def __init__(
        self,
        challenge: bytes,
        incoming: Codec,
        outgoing: Codec,
        *,
        address: str,
        limits: ServerLimits,
        now: float,
        takes_questions: bool = False,
    ) -> None:
        self.address = address
        self._limits = limits
        self._link = ServerLink(
            challenge, incoming, outgoing, limit=limits.message_bytes, takes_questions=takes_questions
        )
        self._messages = Bucket(limits.messages_per_second, limits.messages_burst, now)
        self._bytes = Bucket(limits.bytes_per_second, limits.bytes_burst, now)
        self._unsent: deque[bytes] = deque([self._link.opening()])
        self._came = now
        self._waiting_since: float | None = now
        self._before: bytes | None = None  # what the client has, where it wants changes

    @property
    def peer(self) -> bytes | None:
        """The client's public key, once proved."""
        return self._link.peer

    @property
    def question(self) -> bytes | None:
        """What its owner wants to know in place of being a client; None if it wants to be one."""
        return self._link.question

    @property
    def is_open(self) -> bool:
        """Whether the client has proved its key and the link is not closed."""
        return self._link.state is LinkState.OPEN

    @property
    def num_unsent(self) -> int:
        """Frames in line."""
        return len(self._unsent)

    def receive(self, data: bytes, now: float) -> list[Any]:
        """Takes bytes and returns the messages that are complete.

        Raises:
            ProtocolError: they are malformed, or too many at once; the connection is over.
        """
        if not self._bytes.take(len(data), now):
            self._link.close()
            raise LimitExceededError(f"more than {self._limits.bytes_per_second:.0f} bytes a second came")
        messages = self._link.receive(data, max_messages=int(self._messages.available(now)))
        self._messages.take(len(messages), now)
        return messages

    def send(self, frame: bytes, now: float) -> None:
        """Puts a frame in line. For a slow reader only the newest are kept, since a state replaces those before."""
        if self._waiting_since is None:
            self._waiting_since = now
        if self._unsent and self._unsent[-1] is frame:
            return
        self._unsent.append(frame)
        while len(self._unsent) > self._limits.unsent_frames:
            self._unsent.popleft()

    def next_frame(self) -> bytes | None:
        """The next frame to write, None if there is none. It counts as unsent until :meth:`sent`."""
        if not self._unsent:
            return None
        frame = self._unsent.popleft()
        if not self._link.sends_changes:
            return frame
        before, self._before = self._before, frame
        return frame if before is None else changed_frame(before, frame)

    def sent(self, now: float) -> None:
        """The frame last taken has gone out."""
        self._waiting_since = now if self._unsent else None

    def excuse(self, seconds: float) -> None:
        """The client is not to blame for so many seconds that have just gone by."""
        self._came += seconds
        if self._waiting_since is not None:
            self._waiting_since += seconds

    def overdue(self, now: float) -> str | None:
        """Why the client must be cut off by now; None if there is no reason."""
        if not self.is_open and now - self._came > self._limits.handshake_seconds:
            return f"it did not answer the challenge within {self._limits.handshake_seconds:g} seconds"
        if self._waiting_since is not None and now - self._waiting_since > self._limits.stall_seconds:
            return f"it read nothing for {self._limits.stall_seconds:g} seconds"
        return None
