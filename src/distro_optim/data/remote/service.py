"""A server of training data but for its sockets and its disk.

Protocol: PsycheFoundation/psyche, ``shared/data-provider/src/remote``; the handshake is that of the coordinator. Only
members of the present epoch are served. Psyche's server ends when asked for what it does not have; this one refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from typing_extensions import override

from ...comm.framing import CHALLENGE_SIZE, SERVER_FRAME_LIMIT, Else, encode_frame
from ...comm.serving.connection import Connection
from ...comm.serving.limits import ServerLimits
from ...comm.serving.service import CLOSED_BY_CLIENT, ConnectionService, Output
from ...coordinator.messages import (
    CLIENT_TO_DATA_SERVER,
    DATA_SERVER_TO_CLIENT,
    RejectionReason,
    RequestRejected,
    RequestTrainingData,
)
from ...coordinator.server.service import Connected, Disconnected
from ...coordinator.types import BatchId, Coordinator, NodeIdentity
from ...errors import LimitExceededError, ProtocolError

__all__ = ["DataIndex", "DataOutput", "DataService"]

MAX_TOKEN_BYTES: Final = 5
"""Of a token on the wire: a varint of 32 bits."""

MAX_WAITING: Final = 4
"""Requests of one client that are not answered or not read yet. Psyche's client sends one at a time."""


class DataIndex(Protocol):
    """What the service has to know of the data."""

    seq_len: int

    def has(self, batch: BatchId) -> bool:
        """Whether there is a sequence for each index of ``batch``."""


@dataclass
class DataOutput(Output):
    """Besides: requests whose data are to be read and given to :meth:`DataService.answer`."""

    requests: list[tuple[Connection, BatchId]] = field(default_factory=list)


class DataService(ConnectionService):
    """Serves the data of a run to its members.

    Args:
        data: what there is.
        state: gives the run's present state.
        draw: gives that many random bytes.
        limits: what one stranger may ask.
    """

    def __init__(
        self,
        data: DataIndex,
        state: Callable[[], Coordinator],
        *,
        draw: Callable[[int], bytes],
        limits: ServerLimits | None = None,
    ) -> None:
        self._data = data
        self._state = state
        self._draw = draw
        self._limits = limits or ServerLimits()
        self._waiting: dict[Connection, int] = {}
        self._output = DataOutput()

    @property
    def num_connections(self) -> int:
        """Clients that are connected now."""
        return len(self._waiting)

    @property
    def max_sequences(self) -> int:
        """Of one answer, so that it fits the frames that Psyche's server could write."""
        return (SERVER_FRAME_LIMIT - 1024) // (MAX_TOKEN_BYTES * (self._data.seq_len + 1) + 3)

    @override
    def has(self, session: Connection) -> bool:
        return session in self._waiting

    @override
    def take_output(self) -> DataOutput:
        output, self._output = self._output, DataOutput()
        return output

    @override
    def connect(self, address: str, now: float, place: str | None = None) -> Connection:
        if len(self._waiting) >= self._limits.connections:
            raise LimitExceededError(f"{self._limits.connections} connections are open already")
        session = Connection(
            self._draw(CHALLENGE_SIZE),
            CLIENT_TO_DATA_SERVER,
            DATA_SERVER_TO_CLIENT,
            address=address,
            limits=self._limits,
            now=now,
        )
        self._waiting[session] = 0
        self._output.writable.add(session)
        return session

    @override
    def receive(self, session: Connection, data: bytes, now: float) -> None:
        if session not in self._waiting:
            return
        try:
            was_open = session.is_open
            requests = session.receive(data, now)
            if session.is_open and not was_open:
                self._output.events.append(Connected(client=self._client_of(session), address=session.address))
            for request in requests:
                self._request(session, request, now)
        except ProtocolError as error:
            self._output.closing.setdefault(session, str(error))
            self.disconnect(session, str(error))

    def answer(self, session: Connection, frame: bytes, now: float) -> None:
        """Sends what was read for a request, as :func:`encode_frame` made it of a
        :class:`~distro_optim.coordinator.messages.TrainingData`."""
        if session in self._waiting:
            self._waiting[session] -= 1
            session.send(frame, now)
            self._output.writable.add(session)

    @override
    def disconnect(self, session: Connection, reason: str = CLOSED_BY_CLIENT) -> None:
        if self._waiting.pop(session, None) is not None:
            client = None if session.peer is None else self._client_of(session)
            self._output.events.append(Disconnected(client=client, address=session.address, reason=reason))

    @override
    def tick(self, now: float) -> None:
        for session in list(self._waiting):
            reason = session.overdue(now)
            if reason is not None:
                self._output.closing.setdefault(session, reason)
                self.disconnect(session, reason)

    def _request(self, session: Connection, request: RequestTrainingData, now: float) -> None:
        batch = request.data_ids
        members = {member.id.p2p_identity for member in self._state().epoch_state.clients}
        fits = batch.end - batch.start < self.max_sequences
        if session.peer not in members or not fits or not self._data.has(batch):
            refusal = Else(RequestRejected(batch, RejectionReason.NOT_IN_THIS_ROUND))
            session.send(encode_frame(DATA_SERVER_TO_CLIENT.encode(refusal)), now)
            self._output.writable.add(session)
            return
        if self._waiting[session] + session.num_unsent >= MAX_WAITING:
            raise LimitExceededError(f"more than {MAX_WAITING} requests at once")
        self._waiting[session] += 1
        self._output.requests.append((session, batch))

    def _client_of(self, session: Connection) -> NodeIdentity:
        if session.peer is None:
            raise ProtocolError("no key is proved")
        return NodeIdentity.from_single_key(session.peer)
