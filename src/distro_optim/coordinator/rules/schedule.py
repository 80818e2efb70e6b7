"""Numbers that depend on the step alone: learning rate and global batch size.

Rules: PsycheFoundation/psyche, ``shared/core/src/definitions.rs``, ``shared/coordinator/src/coordinator.rs``
(``get_batch_size``) and ``shared/modeling/src/trainer.rs`` (``get_lr``). All arithmetic is in float64 and in the
order written there, and cosines are rounded correctly, which those of C libraries are but for one in a thousand; so
every peer arrives at the same bits.
"""

from __future__ import annotations

import math

from ...cosine import cosine
from ...errors import ConfigurationError
from ..model import ConstantLR, CosineLR, LearningRateSchedule, LinearLR, WarmupStableDecayLR
from ..types import Coordinator, CoordinatorConfig

__all__ = ["batch_size", "cold_start_bounds", "cold_start_factor", "effective_learning_rate", "learning_rate"]


def learning_rate(lr: LearningRateSchedule, step: int) -> float:
    """The schedule at a step of the coordinator.

    A cosine is not clamped: past ``total_steps`` it rises again, as in Psyche. Where ``total_steps`` leaves no room
    after the warm-up, it is at its end (Psyche divides by zero there).

    Raises:
        ConfigurationError: a warmup-stable-decay schedule whose rates do not fall.
    """
    if isinstance(lr, WarmupStableDecayLR):
        _check_falls(lr)
    if step < lr.warmup_steps:
        return lr.warmup_init_lr + (lr.base_lr - lr.warmup_init_lr) * (step / lr.warmup_steps)
    match lr:
        case ConstantLR():
            return lr.base_lr
        case LinearLR():
            if step >= lr.total_steps:
                return lr.final_lr
            progress = (step - lr.warmup_steps) / (lr.total_steps - lr.warmup_steps)
            return lr.base_lr + (lr.final_lr - lr.base_lr) * progress
        case CosineLR():
            if lr.total_steps <= lr.warmup_steps:
                return lr.final_lr
            return _cosine(lr.base_lr, lr.final_lr, (step - lr.warmup_steps) / (lr.total_steps - lr.warmup_steps))
        case WarmupStableDecayLR():
            return _after_warmup(lr, step)


def _cosine(start: float, end: float, progress: float) -> float:
    """From ``start`` at progress 0 to ``end`` at progress 1 along half a cosine wave."""
    return end + (start - end) * (0.5 * (1.0 + cosine(math.pi * progress)))


def _after_warmup(lr: WarmupStableDecayLR, step: int) -> float:
    cosine_starts = lr.warmup_steps + lr.stable_steps
    linear_starts = cosine_starts + lr.cosine_decay_steps
    ends = linear_starts + lr.linear_decay_steps
    if step < cosine_starts:
        return lr.base_lr
    if step < linear_starts:
        progress = (step - cosine_starts) / lr.cosine_decay_steps
        return _cosine(lr.base_lr, lr.cosine_decay_final_lr, progress)
    if step < ends:
        fall = lr.cosine_decay_final_lr - lr.linear_decay_final_lr
        return lr.cosine_decay_final_lr - fall * ((step - linear_starts) / lr.linear_decay_steps)
    return lr.linear_decay_final_lr


def _check_falls(lr: WarmupStableDecayLR) -> None:
    if not lr.linear_decay_final_lr <= lr.cosine_decay_final_lr <= lr.base_lr:
        raise ConfigurationError(
            "a warmup-stable-decay schedule must not rise after its warm-up: base_lr >= cosine_decay_final_lr >= "
            f"linear_decay_final_lr, got {lr.base_lr}, {lr.cosine_decay_final_lr}, "
            f"{lr.linear_decay_final_lr}",
            name="lr_schedule",
            value=lr,
        )


def cold_start_bounds(state: Coordinator) -> tuple[int, int] | None:
    """First and last step of the extra warm-up after a pause, or None outside of one."""
    steps = state.model.cold_start_warmup_steps
    if not state.epoch_state.cold_start_epoch or not steps:
        return None
    return state.epoch_state.start_step, state.epoch_state.start_step + steps


def cold_start_factor(step: int, bounds: tuple[int, int] | None) -> float:
    """What the learning rate is multiplied with: 0 at the first step of the bounds, 1 at the last and elsewhere."""
    if bounds is None:
        return 1.0
    start, end = bounds
    if not start <= step <= end or start == end:
        return 1.0
    return (step - start) / (end - start)


def effective_learning_rate(state: Coordinator, step: int) -> float:
    """The learning rate that a trainer uses at ``step``: schedule times cold-start warm-up."""
    return learning_rate(state.model.lr_schedule, step) * cold_start_factor(step, cold_start_bounds(state))


def batch_size(config: CoordinatorConfig, tokens: int) -> int:
    """Sequences in a round that starts after ``tokens`` tokens: a linear ramp from start to end, then end."""
    if tokens >= config.global_batch_size_warmup_tokens:
        return config.global_batch_size_end
    start, end = float(config.global_batch_size_start), float(config.global_batch_size_end)
    size = start + (end - start) * (float(tokens) / float(config.global_batch_size_warmup_tokens))
    # Rust rounds halves away from zero, Python to even.
    floor = math.floor(size)
    return floor + 1 if size - floor >= 0.5 else floor
