"""Single tensors of a model in training go from peer to peer over real endpoints, and what that costs is bounded."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typing_extensions import override

from distro_optim.comm.iroh.endpoint import Node
from distro_optim.comm.iroh.sharing import live
from distro_optim.comm.iroh.sharing.exchange import SharedModels
from distro_optim.comm.iroh.sharing.live import DigestsRequest, LiveSharing, TensorRequest
from distro_optim.comm.iroh.sharing.transfer import ModelSharing
from distro_optim.comm.iroh.swarm import IrohSwarm
from distro_optim.comm.live_weights import LiveWeights, WantedTensors
from distro_optim.errors import ExchangeError, NotSharedError, ProtocolError
from distro_optim.strategy.rounds.weights import tensor_digest
from distro_optim.verify.merkle import merkle_root

pytestmark = pytest.mark.waiting

SECONDS = 30.0
TOPIC = bytes(32)
STEP = 7
RIGHT = {f"layers.{number}.weight": torch.arange(12.0).view(3, 4).to(torch.bfloat16) + number for number in range(6)}
NAMES = tuple(RIGHT)
DIGESTS = [tensor_digest(name, tensor) for name, tensor in RIGHT.items()]
MakeNode = Callable[..., Node]


class Weights(LiveWeights):
    def __init__(self) -> None:
        self.step = STEP
        self.copied: list[str] = []

    @override
    def digests(self, step: int) -> Sequence[bytes] | None:
        return DIGESTS if step == self.step else None

    @override
    def tensor(self, step: int, name: str) -> torch.Tensor | None:
        if step != self.step or name not in RIGHT:
            return None
        self.copied.append(name)
        return RIGHT[name].clone()


def wanted(wrong: Sequence[str], **changes: object) -> WantedTensors:
    settings: dict[str, object] = {
        "step": STEP,
        "root": merkle_root(DIGESTS),
        "names": NAMES,
        "digests": tuple(bytes(32) if name in wrong else digest for name, digest in zip(NAMES, DIGESTS, strict=True)),
        "max_bytes": dict.fromkeys(NAMES, 1 << 16),
        "max_wrong": 3,
        "digest_of": tensor_digest,
        "root_of": merkle_root,
    }
    return WantedTensors(**settings | changes)  # type: ignore[arg-type]


class Side:
    """A node with a swarm."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.swarm = IrohSwarm(node, TOPIC)
        self.live = LiveSharing(node, self.swarm)
        self.models = SharedModels(ModelSharing(node, self.swarm.publish), self.swarm, self.live)


def run(make_node: MakeNode, scenario: Callable[[Side, Side, Weights], Awaitable[None]]) -> None:
    ours, theirs = make_node(), make_node()

    async def body() -> None:
        asker, giver = Side(ours), Side(theirs)
        weights = Weights()
        giver.models.offer_live(weights)
        try:
            await scenario(asker, giver, weights)
        finally:
            await asker.swarm.aclose()
            await giver.swarm.aclose()

    ours.submit(body()).result(SECONDS)


def test_the_tensor_that_differs_comes_as_it_is_and_no_other(make_node: MakeNode) -> None:
    async def scenario(asker: Side, giver: Side, weights: Weights) -> None:
        fetched = await asker.models.download_tensors([giver.node.endpoint_id], wanted([NAMES[2]]))
        assert list(fetched.tensors) == [NAMES[2]]
        assert torch.equal(fetched.tensors[NAMES[2]], RIGHT[NAMES[2]])
        assert weights.copied == [NAMES[2]]
        # However many ask, it is copied once.
        await asker.models.download_tensors([giver.node.endpoint_id], wanted([NAMES[2]]))
        assert weights.copied == [NAMES[2]]

    run(make_node, scenario)


def test_a_peer_gives_nothing_of_another_step_and_no_more_than_half_of_one(make_node: MakeNode) -> None:
    async def scenario(asker: Side, giver: Side, weights: Weights) -> None:
        peer = giver.node.endpoint_id

        async def refused(question: Awaitable[object]) -> None:
            with pytest.raises(NotSharedError):
                await question

        await refused(asker.live.ask_digests(peer, STEP + 1, len(NAMES)))
        await refused(asker.live.ask_tensor(peer, wanted([], step=STEP - 1), NAMES[0]))
        await refused(asker.live.ask_tensor(peer, wanted([], max_bytes={"no such": 9}), "no such"))
        for name in NAMES[:2]:
            await asker.live.ask_tensor(peer, wanted([]), name)
        await refused(asker.live.ask_tensor(peer, wanted([]), NAMES[4]))
        assert weights.copied == [*NAMES[:2]]
        weights.step += 1
        await asker.live.ask_tensor(peer, wanted([], step=STEP + 1), NAMES[4])
        giver.models.offer_live(None)
        await refused(asker.live.ask_digests(peer, STEP + 1, len(NAMES)))

    run(make_node, scenario)


def test_a_peer_may_ask_about_few_steps(make_node: MakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "MAX_STEPS_PER_PEER", 2)

    async def scenario(asker: Side, giver: Side, weights: Weights) -> None:
        for step in (1, 2, 3):
            weights.step = step
            ask = asker.live.ask_digests(giver.node.endpoint_id, step, len(NAMES))
            if step < 3:
                assert await ask == DIGESTS
            else:
                with pytest.raises(NotSharedError):
                    await ask

    run(make_node, scenario)


def test_more_bytes_than_hashes_can_have_are_refused(make_node: MakeNode) -> None:
    async def scenario(asker: Side, giver: Side, weights: Weights) -> None:
        peer = giver.node.endpoint_id
        with pytest.raises((ExchangeError, ProtocolError)):
            await asker.live.ask_digests(peer, STEP, len(NAMES) - 1)
        with pytest.raises(ProtocolError, match="in place of 7 hashes"):
            await asker.live.ask_digests(peer, STEP, len(NAMES) + 1)
        with pytest.raises((ExchangeError, ProtocolError)):
            await asker.live.ask_tensor(peer, wanted([], max_bytes=dict.fromkeys(NAMES, 16)), NAMES[0])
        await asyncio.sleep(0)

    run(make_node, scenario)


def test_requests_come_back_as_they_were() -> None:
    for request in (DigestsRequest(2**32 - 1), TensorRequest(5, "a.b")):
        assert live.decode_live_request(live.encode_live_request(request)) == request
    assert live.encode_live_request(TensorRequest(300, "ab")) == bytes([1, 0xAC, 2, 2]) + b"ab"


@given(st.binary(max_size=40))
def test_arbitrary_bytes_are_a_request_or_a_protocol_error(data: bytes) -> None:
    try:
        live.decode_live_request(data)
    except ProtocolError:
        pass
