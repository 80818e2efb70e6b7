"""Clients that take part and say something else than is true, each in one way."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from blake3 import blake3
from typing_extensions import override

from ...comm import postcard
from ...comm.tickets import BlobTicket
from ...coordinator.types import WitnessBloom
from ...strategy.rounds import actions as act
from ...strategy.rounds.broadcasts import Broadcast, TrainingResult, WeightsReport
from ...verify.bloom import BLOOM_WORDS
from .peer import Peer

__all__ = ["LIARS"]


class Garbler(Peer):
    """Announces a result and gives other bytes, one bit of which differs from what it has committed to."""

    _given: bytes = b""

    @override
    def carry_out(self, action: act.Action) -> None:
        if isinstance(action, act.StoreBlob):
            action = replace(action, data=_one_bit_off(action.data))
            self._given = blake3(action.data).digest()
        elif isinstance(action, act.Announce):
            message: Broadcast = postcard.decode(Broadcast, action.data)
            if isinstance(message.data, TrainingResult):
                ticket = BlobTicket.raw(message.data.ticket.addr, self._given)
                message = replace(message, data=replace(message.data, ticket=ticket))
                action = act.Announce(postcard.encode(message))
        super().carry_out(action)


class Withholder(Peer):
    """Announces results, and gives them to nobody."""

    @override
    def offers(self, blob: bytes) -> bytes | None:
        return None


class WeightsLiar(Peer):
    """Says that its weights are others than they are."""

    @override
    def carry_out(self, action: act.Action) -> None:
        if isinstance(action, act.AnnounceWeights):
            report: WeightsReport = postcard.decode(WeightsReport, action.data)
            marks = bytes(len(report.marks))
            action = act.AnnounceWeights(postcard.encode(replace(report, root=bytes(32), marks=marks)))
        super().carry_out(action)


class PraisingWitness(Peer):
    """Reports to have seen everybody and everything."""

    @override
    def carry_out(self, action: act.Action) -> None:
        if isinstance(action, act.SendWitness):
            full = WitnessBloom(words=(2**64 - 1,) * BLOOM_WORDS)
            action = replace(action, witness=replace(action.witness, participant_bloom=full, broadcast_bloom=full))
        super().carry_out(action)


LIARS: Final[tuple[type[Peer], ...]] = (Garbler, Withholder, WeightsLiar, PraisingWitness)
"""By turns."""


def _one_bit_off(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])
