"""A round in which we train, as the training loop sees it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Protocol

from torch import Tensor

from ..errors import ConfigurationError
from .rounds.actions import TrainBatch
from .sample_order import SampleOrder, micro_batches

__all__ = ["Round", "RoundOwner"]


class RoundOwner(Protocol):
    """What a round asks of the participant that trains in it."""

    def is_cancelled(self, step: int) -> bool:
        """Whether the round of ``step`` is over."""

    def finish_round(self, round_: Round, *, loss: float | None, skip: bool, in_step: bool) -> bool:
        """Publishes the gradients, or with ``skip`` says nothing; False if the round was over before.

        Args:
            in_step: ``optimizer.step()`` is at work, and calls the step hooks of torch.optim itself.
        """


class Round:
    """A round in which we train. While it is open, the weights look ahead; see :meth:`DisTrO.lookahead`.

    Attributes:
        step: of the run.
        batch: the coordinator's data indices, ``start`` to ``end`` inclusive.
        open: neither :meth:`finish` nor :meth:`skip` was called yet.
        piece_size: what :meth:`micro_batches` or :meth:`parts` was called with; None if it was not.
    """

    def __init__(self, action: TrainBatch, owner: RoundOwner, order: SampleOrder | None) -> None:
        self.step = action.step
        self.batch = action.batch
        self.open = True
        self.piece_size: int | None = None
        self._owner = owner
        self._order = order

    @cached_property
    def indices(self) -> list[int]:
        """Our samples: indices into the dataset, as :class:`~.sample_order.SampleOrder` maps them. Never empty.

        Raises:
            ConfigurationError: the session was not told ``dataset_size``.
        """
        if self._order is None:
            raise ConfigurationError(
                "which samples these are depends on how many there are: give the session dataset_size=len(dataset)",
                name="dataset_size",
            )
        return self._order.samples(range(self.batch.start, self.batch.end + 1))

    def micro_batches(self, size: int) -> Iterator[list[int]]:
        """:attr:`indices` in pieces of at most ``size``; ends early when the round is cancelled."""
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigurationError(f"size={size!r}: give a whole number of at least 1", name="size", value=size)
        self.piece_size = size
        for start in range(0, len(self.indices), size):
            if self.cancelled:
                return
            yield self.indices[start : start + size]

    def parts(self, size: int, *, rank: int, world_size: int) -> Iterator[tuple[list[int], float]]:
        """:attr:`indices` for one of several processes that are one peer, in pieces of at most ``size``.

        All get equally many pieces, since they work on each together. Beside each piece stands what its mean loss
        counts, so that the mean over processes of the sum over pieces is the mean over :attr:`indices`: with FSDP,
        which averages gradients, call ``(loss * weight).backward()``. It is 0 for a sample that is only there for the
        number of pieces. Ends early when the round is cancelled.

        Args:
            size: samples of a piece.
            rank, world_size: of this process among those that have different samples. Processes that share the work on
                a sample, as with tensor parallelism, give the same ones.
        """
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigurationError(f"size={size!r}: give a whole number of at least 1", name="size", value=size)
        if not 0 <= rank < world_size:
            raise ConfigurationError(
                f"rank={rank!r} of world_size={world_size!r}: give a rank from 0 to world_size - 1",
                name="rank",
                value=rank,
            )
        self.piece_size = size
        for piece in micro_batches(self.indices, size, rank=rank, world_size=world_size):
            if self.cancelled:
                return
            yield list(piece.samples), piece.weight

    @property
    def cancelled(self) -> bool:
        """The round is over before we were: what is computed for it now is of no use. Cheap; ask between batches."""
        return self._owner.is_cancelled(self.step)

    def finish(self, loss: float | Tensor | None = None) -> bool:
        """Publishes what the gradients say, and takes the lookahead off. Calling it again does nothing.

        It is a step of the optimizer: hooks of ``register_step_pre_hook`` and ``register_step_post_hook`` are called.

        Args:
            loss: mean over our samples, for logs and :meth:`SwarmSession.view`.

        Returns:
            False if the round was cancelled, so that nothing was published.
        """
        return self._owner.finish_round(self, loss=_number(loss), skip=False, in_step=False)

    def finish_in_step(self, loss: float | Tensor | None = None) -> bool:
        """What ``optimizer.step()`` does: as :meth:`finish`, without the hooks, which it calls itself."""
        return self._owner.finish_round(self, loss=_number(loss), skip=False, in_step=True)

    def skip(self) -> bool:
        """As :meth:`finish`, but without the gradients: takes part with a contribution that says nothing."""
        return self._owner.finish_round(self, loss=None, skip=True, in_step=False)


def _number(loss: float | Tensor | None) -> float | None:
    return float(loss.detach()) if isinstance(loss, Tensor) else loss
