"""A call of the iroh package under a time limit: answered at once, later, too late, with an error, or given up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from iroh import IrohError
from typing_extensions import override

from distro_optim.comm.iroh.stream_ends import call
from distro_optim.errors import ExchangeError, PeerTimeoutError

LONG, AT_ONCE = 60.0, 0.0


class Failure(IrohError):
    def __init__(self) -> None: ...

    @override
    def message(self) -> str:
        return "no such thing"


def within(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await scenario()

    asyncio.run(bounded())


@pytest.mark.parametrize("limit", [None, LONG, AT_ONCE])
def test_an_answer_that_is_there_at_once_needs_no_time(limit: float | None) -> None:
    async def answered() -> str:
        return "answer"

    async def scenario() -> None:
        assert await call(answered(), limit, "asking") == "answer"

    within(scenario)


def test_an_answer_that_is_there_at_once_sets_no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    async def answered() -> str:
        return "answer"

    async def scenario() -> None:
        timers: list[object] = []
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(loop, "call_at", lambda *given, **more: timers.append(given))
        assert await call(answered(), LONG, "asking") == "answer"
        assert not timers
        monkeypatch.undo()

    within(scenario)


@pytest.mark.parametrize("limit", [None, LONG])
def test_an_answer_after_several_waits_arrives(limit: float | None) -> None:
    async def later() -> list[int]:
        loop = asyncio.get_running_loop()
        answers = []
        for number in range(3):
            future: asyncio.Future[int] = loop.create_future()
            loop.call_soon(future.set_result, number)
            answers.append(await future)
            await asyncio.sleep(0)
        return answers

    async def scenario() -> None:
        assert await call(later(), limit, "asking") == [0, 1, 2]

    within(scenario)


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("limit", [None, LONG])
def test_an_error_of_the_package_becomes_ours(limit: float | None, waits: bool) -> None:
    async def failing() -> None:
        if waits:
            await asyncio.sleep(0)
        raise Failure

    async def scenario() -> None:
        with pytest.raises(ExchangeError, match="no such thing"):
            await call(failing(), limit, "asking")

    within(scenario)


def test_an_error_that_the_call_waits_for_is_its_own_to_answer() -> None:
    async def recovers() -> str:
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(future.set_exception, ValueError("first"))
        try:
            await future
        except ValueError:
            await asyncio.sleep(0)
            return "recovered"
        return "went on"

    async def scenario() -> None:
        assert await call(recovers(), LONG, "asking") == "recovered"

    within(scenario)


def test_what_takes_longer_is_cancelled_and_named() -> None:
    ends: list[str] = []

    async def never() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            ends.append("cancelled")
            raise

    async def scenario() -> None:
        with pytest.raises(PeerTimeoutError, match=r"asking took longer than 0\.0 s"):
            await call(never(), AT_ONCE, "asking")
        task = asyncio.create_task(call(never(), LONG, "asking"))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    within(scenario)
    assert ends == ["cancelled", "cancelled"]


def test_a_call_that_nobody_awaits_any_more_is_closed() -> None:
    ends: list[str] = []

    async def never() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ends.append("closed")

    async def scenario() -> None:
        work = call(never(), LONG, "asking")
        work.send(None)
        work.close()

    within(scenario)
    assert ends == ["closed"]
