"""The seam between the rules of a server and its sockets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Final

from .connection import Connection

__all__ = ["CLOSED_BY_CLIENT", "ConnectionService", "Output"]

CLOSED_BY_CLIENT: Final = "the client closed the connection"
"""Why a connection is gone that did not break, and that we did not end."""


@dataclass
class Output:
    """What a service wants its sockets to do.

    Attributes:
        writable: connections with frames to write.
        closing: connections that are over, and why.
        events: what happened, for people to look at.
    """

    writable: set[Connection] = field(default_factory=set)
    closing: dict[Connection, str] = field(default_factory=dict)
    events: list[Any] = field(default_factory=list)


class ConnectionService(ABC):
    """The rules of a server. Times are monotonic seconds."""

    @abstractmethod
    def connect(self, address: str, now: float, place: str | None = None) -> Connection:
        """A client connects.

        Raises:
            LimitExceededError: too many are connected; close the connection.
        """

    @abstractmethod
    def receive(self, connection: Connection, data: bytes, now: float) -> None:
        """Bytes of a connection. What is wrong with them ends it, and nothing else."""

    @abstractmethod
    def disconnect(self, connection: Connection, reason: str = CLOSED_BY_CLIENT) -> None:
        """A connection is gone, whichever side ended it. Calling it again does nothing."""

    @abstractmethod
    def has(self, connection: Connection) -> bool:
        """Whether the connection is still served."""

    @abstractmethod
    def tick(self, now: float) -> None:
        """Time passes. Call it about twice a second."""

    @abstractmethod
    def take_output(self) -> Output:
        """What has come up to be done since the last call."""
