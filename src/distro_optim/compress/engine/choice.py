"""Which engine an optimizer gets."""

from __future__ import annotations

import importlib.util
from typing import Final, Literal, get_args

from ...errors import ConfigurationError
from ..dct import TransformName
from ..plan import TilePlan
from .base import Engine
from .blocks import BlockEngine
from .looking import ShareOut

__all__ = ["ENGINES", "EngineName", "check_engine", "make_engine"]

EngineName = Literal["auto", "torch", "triton"]
"""What may carry out the steps of an optimizer."""

ENGINES: Final[tuple[str, ...]] = get_args(EngineName)


def check_engine(name: str) -> None:
    """Raises ConfigurationError if no tensors on this machine could have the engine called ``name``."""
    if name == "triton" and importlib.util.find_spec("triton") is None:
        raise ConfigurationError(
            "engine='triton': Triton is not installed, which comes with PyTorch for CUDA and ROCm on Linux: "
            "pip install 'distro-optim[gpu]', or give 'auto' or 'torch'",
            name="engine",
            value=name,
        )


def make_engine(
    name: EngineName, plan: TilePlan, transform: TransformName, share: ShareOut | None = None, workers: int = 1
) -> Engine:
    """The engine called ``name``; ``"auto"`` is the fastest of those that have been run on the devices of the plan.

    The kernels in Triton have not been run on a GPU so far, so that they must be asked for by name.

    Args:
        name: of the engine.
        plan, transform, share, workers: as for :class:`~.blocks.BlockEngine`.

    Raises:
        ConfigurationError: there is no such engine here.
    """
    check_engine(name)
    if name == "triton":
        from .triton.engine import TritonEngine

        return TritonEngine(plan, transform, share, workers)
    return BlockEngine(plan, transform, share, workers)
