"""Settings of a DisTrO optimizer and those that a coordinator's state names, in both directions."""

from __future__ import annotations

from typing import Any

from ...coordinator.model import ConstantLR, Distro, LearningRateSchedule
from ...errors import ConfigurationError
from ...optim.rules import PUBLISHED
from ...optimizer import DisTrO

__all__ = ["adopt_settings", "changes_of_schedule", "schedule_of", "settings_of"]


def settings_of(optimizer: DisTrO) -> Distro:
    """What the state of a hosted run says about the optimizer: the settings of its first parameter group."""
    group = optimizer.param_groups[0]
    return Distro(
        clip_grad_norm=None,
        weight_decay=float(group["weight_decay"]),
        compression_decay=float(group["compression_decay"]),
        compression_topk=min(int(group["compression_topk"]), 0xFFFF),
        compression_chunk=int(group["compression_chunk"]),
        quantize_1bit=optimizer.quantize_1bit,
    )


def schedule_of(optimizer: DisTrO) -> ConstantLR:
    """The run's schedule where nobody gave one: the learning rate with which the first parameter group begins."""
    return ConstantLR(base_lr=_beginning_lr(optimizer), warmup_init_lr=0.0, warmup_steps=0)


def _beginning_lr(optimizer: DisTrO) -> float:
    group = optimizer.param_groups[0]
    return float(group.get("initial_lr", group["lr"]))  # before a scheduler has changed it


def changes_of_schedule(optimizer: DisTrO, schedule: LearningRateSchedule, clip: float | None) -> list[str]:
    """In words, what a Psyche run makes of the script's learning rate, and of gradients."""
    own, changes = _beginning_lr(optimizer), []
    if not isinstance(schedule, ConstantLR) or schedule.warmup_steps or schedule.base_lr != own:
        name, rate = type(schedule).__name__, f"{schedule.base_lr:g}"
        changes.append(f"learning rates are the run's, {name} of {rate} (the script says {own:g})")
    if clip is not None:
        changes.append(f"gradients are clipped to a norm of {clip:g}")
    return changes


def adopt_settings(optimizer: DisTrO, run: Distro) -> list[str]:
    """Gives the optimizer the settings of a Psyche run, and returns in words what changed.

    Raises:
        ConfigurationError: it cannot have them.
    """
    if optimizer.transform != "dct":
        raise ConfigurationError(
            f'transform={optimizer.transform!r}: a Psyche run transforms with "dct"; leave transform out',
            name="transform",
            value=optimizer.transform,
        )
    settings: dict[str, Any] = {
        **PUBLISHED,
        "weight_decay": run.weight_decay or 0.0,
        "compression_decay": run.compression_decay,
        "compression_topk": run.compression_topk,
        "compression_chunk": run.compression_chunk,
    }
    changes = [
        f"{name} is {value} (the script says {group[name]})"
        for group in optimizer.param_groups[:1]
        for name, value in settings.items()
        if group[name] != value
    ]
    if optimizer.quantize_1bit != run.quantize_1bit:
        changes.append(f"quantize_1bit is {run.quantize_1bit} (the script says {optimizer.quantize_1bit})")
    if optimizer.tiling != "divisor":
        changes.append(f'tiling is "divisor" (the script says "{optimizer.tiling}")')
    if optimizer.arithmetic != "psyche":
        changes.append(f'arithmetic is "psyche", that of its clients (the script says "{optimizer.arithmetic}")')
    optimizer.reconfigure(tiling="divisor", quantize_1bit=run.quantize_1bit, arithmetic="psyche", **settings)
    return changes
