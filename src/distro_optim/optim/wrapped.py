"""Finds a DistributedDataParallel around parameters whose updates DisTrO exchanges by itself."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

__all__ = ["is_wrapped", "warn_of_wrapper"]


def is_wrapped(params: Sequence[Tensor]) -> bool:
    """Whether a DistributedDataParallel averages the gradients of ``params``, of any shapes.

    Nothing leads from a parameter to what wraps it, so all objects are looked at; to be called once.
    """
    if not dist.is_available() or not dist.is_initialized():
        return False
    ours = {id(param) for param in params}
    return any(
        issubclass(type(wrapper), DistributedDataParallel) and any(id(p) in ours for p in wrapper.parameters())
        for wrapper in gc.get_objects()
    )


def warn_of_wrapper(params: Sequence[Tensor]) -> None:
    """Warns if ``params`` :func:`are wrapped <is_wrapped>`."""
    if is_wrapped(params):
        warnings.warn(
            "distro_optim: the model is wrapped in DistributedDataParallel, so all gradients are sent before "
            "DisTrO sends the little that it needs of them: leave the model unwrapped (of accelerate: do not "
            "prepare() it; of Lightning: strategy='auto' instead of 'ddp').",
            UserWarning,
            stacklevel=2,
        )
