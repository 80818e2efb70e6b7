"""Every transport to a coordinator keeps the same promises."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from coordinator.coordinator_arenas import EmbeddedArena, HostedArena, IrohArena, MemoryArena, ServedArena, TcpArena
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
