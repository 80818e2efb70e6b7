"""Learning rates: the reference's numbers, to the bit where it gives bits."""

from __future__ import annotations

import math
import struct
from dataclasses import replace
from typing import Any

import pytest

from distro_optim.coordinator.model import (
    ConstantLR,
    CosineLR,
    LearningRateSchedule,
    LinearLR,
    WarmupStableDecayLR,
)
from distro_optim.coordinator.rules.schedule import (
    cold_start_bounds,
    cold_start_factor,
    effective_learning_rate,
    learning_rate,
)
from distro_optim.errors import ConfigurationError
from runs import waiting_run

CONSTANT = ConstantLR(base_lr=0.01, warmup_init_lr=0.001, warmup_steps=10)
LINEAR = LinearLR(base_lr=0.01, warmup_init_lr=0.001, final_lr=0.0001, warmup_steps=10, total_steps=100)
COSINE = CosineLR(base_lr=0.01, warmup_init_lr=0.001, final_lr=0.0, warmup_steps=10, total_steps=110)
WSD = WarmupStableDecayLR(
    base_lr=0.01,
    warmup_init_lr=0.001,
    cosine_decay_final_lr=0.001,
    linear_decay_final_lr=0.0,
    warmup_steps=10,
    stable_steps=60,
    cosine_decay_steps=110,
    linear_decay_steps=20,
)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (CONSTANT, {0: 0.001, 5: 0.0055, 9: 0.0091, 10: 0.01, 100: 0.01, 1000: 0.01}),
        (LINEAR, {0: 0.001, 5: 0.0055, 10: 0.01, 55: 0.00505, 100: 0.0001, 200: 0.0001}),
        (COSINE, {0: 0.001, 5: 0.0055, 10: 0.01, 60: 0.005, 110: 0.0}),
        (
            WSD,
            {0: 0.001, 5: 0.0055, 10: 0.01, 30: 0.01, 69: 0.01, 70: 0.01, 180: 0.001, 190: 0.0005, 200: 0.0, 250: 0.0},
        ),
        (replace(CONSTANT, warmup_steps=0), {0: 0.01}),
        (replace(LINEAR, warmup_init_lr=0.01), {5: 0.01}),
        (replace(COSINE, final_lr=0.01), {50: 0.01}),
        (WarmupStableDecayLR(0.01, 0.01, 0.001, 0.001, 0, 0, 0, 0), {0: 0.001}),
    ],
)
def test_rates_of_the_reference(schedule: LearningRateSchedule, expected: dict[int, float]) -> None:
    assert {step: learning_rate(schedule, step) for step in expected} == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_a_cosine_does_not_depend_on_the_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = [learning_rate(schedule, step) for schedule in (COSINE, WSD) for step in range(0, 200, 7)]
    exact = math.cos
    monkeypatch.setattr(math, "cos", lambda x: math.nextafter(exact(x), 2.0))
    assert [learning_rate(schedule, step) for schedule in (COSINE, WSD) for step in range(0, 200, 7)] == rates


def test_the_decays_of_the_reference_within_its_tolerance() -> None:
    assert learning_rate(WSD, 125) == pytest.approx(0.0055, abs=1e-4)
    assert learning_rate(WSD, 179) == pytest.approx(0.001, abs=1e-4)
    assert learning_rate(WSD, 199) == pytest.approx(0.0001, abs=1e-4)


@pytest.mark.parametrize(
    ("step", "bits"),
    [
        (1, "3eaad7f29abcaf49"),
        (250, "3f2a36e2eb1c432d"),
        (501, "3f3a36e2e97bba9d"),
        (12750, "3f2cd5f99c38b04b"),
        (24999, "3f04f8b595e7ad6f"),
        (25000, "3f04f8b588e368f1"),
        (25001, "3f04f8b595e7ad6f"),
        (49500, "3f3a36e2eb1c432d"),
    ],
)
def test_the_cosine_has_the_bits_of_the_reference_and_rises_past_its_end(step: int, bits: str) -> None:
    schedule = CosineLR(base_lr=4e-4, warmup_init_lr=0.0, final_lr=4e-5, warmup_steps=500, total_steps=25000)
    ours = struct.unpack(">q", struct.pack(">d", learning_rate(schedule, step)))[0]
    assert abs(ours - int(bits, 16)) <= 1  # the last bit is the platform's cosine


@pytest.mark.parametrize("total_steps", [0, 9, 10])
def test_a_cosine_without_room_after_its_warmup_is_at_its_end(total_steps: int) -> None:
    assert learning_rate(replace(COSINE, total_steps=total_steps, final_lr=0.002), 10) == 0.002


@pytest.mark.parametrize("change", [{"cosine_decay_final_lr": 0.02}, {"linear_decay_final_lr": 0.002}])
def test_a_decay_that_rises_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="must not rise"):
        learning_rate(replace(WSD, **change), 0)


def test_a_cold_start_begins_at_zero_and_ends_at_the_schedule() -> None:
    state = waiting_run(cold_start_warmup_steps=4)
    state = replace(state, model=replace(state.model, lr_schedule=replace(CONSTANT, warmup_steps=0)))
    assert cold_start_bounds(state) is None
    assert effective_learning_rate(state, 20) == 0.01
    cold = replace(state, epoch_state=replace(state.epoch_state, cold_start_epoch=True, start_step=20))
    assert cold_start_bounds(cold) == (20, 24)
    rates = [effective_learning_rate(cold, step) for step in (19, 20, 21, 24, 25)]
    assert rates == [0.01, 0.0, 0.0025, 0.01, 0.01]
    assert cold_start_factor(20, None) == 1.0
