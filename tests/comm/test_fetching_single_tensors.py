"""Tensors that differ are fetched one by one, from peers of whom some lie."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from typing_extensions import override

from distro_optim.comm.live_weights import FetchedTensors, TensorSource, WantedTensors, fetch_differing
from distro_optim.errors import ExchangeError, NotSharedError, ProtocolError
from distro_optim.strategy.rounds.weights import tensor_digest
from distro_optim.verify.merkle import merkle_root

NAMES = tuple("abcde")
RIGHT = {name: torch.arange(4.0) + number for number, name in enumerate(NAMES)}
A, B, C = (bytes([number]) * 32 for number in (1, 2, 3))
STEP = 7


def digests_of(tensors: dict[str, torch.Tensor]) -> list[bytes]:
    return [tensor_digest(name, tensor) for name, tensor in tensors.items()]


@dataclass
class Giver:
    tensors: dict[str, torch.Tensor] = field(default_factory=lambda: dict(RIGHT))
    says: Callable[[list[bytes]], list[bytes]] = lambda digests: digests
    gives: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
    error: Exception | None = None


class Givers(TensorSource):
    def __init__(self, givers: dict[bytes, Giver]) -> None:
        self.givers = givers
        self.asked: list[tuple[bytes, str]] = []

    @override
    async def ask_digests(self, peer: bytes, step: int, count: int) -> list[bytes]:
        assert (step, count) == (STEP, len(NAMES))
        self.asked.append((peer, ""))
        giver = self.givers[peer]
        if giver.error is not None:
            raise giver.error
        return giver.says(digests_of(giver.tensors))

    @override
    async def ask_tensor(self, peer: bytes, wanted: WantedTensors, name: str) -> tuple[torch.Tensor, bytes]:
        self.asked.append((peer, name))
        giver = self.givers[peer]
        if giver.error is not None:
            raise giver.error
        tensor = giver.gives(giver.tensors[name])
        return tensor, wanted.digest_of(name, tensor)


def wanted(wrong: Sequence[str] = ("b",), max_wrong: int = 2) -> WantedTensors:
    ours = {name: tensor + 1e-3 if name in wrong else tensor for name, tensor in RIGHT.items()}
    return WantedTensors(
        step=STEP,
        root=merkle_root(digests_of(RIGHT)),
        names=NAMES,
        digests=tuple(digests_of(ours)),
        max_bytes=dict.fromkeys(NAMES, 1 << 20),
        max_wrong=max_wrong,
        digest_of=tensor_digest,
        root_of=merkle_root,
    )


def fetch(givers: Givers, what: WantedTensors | None = None) -> FetchedTensors:
    return asyncio.run(fetch_differing(givers, list(givers.givers), what or wanted()))


def test_only_what_differs_is_asked_for() -> None:
    givers = Givers({A: Giver(), B: Giver()})
    fetched = fetch(givers, wanted("bd"))
    assert givers.asked == [(A, ""), (A, "b"), (A, "d")]
    assert list(fetched.tensors) == ["b", "d"]
    assert all(torch.equal(tensor, RIGHT[name]) for name, tensor in fetched.tensors.items())
    assert fetched.digests == tuple(digests_of(RIGHT))
    assert fetched.liars == ()


def test_a_liar_who_gives_a_wrong_tensor_is_noticed_by_its_hash_and_asked_no_more() -> None:
    givers = Givers({A: Giver(gives=lambda tensor: tensor * 9), B: Giver()})
    fetched = fetch(givers, wanted("bd"))
    assert givers.asked == [(A, ""), (A, "b"), (B, "b"), (B, "d")]
    assert all(torch.equal(tensor, RIGHT[name]) for name, tensor in fetched.tensors.items())
    assert fetched.liars == (A,)


@pytest.mark.parametrize(
    "gives",
    [lambda tensor: tensor.view(2, 2), lambda tensor: tensor.double(), lambda tensor: -tensor],
    ids=["shape", "dtype", "values"],
)
def test_a_hash_is_over_shape_and_type_as_well(gives: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with pytest.raises(ExchangeError, match="no peer gave b as it was at step 7"):
        fetch(Givers({A: Giver(gives=gives)}))


def test_hashes_of_another_root_are_of_no_use() -> None:
    other = {**RIGHT, "c": torch.zeros(4)}
    givers = Givers({A: Giver(tensors=other), B: Giver()})
    fetched = fetch(givers)
    assert givers.asked == [(A, ""), (B, ""), (B, "b")]
    assert fetched.liars == (A,)
    with pytest.raises(ExchangeError, match="gave hashes of another root"):
        fetch(Givers({A: Giver(tensors=other)}))


@pytest.mark.parametrize("error", [NotSharedError("gone on", reason="x"), ProtocolError("no hashes")])
def test_a_peer_that_cannot_give_is_passed_over_and_is_no_liar(error: Exception) -> None:
    fetched = fetch(Givers({A: Giver(error=error), B: Giver()}))
    assert list(fetched.tensors) == ["b"]
    assert fetched.liars == ()
    with pytest.raises(ExchangeError, match=str(error)):
        fetch(Givers({A: Giver(error=error)}))


def test_where_too_many_differ_nothing_is_fetched() -> None:
    givers = Givers({A: Giver()})
    with pytest.raises(ExchangeError, match="3 of 5 tensors differ: too many"):
        fetch(givers, wanted("abc"))
    assert givers.asked == [(A, "")]


def test_without_peers_there_is_nobody_to_ask() -> None:
    with pytest.raises(ExchangeError, match="there is no peer to ask"):
        fetch(Givers({}))
