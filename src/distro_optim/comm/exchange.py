"""The one seam between an optimizer and a network: publish an update, collect the peers'.

Implementations: :class:`LocalExchange` (alone), :class:`~distro_optim.comm.memory.MemoryExchange` (peers in one
process), :class:`~distro_optim.comm.process_group.ProcessGroupExchange` (torch.distributed). All of them, and yours,
pass :func:`distro_optim.testing.check_exchange`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Final

from torch import Tensor
from typing_extensions import override

from ..compress import CompressedUpdate, TilePlan
from ..errors import ConfigurationError, ExchangeError

__all__ = ["DEFAULT_TIMEOUT", "Exchange", "LocalExchange", "check_timeout"]

DEFAULT_TIMEOUT: Final = timedelta(minutes=5)
"""How long ``collect()`` waits for peers unless told otherwise. Chosen arbitrarily, above the longest step."""


def check_timeout(timeout: object) -> timedelta:
    """Raises ConfigurationError unless ``timeout`` is a time to wait."""
    if not isinstance(timeout, timedelta) or timeout <= timedelta():
        raise ConfigurationError(
            f"timeout={timeout!r}: give a datetime.timedelta above 0, such as timedelta(minutes=5)",
            name="timeout",
            value=timeout,
        )
    return timeout


class Exchange(ABC):
    """Carries one update of every peer to every peer, step after step.

    All peers make the same calls in the same order: ``start`` once (and again if the plan changes, with nothing in
    flight), then ``publish`` and ``collect`` in pairs. ``publish`` may run one step ahead of ``collect``. A peer
    without anything to say publishes :meth:`CompressedUpdate.empty`.

    Where a peer did not answer in time, peers may be one step apart from then on: close the exchange, and go on with a
    new one from a saved state.

    Attributes:
        bytes_sent: of update data handed to the network by this peer so far.
        bytes_received: of update data taken from it, own part not counted.
    """

    bytes_sent: int = 0
    bytes_received: int = 0

    @property
    @abstractmethod
    def num_peers(self) -> int:
        """The most updates that one :meth:`collect` returns, the own one included."""

    @abstractmethod
    def start(self, plan: TilePlan, params: Sequence[Tensor]) -> None:
        """Agrees with the peers on ``plan`` and gives all of them the same ``params``, in place. May block.

        Raises:
            ExchangeError: a peer has another plan, or the exchange is closed.
        """

    @abstractmethod
    def publish(self, update: CompressedUpdate) -> None:
        """Starts to send ``update`` and returns without waiting for anybody. The caller no longer changes it.

        Raises:
            ExchangeError: the exchange is closed, or not started.
        """

    @abstractmethod
    def collect(self) -> list[CompressedUpdate]:
        """Waits for the updates of all peers for the oldest step that was published and not collected.

        All peers get the same updates in the same order, the own one in the form in which the others get it.

        Raises:
            ExchangeError: nothing is in flight, the peers did not answer in time, or the exchange is closed.
        """

    @abstractmethod
    def close(self) -> None:
        """Leaves. Frees what it holds and stops waiting peers from waiting for us. May be called twice."""


class LocalExchange(Exchange):
    """An exchange without other peers: what is published is what is collected."""

    def __init__(self) -> None:
        self._queue: deque[CompressedUpdate] | None = deque()
        self._started = False

    @property
    @override
    def num_peers(self) -> int:
        return 1

    @override
    def start(self, plan: TilePlan, params: Sequence[Tensor]) -> None:
        self._open()
        self._started = True

    @override
    def publish(self, update: CompressedUpdate) -> None:
        queue = self._open()
        if not self._started:
            raise ExchangeError("start() before publish()")
        queue.append(update)

    @override
    def collect(self) -> list[CompressedUpdate]:
        queue = self._open()
        if not queue:
            raise ExchangeError("nothing is in flight: publish() before collect()")
        return [queue.popleft()]

    @override
    def close(self) -> None:
        self._queue = None

    def _open(self) -> deque[CompressedUpdate]:
        if self._queue is None:
            raise ExchangeError("the exchange is closed")
        return self._queue
