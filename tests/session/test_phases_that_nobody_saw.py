"""Phases that go by unseen, as on a chain, where what happens within a slot is told at once: weights stay equal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from distro_optim.coordinator.model import Hub, HubRepo
from distro_optim.coordinator.types import Coordinator, RunState
from distro_optim.strategy.rounds import actions as act
from rounds.simulator import Member, Weather

from .scripts import Script, equal_weights
from .test_runs_of_psyche import RUN_LR, SAME_START, SETTINGS, Plain
from .world import SessionWorld

S = RunState
MakeWorld = Callable[..., SessionWorld]


def hide(world: SessionWorld, is_hidden: Callable[[int, Coordinator], bool]) -> Counter[RunState]:
    """Keeps states from members; returns how many, by phase.

    Args:
        is_hidden: is given the number of a member, from 1, and the state.
    """
    hidden: Counter[RunState] = Counter()
    step = world.step

    def see(member: Member, state: Coordinator) -> None:
        if is_hidden(world.members.index(member) + 1, state):
            hidden[state.run_state] += 1
        else:
            type(member).see(member, state)

    def blinkered() -> None:
        for member in world.members:
            member.see = partial(see, member)  # type: ignore[method-assign]
        step()

    world.step = blinkered  # type: ignore[method-assign]
    return hidden


def three(make_world: MakeWorld, *, of_psyche: bool = True, **settings: Any) -> tuple[SessionWorld, list[Script]]:
    """A run of three from the beginning, with an end of an epoch every few rounds."""
    config = {"total_steps": 16, "epoch_time": 15, "init_min_clients": 3, "min_clients": 2, **settings}
    if of_psyche:
        config |= {"checkpoint": Hub(HubRepo("somebody/model")), "optimizer": SETTINGS, "lr": RUN_LR}
    world = make_world(**config)
    scripts = [Script(model_class=Plain, **SAME_START) for _ in range(3)]
    for number, script in enumerate(scripts, start=1):
        world.run(world.port(number), script)
    return world, scripts


def faults(world: SessionWorld) -> list[int]:
    return [len(member.of(act.Desynced)) for member in world.members]


REPORTS, END, WARM_UP = {S.ROUND_WITNESS}, {S.COOLDOWN, S.WAITING_FOR_MEMBERS}, {S.WARMUP}


@pytest.mark.parametrize(
    ("phases", "who", "of_psyche"),
    [
        pytest.param(REPORTS, {1, 2, 3}, True, id="nobody-sees-rounds-end"),
        pytest.param(END, {1, 2, 3}, True, id="nobody-sees-an-epochs-end", marks=pytest.mark.slow),
        pytest.param(WARM_UP, {1, 2, 3}, True, id="nobody-sees-a-warm-up", marks=pytest.mark.slow),
        pytest.param(REPORTS | END | WARM_UP, {1, 2, 3}, True, id="all-see-only-training"),
        pytest.param(REPORTS | END | WARM_UP, {2}, True, id="one-sees-only-training", marks=pytest.mark.slow),
        pytest.param(
            REPORTS | END | WARM_UP,
            {1, 2, 3},
            False,
            id="all-see-only-training-in-a-run-of-ours",
            marks=pytest.mark.slow,
        ),
        pytest.param(REPORTS | END | WARM_UP, {2}, False, id="one-sees-only-training-in-a-run-of-ours"),
    ],
)
def test_phases_may_go_by_unseen(make_world: MakeWorld, phases: set[RunState], who: set[int], of_psyche: bool) -> None:
    world, scripts = three(make_world, of_psyche=of_psyche)
    hidden = hide(world, lambda number, state: number in who and state.run_state in phases and state.progress.epoch > 0)
    world.until_all_ended()
    assert set(hidden) == phases
    assert world.state.progress.epoch >= 3
    assert faults(world) == [0, 0, 0]
    assert scripts[0].trained == scripts[1].trained == scripts[2].trained
    assert max(scripts[0].trained) > 12
    world.assert_equal_hashes()
    assert equal_weights(*scripts)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"cooldown_time": 0, "waiting_for_members_extra_time": 0}, id="the-end-of-an-epoch"),
        pytest.param({"warmup_time": 0}, id="the-warm-up", marks=pytest.mark.slow),
        pytest.param({"warmup_time": 0, "cooldown_time": 0, "waiting_for_members_extra_time": 0}, id="all-of-them"),
    ],
)
def test_phases_may_last_no_time(make_world: MakeWorld, settings: dict[str, Any]) -> None:
    """With half of all states lost on their way besides."""
    world, scripts = three(make_world, weather=Weather(state_loss=0.5), **settings)
    world.until_all_ended()
    assert faults(world) == [0, 0, 0]
    assert all(script.trained for script in scripts)
    world.assert_equal_hashes()
    assert equal_weights(*scripts)


def test_who_misses_whole_rounds_has_the_weights_of_the_others_after_the_next_warm_up(make_world: MakeWorld) -> None:
    world, scripts = three(make_world, min_clients=2)
    hidden = hide(world, lambda number, state: number == 2 and 6 <= state.progress.step <= 8)
    world.until_all_ended()
    assert hidden
    assert faults(world) == [0, 1, 0]
    [fault] = world.members[1].of(act.Desynced)
    assert "went by unseen" in fault.reason
    assert max(scripts[1].trained) == max(scripts[0].trained)  # it trains again
    assert not set(scripts[1].trained) & {6, 7, 8, 9}
    assert equal_weights(*scripts)
