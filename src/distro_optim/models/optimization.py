"""The optimizer and the schedule that a run prescribes, for a plain or a Lightning loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import nn

from ..coordinator.model import AdamW, Distro, DummyOptimizer, LearningRateSchedule, OptimizerDefinition
from ..coordinator.rules.schedule import learning_rate
from ..errors import ConfigurationError
from ..optim.rules import PUBLISHED
from ..optimizer import DisTrO

__all__ = ["DEFAULT_OPTIMIZER", "distro_settings", "make_optimizer", "make_scheduler"]

DEFAULT_OPTIMIZER: Final = Distro(
    clip_grad_norm=1.0,
    weight_decay=None,
    compression_decay=0.999,
    compression_topk=8,
    compression_chunk=64,
    quantize_1bit=True,
)
"""Where no run says otherwise: the defaults of :class:`~distro_optim.DisTrO`, and gradients of norm 1 at most."""

_ANY_RATE: Final = 1e-3
"""Where a schedule begins at 0, its factors are of this rate."""


def distro_settings(definition: OptimizerDefinition) -> dict[str, Any]:
    """Arguments of :class:`~distro_optim.DisTrO` for a run's optimizer.

    Psyche's clients tile by divisors, look ahead, and apply an update a step after it was made.

    Raises:
        ConfigurationError: the run has another optimizer.
    """
    if isinstance(definition, AdamW | DummyOptimizer):
        name = "AdamW" if isinstance(definition, AdamW) else "Dummy"
        raise ConfigurationError(
            f"the run's optimizer is {name}, which exchanges nothing between peers: only Distro is trained with",
            name="optimizer",
            value=name,
        )
    return {
        **PUBLISHED,
        "compression_decay": definition.compression_decay,
        "compression_topk": definition.compression_topk,
        "compression_chunk": definition.compression_chunk,
        "weight_decay": definition.weight_decay or 0.0,
        "quantize_1bit": definition.quantize_1bit,
        "overlap": True,
        "tiling": "divisor",
    }


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], definition: OptimizerDefinition, lr: float, **settings: Any
) -> DisTrO:
    """DisTrO over ``parameters``, in the order in which they are given, which is the order of its updates.

    Args:
        parameters: by name, as :func:`~distro_optim.models.building.sorted_parameters` gives them.
        settings: instead of those of the run, or beside them, such as ``exchange``.

    Raises:
        ConfigurationError: see :func:`distro_settings` and :class:`~distro_optim.DisTrO`.
    """
    return DisTrO(list(parameters.items()), lr=lr, **{**distro_settings(definition), **settings})


def make_scheduler(
    optimizer: torch.optim.Optimizer, schedule: LearningRateSchedule
) -> torch.optim.lr_scheduler.LambdaLR:
    """A scheduler that gives the run's learning rate at each step."""
    base = schedule.base_lr or _ANY_RATE
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = base
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(schedule, step) / base)
