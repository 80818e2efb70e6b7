"""A result that goes along with its announcement and the report on weights leave together, and nothing waits long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from distro_optim.comm.carrying import MAX_CARRIED
from distro_optim.comm.swarm import Channel
from distro_optim.errors import StoreFullError
from distro_optim.strategy.network import to_peers
from distro_optim.strategy.network.to_peers import ToPeers
from distro_optim.strategy.rounds import actions as act

RESULT, REPORT = act.Announce(b"result", carrying=b"blob"), act.AnnounceWeights(b"report")


class Swarm:
    """Notes what it is told, and in which turn of the loop."""

    def __init__(self) -> None:
        self.said: list[tuple[str, int]] = []
        self.turn = 0
        self.is_full = False

    async def count_turns(self) -> None:
        while True:
            self.turn += 1
            await asyncio.sleep(0)

    async def publish(self, data: bytes, tag: str) -> None:
        if self.is_full:
            raise StoreFullError("no room")
        self.said.append((f"store {data.decode()}", self.turn))

    async def announce(self, data: bytes, *, channel: Channel = Channel.RUN, carrying: bytes | None = None) -> None:
        where = "" if channel is Channel.RUN else " to our kind"
        self.said.append((f"{data.decode()}{where}{' with ' + carrying.decode() if carrying else ''}", self.turn))


def saying(test: Callable[[Swarm, ToPeers], Coroutine[Any, Any, None]]) -> tuple[Swarm, list[str], list[str]]:
    swarm, results, lost = Swarm(), list[str](), list[str]()

    async def inside() -> None:
        speech = ToPeers(swarm, on_result=lambda tag, data: results.append(tag), on_lost=lost.append)  # type: ignore[arg-type]
        tasks = [asyncio.create_task(work) for work in (swarm.count_turns(), speech.run())]
        async with asyncio.timeout(20):
            await test(swarm, speech)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(inside())
    return swarm, results, lost


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0)


def test_a_result_waits_for_the_report_that_is_due_and_both_leave_in_one_turn() -> None:
    async def test(swarm: Swarm, speech: ToPeers) -> None:
        speech.put(RESULT)
        speech.expect_report()
        for _ in range(10):
            await asyncio.sleep(0)
        assert not swarm.said
        speech.put(REPORT)
        await until(lambda: len(swarm.said) == 2)

    swarm, _, _ = saying(test)
    (first, one), (second, other) = swarm.said
    assert (first, second) == ("result with blob", "report to our kind")
    assert one == other


@pytest.mark.parametrize("said", [RESULT, act.Announce(b"result"), REPORT])
def test_without_a_report_that_is_due_nothing_waits(said: to_peers.Speech, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_peers, "GATHER_SECONDS", 1e6)

    async def test(swarm: Swarm, speech: ToPeers) -> None:
        speech.put(said)
        await until(lambda: bool(swarm.said))
        speech.expect_report()
        speech.put(REPORT)
        speech.put(said)
        await until(lambda: len(swarm.said) == 3)

    saying(test)


@pytest.mark.parametrize("said", [act.Announce(b"finished"), act.Announce(b"large", carrying=b"b" * (MAX_CARRIED + 1))])
def test_what_does_not_go_along_does_not_wait_for_a_report(said: act.Announce, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_peers, "GATHER_SECONDS", 1e6)

    async def test(swarm: Swarm, speech: ToPeers) -> None:
        speech.expect_report()
        speech.put(said)
        await until(lambda: bool(swarm.said))

    saying(test)


def test_a_report_that_does_not_come_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_peers, "GATHER_SECONDS", 0.01)

    async def test(swarm: Swarm, speech: ToPeers) -> None:
        speech.expect_report()
        speech.put(RESULT)
        await until(lambda: bool(swarm.said))
        monkeypatch.setattr(to_peers, "GATHER_SECONDS", 1e6)
        speech.put(RESULT)
        await until(lambda: len(swarm.said) == 2)

    saying(test)


def test_what_cannot_be_said_is_told_and_the_rest_is_said() -> None:
    async def test(swarm: Swarm, speech: ToPeers) -> None:
        swarm.is_full = True
        speech.put(act.StoreBlob(data=b"blob", tag="tag_1"))
        speech.put(REPORT)
        await until(lambda: bool(swarm.said))

    swarm, results, lost = saying(test)
    assert [words for words, _ in swarm.said] == ["report to our kind"]
    assert results == ["tag_1"]
    assert lost == ["a message to the peers was lost: no room"]
