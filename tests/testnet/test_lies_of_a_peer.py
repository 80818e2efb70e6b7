"""What a lying peer announces looks like the truth, and no honest peer takes it."""

from __future__ import annotations

import asyncio

import pytest
import torch
from blake3 import blake3

from distro_optim.comm import postcard
from distro_optim.comm.addresses import EndpointAddr
from distro_optim.comm.signing import SecretKey, is_signed_by
from distro_optim.comm.swarm import Channel
from distro_optim.comm.tickets import BlobTicket
from distro_optim.compress import ParamSpec, make_plan
from distro_optim.coordinator.types import BatchId, Committee, CommitteeProof, MerkleRoot
from distro_optim.errors import ExchangeError, ProtocolError
from distro_optim.strategy.rounds.broadcasts import Broadcast, Finished, TrainingResult
from distro_optim.strategy.rounds.results import encode_result, max_result_size, read_result
from distro_optim.testing.swarm import MemoryNetwork, MemorySwarm
from distro_optim.testing.updates import random_update
from distro_optim.testnet.lies import LIES, Lie, LyingSwarm
from distro_optim.verify.commitment import Commitment, finished_hash

pytestmark = pytest.mark.waiting


CPU = torch.device("cpu")
PLAN = make_plan([ParamSpec(shape, torch.float32, CPU, 0, 4, 2) for shape in ((8,), (4, 8))], "divisor")
KEY = SecretKey(bytes(31) + b"\x01")
PROOF = CommitteeProof(Committee.TRAINER, 0, 0)
FIRST_STEP = 3


def batch_of(step: int) -> BatchId:
    return BatchId(8 * step, 8 * step + 7)


async def say_result(swarm: LyingSwarm | MemorySwarm, step: int) -> None:
    """Publishes and announces a result as an honest client does."""
    update = random_update(PLAN, quantized=True, seed=step)
    blob, data_hash = encode_result(update, step=step, trainer_nonce=step, batch=batch_of(step))
    await swarm.publish(blob, f"result_{step}")
    ticket = BlobTicket.raw(EndpointAddr(KEY.public), blake3(blob).digest())
    commitment = Commitment(data_hash, KEY.sign(data_hash))
    told = Broadcast(step, PROOF, commitment, 0, TrainingResult(batch_of(step), ticket))
    await swarm.announce(postcard.encode(told))


async def take(swarm: MemorySwarm, step: int) -> None:
    """Takes the next result as an honest client does; raises if it is not what it should be."""
    told = postcard.decode(Broadcast, (await anext(swarm.announcements())).data)
    assert isinstance(told.data, TrainingResult)
    assert (told.step, told.data.batch_id) == (step, batch_of(step))
    if not is_signed_by(KEY.public, told.commitment.data_hash, told.commitment.signature):
        raise ProtocolError("badly signed")
    blob = await swarm.fetch(told.data.ticket, max_size=max_result_size(PLAN))
    read_result(blob, step=step, batch=batch_of(step), data_hash=told.commitment.data_hash, plan=PLAN)


def pair(*lies: Lie) -> tuple[LyingSwarm, MemorySwarm]:
    network = MemoryNetwork(seed=1)
    return LyingSwarm(network.join(secret_key=KEY), KEY, lies), network.join()


def test_the_truth_is_taken() -> None:
    async def run() -> None:
        network = MemoryNetwork(seed=1)
        honest, other = network.join(secret_key=KEY), network.join()
        await say_result(honest, FIRST_STEP)
        await take(other, FIRST_STEP)

    asyncio.run(run())


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_no_lie_is_taken(lie: Lie) -> None:
    async def run() -> None:
        liar, other = pair(lie)
        await say_result(liar, FIRST_STEP)
        if lie.__name__ == "replayed":  # the first time it is the truth
            await take(other, FIRST_STEP)
            await say_result(liar, FIRST_STEP + 1)
        with pytest.raises((ProtocolError, ExchangeError)):
            await take(other, FIRST_STEP + (lie.__name__ == "replayed"))
        assert liar.told[lie.__name__]

    asyncio.run(run())


def test_lies_take_turns_and_what_is_kept_for_them_is_bounded() -> None:
    async def run() -> None:
        liar, _ = pair(*LIES.values())
        for step in range(10 * len(LIES)):
            await say_result(liar, step)
        assert set(liar.told) == set(LIES)
        assert min(liar.told.values()) >= 9
        assert len(liar._blobs) <= 4

    asyncio.run(run())


def test_all_but_results_passes_unchanged() -> None:
    async def run() -> None:
        liar, other = pair(*LIES.values())
        root = bytes(32)
        data_hash = finished_hash(root)
        told = Broadcast(5, PROOF, Commitment(data_hash, KEY.sign(data_hash)), 0, Finished(MerkleRoot(root), False))
        await liar.announce(postcard.encode(told))
        assert postcard.decode(Broadcast, (await anext(other.announcements())).data) == told
        await liar.announce(b"anything", channel=Channel.OWN_KIND)
        assert (await anext(other.announcements(Channel.OWN_KIND))).data == b"anything"
        assert not liar.told

    asyncio.run(run())
