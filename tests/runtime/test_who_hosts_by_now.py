"""Who hosts a run is asked of those whom a ticket names, and one that is gone is not waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from distro_optim.comm.addresses import EndpointAddr
from distro_optim.comm.iroh import whereabouts
from distro_optim.comm.iroh.whereabouts import Whereabouts
from distro_optim.coordinator.ticket import RunTicket
from distro_optim.errors import PeerUnreachableError
from distro_optim.strategy.network import finding_the_host
from distro_optim.strategy.network.finding_the_host import GRACE_SECONDS, find_host
from rounds.simulator import secret
from runtime.hurry import HurriedThread

pytestmark = [pytest.mark.waiting]

ME, OLD, FIRST, SECOND, THIRD = (EndpointAddr(secret(number).public) for number in range(1, 6))
TICKET = RunTicket("run", (), OLD, (FIRST, SECOND, THIRD))
LONG = whereabouts.SECONDS


def asked(
    monkeypatch: pytest.MonkeyPatch, answers: Mapping[EndpointAddr, tuple[float, Whereabouts | None]], **how: Any
) -> tuple[Whereabouts | None, float]:
    """What comes of it, and after how many seconds, if each peer answers after so long, or cannot be reached then."""

    async def ask(node: object, peer: EndpointAddr, run_id: str) -> Whereabouts:
        seconds, answer = answers.get(peer, (LONG, None))
        await asyncio.sleep(seconds)
        if answer is None:
            raise PeerUnreachableError("it is gone")
        return answer

    monkeypatch.setattr(finding_the_host, "ask_whereabouts", ask)
    thread = HurriedThread("asking")
    try:
        begun = thread.clock.time()
        with thread.clock.waiting(lambda: False):
            node: Any = SimpleNamespace(endpoint_id=ME.id)
            found = thread.run(find_host(node, TICKET, **how), 30)
        return found, thread.clock.time() - begun
    finally:
        thread.stop()


def test_a_host_that_is_gone_is_not_waited_for_once_another_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    new = Whereabouts(1, FIRST)
    found, seconds = asked(monkeypatch, {FIRST: (0.1, new), SECOND: (0.3, new)})
    assert found == new
    assert GRACE_SECONDS <= seconds < LONG


def test_who_knows_of_a_later_host_has_a_while_to_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    latest = Whereabouts(2, SECOND)
    found, _ = asked(monkeypatch, {FIRST: (0.1, Whereabouts(1, FIRST)), SECOND: (GRACE_SECONDS, latest)})
    assert found == latest


def test_peers_that_know_nothing_new_are_no_reason_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    new = Whereabouts(1, FIRST)
    old = {SECOND: (0.1, Whereabouts(0, OLD)), THIRD: (0.1, Whereabouts())}
    assert asked(monkeypatch, {**old, FIRST: (LONG - 1, new)})[0] == new
    found, seconds = asked(monkeypatch, old)
    assert found == Whereabouts(0, OLD)
    assert seconds >= LONG


def test_who_must_miss_nobody_waits_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    latest = Whereabouts(2, SECOND)
    answers = {FIRST: (0.1, Whereabouts(1, FIRST)), SECOND: (LONG - 1, latest)}
    assert asked(monkeypatch, answers, waits_for_all=True)[0] == latest
