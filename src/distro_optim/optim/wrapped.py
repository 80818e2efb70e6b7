"""Finds a DistributedDataParallel around parameters whose updates DisTrO exchanges by itself."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Sequence

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

__all__ = ["warn_of_wrapper"]


def warn_of_wrapper(params: Sequence[Tensor]) -> None:
    """Warns if a DistributedDataParallel averages the gradients of ``params``, of any shapes.

    Nothing leads from a parameter to what wraps it, so all objects are looked at; to be called once.
    """
    ours = {id(param) for param in params}
    for wrapper in gc.get_objects():
        if type(wrapper) is DistributedDataParallel and any(id(p) in ours for p in wrapper.parameters()):
            warnings.warn(
                "distro_optim: the model is wrapped in DistributedDataParallel, so all gradients are sent before "
                "DisTrO sends the little that it needs of them: leave the model unwrapped (of accelerate: do not "
                "prepare() it).",
                UserWarning,
                stacklevel=2,
            )
            return
