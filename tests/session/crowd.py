"""Peers that share a model, some of whom lie: what is asked of whom, as over a network, but without one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from distro_optim.comm.iroh.sharing.search import MAX_USELESS
from distro_optim.comm.model_exchange import Check, SharedModel
from distro_optim.errors import ExchangeError, ProtocolError

__all__ = ["Crowd", "peers"]

ROUNDS = 20
"""How often all are asked again, as in a warm-up."""


def peers(count: int, first: int = 1) -> list[bytes]:
    """Keys."""
    return [bytes([number]) * 32 for number in range(first, first + count)]


class Crowd:
    """Asks all peers, as :func:`~distro_optim.comm.iroh.sharing.search.find_sharers` does, and then takes each tensor
    from another of those that describe the same model.

    Attributes:
        models: what each peer shares.
        late: peers that share it only when they are asked for the so-manieth time.
    """

    def __init__(self, models: Mapping[bytes, SharedModel] | None = None) -> None:
        self.models = dict(models or {})
        self.late: dict[bytes, int] = {}

    def offer_model(self, model: SharedModel) -> None:
        self.last = model

    def download_model(self, providers: Iterable[bytes], *, check: Check | None = None, **settings: Any) -> SharedModel:
        asked, useless = list(providers), Counter[bytes]()
        reason = "nobody has anything"
        for turn in range(ROUNDS):
            fitting = []
            for peer in asked:
                if peer not in self.models or turn < self.late.get(peer, 0) or useless[peer] >= MAX_USELESS:
                    continue
                model = self.models[peer]
                try:
                    if check is not None:
                        check(peer, model.config, list(model.parameters))
                    fitting.append(model)
                except ProtocolError as error:
                    useless[peer] += 1
                    reason = str(error)
            same = [model for model in fitting if model.config == fitting[0].config]
            if same:
                names = list(same[0].parameters)
                parts = {name: same[number % len(same)].parameters[name] for number, name in enumerate(names)}
                return SharedModel(same[0].config, same[0].tokenizer, parts)
        raise ExchangeError(f"no peer shares the model: {reason}")
