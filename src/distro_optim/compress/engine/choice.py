"""Which engine an optimizer gets."""

from __future__ import annotations

from typing import Final, Literal, get_args

from ...errors import ConfigurationError
from ..dct import TransformName
from ..plan import TilePlan
from .base import Engine
from .blocks import BlockEngine, ShareOut

__all__ = ["ENGINES", "EngineName", "check_engine", "make_engine"]

EngineName = Literal["auto", "torch", "triton"]
"""What may carry out the steps of an optimizer."""

ENGINES: Final[tuple[str, ...]] = get_args(EngineName)


def check_engine(name: str) -> None:
    """Raises ConfigurationError if no tensors on this machine could have the engine called ``name``."""
    if name == "triton":
        raise ConfigurationError(
            "engine='triton': this version has no kernels in Triton; give 'auto' or 'torch'", name="engine", value=name
        )


def make_engine(
    name: EngineName, plan: TilePlan, transform: TransformName, share: ShareOut | None = None, workers: int = 1
) -> Engine:
    """The engine called ``name``; ``"auto"`` is the fastest of those that have been run on the devices of the plan.

    Args:
        name: of the engine.
        plan, transform, share, workers: as for :class:`~.blocks.BlockEngine`.

    Raises:
        ConfigurationError: there is no such engine for these tensors, or here.
    """
    check_engine(name)
    return BlockEngine(plan, transform, share, workers)
