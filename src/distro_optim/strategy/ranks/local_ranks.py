"""The processes of one machine that are one peer: what the leader says, all say.

They are processes of one script on one machine and trust each other: what passes between them is pickled.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ...errors import RunError

__all__ = ["LocalRanks", "by_leader"]

PATIENCE: Final = timedelta(days=1)
"""How long a process waits for another one: while the leader gets the model from peers, the others wait. One that dies
is noticed at once, as its connections close. Chosen arbitrarily, longer than a large model takes to arrive."""

END_PATIENCE: Final = timedelta(seconds=30)
"""How long they wait for each other at the end, where one of them may be gone with an error. Chosen arbitrarily."""

_PIECE_BYTES: Final = 64 << 20
"""Of a tensor that the leader sends. Chosen arbitrarily, far below what gloo can count."""

T = TypeVar("T")


@dataclass(frozen=True)
class _Outcome(Generic[T]):
    """What the leader's call returned, or raised."""

    value: T | None
    error: BaseException | None = None

    def result(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.value


class LocalRanks:
    """The processes of a peer, over a group of their own: gloo, on whatever device they train.

    Every one of them makes one, at the same time; there is a process group already.

    Args:
        members: their ranks; None for all of the default process group.

    Attributes:
        leads: this process is the leader, which is in the run.
        size, rank: how many they are, and which of them this is.
        hold_together: they hold one model together, so that none has whole tensors.
    """

    def __init__(self, members: Sequence[int] | None = None) -> None:
        ranks = sorted(members) if members is not None else list(range(dist.get_world_size()))
        self._group = dist.new_group(
            None if members is None else ranks,
            timeout=PATIENCE,
            backend="gloo",
            use_local_synchronization=members is not None,
        )
        self._leader = ranks[0]
        self.size = len(ranks)
        self.rank = ranks.index(dist.get_rank())
        self.leads = self.rank == 0
        self.hold_together = False

    def share(self, ask: Callable[[], T] | None) -> T:
        """What ``ask`` returns or raises on the leader; it is None on the others.

        Raises:
            RunError: the leader is gone.
        """
        said: list[Any] = [None]
        if ask is not None:
            try:
                said = [_Outcome(ask())]
            except BaseException as error:
                said = [_Outcome(None, error)]
                self._say([_Outcome(None, _portable(error))])
                raise
        self._say(said)
        outcome: _Outcome[T] = said[0]
        result: T = outcome.result()
        return result

    def _say(self, said: list[Any]) -> None:
        try:
            dist.broadcast_object_list(said, self._leader, group=self._group)
        except RuntimeError as error:
            who = "another process of this peer" if self.leads else "the process of this peer that is in the run"
            raise RunError(f"{who} is gone: look at what it says, and start all of them again") from error

    def send(self, tensor: Tensor) -> None:
        """The leader's tensor into those of the others.

        Args:
            tensor: contiguous, in main memory, of the same shape and type everywhere.
        """
        flat = tensor.reshape(-1).view(torch.uint8)
        for piece in flat.split(_PIECE_BYTES) if len(flat) else ():
            dist.broadcast(piece, self._leader, group=self._group)

    def collect(self, mine: T) -> list[T]:
        """What each of them has, by :attr:`rank`."""
        everybody: list[Any] = [None] * self.size
        dist.all_gather_object(everybody, mine, group=self._group)
        return everybody

    def all_want(self, wants: bool) -> bool:
        """Whether all of them want something, at the end: False also where one of them is gone."""
        try:
            dist.monitored_barrier(self._group, timeout=END_PATIENCE)
            return all(self.collect(wants))
        except RuntimeError:
            return False


def _portable(error: BaseException) -> BaseException:
    """An error that the other processes can raise; of one that does not survive the way, what it says."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - our own, to see whether it can be
    except Exception:
        return RunError(f"{type(error).__name__}: {error}")
    return error


def by_leader(ranks: LocalRanks | None, make: Callable[[], T]) -> T | None:
    """What ``make`` returns, in the process that speaks for the peer; None in the others. What goes wrong for that one
    goes wrong for all: otherwise they would wait for it.

    Args:
        ranks: the processes that are the peer; None if it is this one alone.
        make: called by the leader.
    """
    made: list[T] = []

    def call() -> None:
        made.append(make())

    if ranks is None:
        call()
    else:
        ranks.share(call if ranks.leads else None)
    return made[0] if made else None
