"""Bytes that all peers read are read once, and each peer is charged for it.

Hundreds of peers in one process read the same messages and results. Reading is a function of the bytes, so that one of
them may read for all; but a real peer reads for itself, so what the first reading took is counted for each.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Final, TypeVar, cast

from typing_extensions import override

from ...comm.signing import is_signed_by
from ...compress import TilePlan
from ...coordinator.types import BatchId
from ...errors import ProtocolError
from ...strategy.rounds.broadcasts import Broadcast, WeightsReport
from ...strategy.rounds.reading import Reader
from ...strategy.rounds.results import ReceivedResult

__all__ = ["SharedReader", "SharedWork"]

MAX_REMEMBERED: Final = 8192
"""More than what 256 peers say in two rounds. Chosen arbitrarily."""

T = TypeVar("T")


class SharedWork:
    """Does things once.

    Args:
        cpu: CPU seconds of this thread.
    """

    def __init__(self, cpu: Callable[[], float]) -> None:
        self._cpu = cpu
        self._known: OrderedDict[Hashable, tuple[Any, ProtocolError | None, float]] = OrderedDict()
        self._owed = self._spent = 0.0

    def do(self, key: Hashable, work: Callable[[], T]) -> T:
        """What ``work`` returns or raises, a ProtocolError; of equal keys only the first is called."""
        known = self._known.get(key)
        if known is None:
            value: T | None = None
            error: ProtocolError | None = None
            began = self._cpu()
            try:
                value = work()
            except ProtocolError as raised:
                error = raised
            known = self._known[key] = (value, error, self._cpu() - began)
            self._spent += known[2]
            if len(self._known) > MAX_REMEMBERED:
                self._known.popitem(last=False)
        self._owed += known[2]
        if known[1] is not None:
            raise known[1]
        return cast("T", known[0])

    def settle(self) -> tuple[float, float]:
        """CPU seconds since the last call: for which the present peer is to be charged, and that were really spent."""
        accounts = self._owed, self._spent
        self._owed = self._spent = 0.0
        return accounts


class SharedReader(Reader):
    """One reader for all peers of a simulation."""

    def __init__(self, work: SharedWork) -> None:
        self._work = work

    @override
    def broadcast(self, data: bytes) -> Broadcast:
        read = super().broadcast
        return self._work.do(data, lambda: read(data))

    @override
    def weights(self, data: bytes) -> WeightsReport:
        read = super().weights
        return self._work.do((data, "weights"), lambda: read(data))

    @override
    def is_signed_by(self, public: bytes, data: bytes, signature: bytes) -> bool:
        return self._work.do((public, data, signature), lambda: is_signed_by.__wrapped__(public, data, signature))

    @override
    def result(
        self, data: bytes, *, step: int, batch: BatchId, data_hash: bytes, plan: TilePlan, finite: bool
    ) -> ReceivedResult:
        read = super().result
        # All peers of a simulation have equal models; so the plan is left out of the key.
        return self._work.do(
            (data, step, batch, data_hash, finite),
            lambda: read(data, step=step, batch=batch, data_hash=data_hash, plan=plan, finite=finite),
        )
