"""Models shared within one process: the double of :class:`~distro_optim.comm.model_exchange.SharedModels`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from typing_extensions import override

from ..comm.iroh.sharing.search import find_sharers
from ..comm.model_exchange import Check, ModelExchange, Patience, SharedModel
from ..errors import NotSharedError

__all__ = ["MemoryModels"]


@dataclass(frozen=True, eq=False)
class _Offer:
    """What one peer offers. Offers of two peers are never compared by value."""

    model: SharedModel


class MemoryModels(ModelExchange):
    """One peer's side.

    Args:
        me: public key.
        room: what every peer offers at the moment, by public key; one dictionary for all of them.
    """

    def __init__(self, me: bytes, room: dict[bytes, SharedModel]) -> None:
        self._me = me
        self._room = room

    @override
    def offer(self, model: SharedModel) -> None:
        self._room[self._me] = model

    @override
    def withdraw(self) -> None:
        self._room.pop(self._me, None)

    @override
    async def download(
        self,
        providers: Iterable[bytes],
        *,
        max_parameter_bytes: int,
        check: Check | None = None,
        progress: Callable[[int, int], None] | None = None,
        patience: Patience = Patience.ONCE,
        seconds: float = 0.0,
    ) -> SharedModel:
        async def ask(peer: bytes) -> _Offer:
            await asyncio.sleep(0)
            model = self._room.get(peer) if peer != self._me else None
            if model is None:
                raise NotSharedError("it has nothing to share", reason="ParametersNotInitialized")
            if check is not None:
                check(peer, model.config, list(model.parameters))
            return _Offer(model)

        model = (await find_sharers(ask, providers, patience=patience, seconds=seconds)).answer.model
        if progress is not None:
            progress(len(model.parameters), len(model.parameters))
        return model
