"""The seam between the rules of a server and the sockets that carry it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from .connection import Session

__all__ = ["Output", "SessionService"]


@dataclass
class Output:
    """What a service wants the sockets' side to do.

    Attributes:
        writable: sessions with frames to write.
        closing: sessions that are over, and why.
        events: what happened, for people to look at.
    """

    writable: set[Session] = field(default_factory=set)
    closing: dict[Session, str] = field(default_factory=dict)
    events: list[Any] = field(default_factory=list)


class SessionService(ABC):
    """The rules of a server. Times are monotonic seconds."""

    @abstractmethod
    def connect(self, address: str, now: float) -> Session:
        """Someone connects.

        Raises:
            LimitExceededError: too many are connected; close the connection.
        """

    @abstractmethod
    def receive(self, session: Session, data: bytes, now: float) -> None:
        """Bytes of a session. What is wrong with them ends it, and nothing else."""

    @abstractmethod
    def disconnect(self, session: Session, reason: str = "the client closed the connection") -> None:
        """A connection is gone, whoever ended it. Calling it again does nothing."""

    @abstractmethod
    def has(self, session: Session) -> bool:
        """Is the session still served?"""

    @abstractmethod
    def tick(self, now: float) -> None:
        """Time passes. To be called about twice a second."""

    @abstractmethod
    def take_output(self) -> Output:
        """What has to be done since the last call."""
