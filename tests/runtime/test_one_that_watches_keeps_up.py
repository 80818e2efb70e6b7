"""A run waits for nobody who watches it: what waits to be applied there is bounded."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from distro_optim.errors import RunError
from distro_optim.strategy.network import driver
from distro_optim.strategy.network.driver import RoundDriver
from distro_optim.strategy.network.mailbox import Mailbox
from distro_optim.strategy.rounds import actions as act

ROUNDS = 12
BOUND = 8


def waiting_after(rounds: int, *, watches: bool) -> tuple[int, BaseException | None]:
    """How many actions wait after so many rounds that nobody applies, and what ends the run, if anything does."""

    async def scenario() -> tuple[int, BaseException | None]:
        mailbox = Mailbox(lambda: 0.0)
        subject = RoundDriver(
            rounds=SimpleNamespace(watches=watches),  # type: ignore[arg-type]
            swarm=SimpleNamespace(),  # type: ignore[arg-type]
            coordinator=SimpleNamespace(),  # type: ignore[arg-type]
            mailbox=mailbox,
            journal=SimpleNamespace(tell=print, contributions=SimpleNamespace(counted=lambda _: None)),  # type: ignore[arg-type]
        )
        for step in range(1, rounds + 1):
            subject._carry_out(act.ApplyResults(step=step, lr=0.01, bounds=None, updates=()))
        return mailbox.num_waiting, subject._over.exception() if subject._over.done() else None

    return asyncio.run(scenario())


def test_one_that_applies_more_slowly_than_the_run_goes_gives_up_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "MAX_UNAPPLIED", BOUND)
    waiting, error = waiting_after(ROUNDS, watches=True)
    assert waiting == BOUND + 1
    assert isinstance(error, RunError)
    assert "applies results more slowly than the run makes them" in str(error)


def test_a_member_is_waited_for_by_the_run_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "MAX_UNAPPLIED", BOUND)
    assert waiting_after(ROUNDS, watches=False) == (ROUNDS, None)


def test_a_short_delay_ends_nothing() -> None:
    assert waiting_after(ROUNDS, watches=True) == (ROUNDS, None)
