"""Several optimizers of one process, one step at a time, in one thread and in the same order every time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..optimizer import DisTrO

__all__ = ["step_together"]


def step_together(
    optimizers: Sequence[DisTrO], closures: Sequence[Callable[[], float]] | None = None
) -> list[float | None]:
    """What ``optimizer.step()`` of all peers of a group would do if each had a thread of its own.

    Args:
        optimizers: all peers of a :class:`~distro_optim.comm.memory.MemoryExchange` group.
        closures: one for each, as ``step()`` takes them; without them the gradients must be there.

    Returns:
        The closures' losses, or None for each optimizer.

    Raises:
        ValueError: there are more or fewer closures than optimizers.
        DistroError: as ``step()`` raises it.
    """
    if closures is not None and len(closures) != len(optimizers):
        raise ValueError(f"{len(closures)} closures for {len(optimizers)} optimizers")
    losses: list[float | None] = [None] * len(optimizers)
    if closures is not None:
        losses = [o._evaluate(closure) for o, closure in zip(optimizers, closures, strict=True)]
    for optimizer in optimizers:
        optimizer.begin_step()
    for optimizer in optimizers:
        optimizer.finish_step()
    if closures is None:
        for optimizer in optimizers:
            if optimizer.overlap:
                optimizer.lookahead()
    return losses
