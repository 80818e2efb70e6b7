"""Models shared within one process: the double of :class:`~distro_optim.comm.models.SharedModels`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from ..comm.iroh.sharing import Check, SharedModel
from ..comm.models import ModelExchange
from ..errors import NotSharedError

__all__ = ["MemoryModels"]


class MemoryModels(ModelExchange):
    """One peer's side.

    Args:
        me: public key.
        room: what every peer offers at the moment, by public key; one dictionary for all of them.
    """

    def __init__(self, me: bytes, room: dict[bytes, SharedModel]) -> None:
        self._me = me
        self._room = room

    def offer(self, model: SharedModel) -> None:
        self._room[self._me] = model

    def withdraw(self) -> None:
        self._room.pop(self._me, None)

    async def download(
        self,
        providers: Iterable[bytes],
        *,
        max_parameter_bytes: int,
        check: Check | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> SharedModel:
        await asyncio.sleep(0)
        for peer in providers:
            if peer != self._me and peer in self._room:
                model = self._room[peer]
                if check is not None:
                    check(model.config, list(model.parameters))
                if progress is not None:
                    progress(len(model.parameters), len(model.parameters))
                return model
        raise NotSharedError("no peer has anything to share", reason="ParametersNotInitialized")
