"""Bytes that all peers read are read once, and each peer is charged for it.

Hundreds of peers in one process read the same messages and results. Reading is a function of the bytes, so that one of
them may read for all; but a real peer reads for itself, so what the first reading took is counted for each.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Final, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from ...comm.signing import is_signed_by
from ...compress import TilePlan
from ...coordinator.types import BatchId, Witness
from ...errors import ProtocolError
from ...strategy.rounds.broadcasts import Broadcast, WeightsReport
from ...strategy.rounds.reading import Reader
from ...strategy.rounds.results import ReceivedResult
from ...verify.filter_bank import FilterBank

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

    def do(self, key: Hashable, work: Callable[..., T], *given: Any, **options: Any) -> T:
        """What ``work`` of what is given returns or raises, a ProtocolError; of equal keys only the first is called."""
        known = self._known.get(key)
        if known is None:
            value: T | None = None
            error: ProtocolError | None = None
            began = self._cpu()
            try:
                value = work(*given, **options)
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


class _SharedFilters(FilterBank):
    """A peer's own, over what is looked up once for all.

    Args:
        work: done once for all.
        filters: of all peers that were told the same reports.
    """

    def __init__(self, work: SharedWork, filters: FilterBank) -> None:
        super().__init__(())
        self._work = work
        self._filters = filters
        self._keys, self._words = filters._keys, filters._words

    @override
    def _look(self, items: list[bytes]) -> NDArray[np.bool_]:
        # Peers ask in the order in which results came to them.
        asked, filters = sorted(items), self._filters
        # With the filters, so that nothing else has their identity while that is remembered.
        _, found = self._work.do(("asked", id(filters), *asked), lambda: (filters, filters._look(asked)))
        place = {item: column for column, item in enumerate(asked)}
        return found[:, [place[item] for item in items]]


class SharedReader(Reader):
    """One reader for all peers of a simulation."""

    def __init__(self, work: SharedWork) -> None:
        self._work = work
        self._read = Reader()

    @override
    def broadcast(self, data: bytes) -> Broadcast:
        return self._work.do(data, self._read.broadcast, data)

    @override
    def weights(self, data: bytes) -> WeightsReport:
        return self._work.do((data, "weights"), self._read.weights, data)

    @override
    def is_signed_by(self, public: bytes, data: bytes, signature: bytes) -> bool:
        # Without what a peer remembers itself: equal bytes come to it once, but for repetitions.
        return self._work.do((public, data, signature), is_signed_by.__wrapped__, public, data, signature)

    @override
    def result(
        self, data: bytes, *, step: int, batch: BatchId, data_hash: bytes, plan: TilePlan, finite: bool
    ) -> ReceivedResult:
        # All peers of a simulation have equal models; so the plan is left out of the key.
        return self._work.do(
            (data, step, batch, data_hash, finite),
            self._read.result,
            data,
            step=step,
            batch=batch,
            data_hash=data_hash,
            plan=plan,
            finite=finite,
        )

    @override
    def results_filters(self, witnesses: tuple[Witness, ...]) -> FilterBank:
        return self._shared("results", witnesses, self._read.results_filters)

    @override
    def participants_filters(self, witnesses: tuple[Witness, ...]) -> FilterBank:
        return self._shared("participants", witnesses, self._read.participants_filters)

    def _shared(
        self, what: str, witnesses: tuple[Witness, ...], read: Callable[[tuple[Witness, ...]], FilterBank]
    ) -> FilterBank:
        # With the reports, for the same reason.
        _, filters = self._work.do((what, id(witnesses)), lambda: (witnesses, read(witnesses)))
        return _SharedFilters(self._work, filters)
