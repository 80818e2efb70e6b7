"""Every transport to a coordinator keeps the same promises."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from coordinator.coordinator_arenas import EmbeddedArena, HostedArena, IrohArena, MemoryArena, ServedArena, TcpArena
from distro_optim.testing import coordinator as promises
from distro_optim.testing.coordinator import CHECKS, Arena

pytestmark = pytest.mark.waiting


@pytest.mark.parametrize("arena", [EmbeddedArena, HostedArena, MemoryArena, TcpArena, IrohArena])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_client_keeps_its_promises(
    arena: type[EmbeddedArena | ServedArena], check: Callable[[Arena], Awaitable[None]]
) -> None:
    async def run() -> None:
        async with arena() as instance:
            await check(instance)

    asyncio.run(run())


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_check_waits_for_nothing_that_passes(
    check: Callable[[Arena], Awaitable[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the server has ticked twice before a check looks, as it has on a machine that is busy."""

    async def run() -> None:
        async with MemoryArena() as arena:
            look = promises.until_true

            async def look_late(condition: Callable[[], bool]) -> None:
                for _ in range(2):
                    await arena.advance(0)
                await look(condition)

            monkeypatch.setattr(promises, "until_true", look_late)
            await check(arena)

    asyncio.run(run())
