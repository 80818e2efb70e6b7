"""Members that take part like everybody else, but announce something other than what they trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from blake3 import blake3
from typing_extensions import override

from distro_optim.comm import postcard
from distro_optim.comm.addresses import EndpointAddr
from distro_optim.comm.tickets import BlobTicket
from distro_optim.compress import CompressedUpdate, ParamSpec, make_plan
from distro_optim.coordinator.types import BatchId, WitnessBloom
from distro_optim.strategy.rounds import actions as act
from distro_optim.strategy.rounds.broadcasts import Broadcast, TrainingResult, WeightsReport
from distro_optim.strategy.rounds.results import encode_result
from distro_optim.testing.updates import random_update
from distro_optim.verify.bloom import BLOOM_WORDS
from distro_optim.verify.commitment import Commitment
from rounds.simulator import CPU, PLAN, Member, World

ONCE_ALL_HAVE_COME = 0.3

Lie = Callable[["Liar", Broadcast, bytes], list[tuple[Broadcast, bytes | None]]]


class Liar(Member):
    """Every announcement of a result goes through ``lie``, which gives announcements and blobs in its place."""

    def __init__(self, world: World, number: int, lie: Lie) -> None:
        self.lie = lie
        self.honest_blobs: dict[bytes, bytes] = {}
        self.lies = 0
        self.splits = False  # whether each half of the others is told something else
        super().__init__(world, number)

    @override
    def carry_out(self, action: act.Action) -> None:
        match action:
            case act.StoreBlob(data=data):
                self.honest_blobs[blake3(data).digest()] = data
            case act.Announce(data):
                broadcast = postcard.decode(Broadcast, data)
                if not isinstance(broadcast.data, TrainingResult):
                    super().carry_out(action)
                    return
                self.lies += 1
                for number, (told, blob) in enumerate(
                    self.lie(self, broadcast, self.honest_blobs[broadcast.data.ticket.hash])
                ):
                    if blob is not None:
                        self.blobs[blake3(blob).digest()] = blob
                    self.tell_peers(number, postcard.encode(told))
            case _:
                super().carry_out(action)

    def tell_peers(self, number: int, data: bytes) -> None:
        """Announces the result of that number."""
        to = self.world.members[number::2] if self.splits else None
        self.world.gossip(self, data, weights=False, to=to)

    def announce(self, like: Broadcast, blob: bytes, data_hash: bytes, batch: BatchId | None = None) -> Broadcast:
        """An announcement of ``blob``, properly signed."""
        assert isinstance(like.data, TrainingResult)
        ticket = BlobTicket.raw(EndpointAddr(self.key.public), blake3(blob).digest())
        commitment = Commitment(data_hash, self.key.sign(data_hash))
        return replace(like, commitment=commitment, data=TrainingResult(batch or like.data.batch_id, ticket))

    def result(self, like: Broadcast, update: CompressedUpdate, nonce: int = 0) -> tuple[Broadcast, bytes]:
        """An announcement of ``update`` with a blob that keeps its commitment."""
        assert isinstance(like.data, TrainingResult)
        blob, data_hash = encode_result(update, step=like.step, trainer_nonce=nonce, batch=like.data.batch_id)
        return self.announce(like, blob, data_hash), blob


class LyingWitness(Member):
    """Reports to have seen everybody and everything."""

    @override
    def carry_out(self, action: act.Action) -> None:
        if isinstance(action, act.SendWitness):
            full = WitnessBloom(words=(2**64 - 1,) * BLOOM_WORDS)
            action = replace(action, witness=replace(action.witness, participant_bloom=full, broadcast_bloom=full))
        super().carry_out(action)


class LyingReporter(Member):
    """Says that its weights are others."""

    @override
    def carry_out(self, action: act.Action) -> None:
        if isinstance(action, act.AnnounceWeights):
            report = postcard.decode(WeightsReport, action.data)
            action = act.AnnounceWeights(postcard.encode(replace(report, root=bytes(32), marks=bytes(12))))
        super().carry_out(action)


def plan_of(*shapes: tuple[int, ...], k: int = 2) -> object:
    return make_plan([ParamSpec(shape, torch.float32, CPU, 0, 4, k) for shape in shapes], "divisor")


def update_on(*shapes: tuple[int, ...], k: int = 2, quantized: bool = True) -> CompressedUpdate:
    return random_update(plan_of(*shapes, k=k), quantized=quantized, seed=5)  # type: ignore[arg-type]


def another_blob_than_committed(liar: Liar, told: Broadcast, blob: bytes) -> list[tuple[Broadcast, bytes | None]]:
    other = blob[:-12] + bytes([blob[-12] ^ 1]) + blob[-11:]
    return [(liar.announce(told, other, told.commitment.data_hash), other)]


def garbage(liar: Liar, told: Broadcast, blob: bytes) -> list[tuple[Broadcast, bytes | None]]:
    return [(liar.announce(told, b"\xff" * 90, told.commitment.data_hash), b"\xff" * 90)]


def another_shape(liar: Liar, told: Broadcast, blob: bytes) -> list[tuple[Broadcast, bytes | None]]:
    return [liar.result(told, update_on((8,), (8, 8)))]


def too_few_tensors(liar: Liar, told: Broadcast, blob: bytes) -> list[tuple[Broadcast, bytes | None]]:
    return [liar.result(told, update_on((8,)))]


def more_coefficients(liar: Liar, told: Broadcast, blob: bytes) -> list[tuple[Broadcast, bytes | None]]:
    return [liar.result(told, update_on((8,), (4, 8), k=4))]


def not_a_number(liar: Liar, told: Broadcast, blob: bytes) -> list[tuple[Broadcast, bytes | None]]:
    update = update_on((8,), (4, 8), quantized=False)
    update.value[0][0, 0] = float("nan")
    return [liar.result(told, update)]


def an_index_twice(liar: Liar, told: Broadcast, blob: bytes) -> list[tuple[Broadcast, bytes | None]]:
    update = update_on((8,), (4, 8))
    update.index[0][:] = 1
    return [liar.result(told, update)]


def nothing_to_fetch(liar: Liar, told: Broadcast, blob: bytes) -> list[tuple[Broadcast, bytes | None]]:
    return [(told, None)]


def far_too_large(liar: Liar, told: Broadcast, blob: bytes) -> list[tuple[Broadcast, bytes | None]]:
    huge = blob + bytes(1 << 20)
    return [(liar.announce(told, huge, told.commitment.data_hash), huge)]


def the_result_of_an_earlier_round(liar: Liar, told: Broadcast, blob: bytes) -> list[tuple[Broadcast, bytes | None]]:
    """The first thing it ever trained, announced again for each round."""
    first = next(iter(liar.honest_blobs.values()))
    if first is blob:
        return [(told, blob)]
    return [(liar.announce(told, first, told.commitment.data_hash), first)]


def two_results(liar: Liar, told: Broadcast, blob: bytes) -> list[tuple[Broadcast, bytes | None]]:
    return [(told, blob), liar.result(told, update_on((8,), (4, 8)))]


def many_results(liar: Liar, told: Broadcast, blob: bytes) -> list[tuple[Broadcast, bytes | None]]:
    updates = [update_on((8,), (4, 8), quantized=True)] * 20
    return [(told, blob), *(liar.result(told, update, nonce) for nonce, update in enumerate(updates))]


def different_results(count: int) -> Lie:
    """The true one, and so many others."""

    def lie(liar: Liar, told: Broadcast, blob: bytes) -> list[tuple[Broadcast, bytes | None]]:
        seeds = range(told.step * count, (told.step + 1) * count)
        return [(told, blob), *(liar.result(told, random_update(PLAN, quantized=True, seed=seed)) for seed in seeds)]

    return lie


class OneToMostAndFiveToOne(Liar):
    """Announces one result to everybody but its first peer, to whom it announces four others before it."""

    def __init__(self, world: World, number: int) -> None:
        super().__init__(world, number, different_results(4))

    @override
    def tell_peers(self, number: int, data: bytes) -> None:
        first, *rest = (member for member in self.world.members if member is not self)
        if number > 0:
            self.world.gossip(self, data, weights=False, to=[first])
        else:
            self.world.gossip(self, data, weights=False, to=rest)
            self.world.later(ONCE_ALL_HAVE_COME, lambda: self.world.gossip(self, data, weights=False, to=[first]))


def one_commitment_for_two_blobs(liar: Liar, told: Broadcast, blob: bytes) -> list[tuple[Broadcast, bytes | None]]:
    """The nonce is not part of the commitment, so two blobs can keep one."""
    update = update_on((8,), (4, 8))
    return [liar.result(told, update, nonce) for nonce in (0, 1000)]
