"""Each peer has a share of questions about the model, counted before they are read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from distro_optim.comm.iroh.endpoint import Node
from distro_optim.comm.iroh.sharing import asking, messages, requests
from distro_optim.comm.iroh.sharing.asking import FREE, MAX_PEERS, REFILL_SECONDS, TIMES, AskBudget
from distro_optim.comm.iroh.sharing.transfer import ModelSharing, download_model
from distro_optim.errors import ExchangeError
from transport.test_model_sharing import MODEL, Blobs, same

MakeNode = Callable[..., Node]
SECONDS = 20.0
ALICE, BOB = b"a" * 32, b"b" * 32


def asked(budget: AskBudget, peer: bytes, now: float) -> int:
    """How often it may ask at this time."""
    count = 0
    while budget.take(peer, now):
        count += 1
    return count


def test_a_peer_may_ask_for_each_part_several_times_and_then_waits() -> None:
    budget = AskBudget(parts=1_000)
    share = FREE + TIMES * 1_001
    assert asked(budget, ALICE, 5.0) == share
    assert asked(budget, BOB, 5.0) == share
    assert asked(budget, ALICE, 5.0 + REFILL_SECONDS / 2) == share // 2
    assert asked(budget, ALICE, 5.0 + 3 * REFILL_SECONDS) == share


def test_who_waits_for_a_model_may_ask_each_second_and_for_all_of_it_when_it_comes() -> None:
    budget = AskBudget()
    assert all(budget.take(ALICE, now) for now in range(10_000))
    assert asked(budget, ALICE, 10_000) > 0
    budget.resize(1_000)
    assert asked(budget, ALICE, 10_000) == TIMES * 1_000
    budget.resize(1_000)  # the same again gives nothing
    assert asked(budget, ALICE, 10_000) == 0


def test_no_more_peers_are_remembered_than_there_can_be() -> None:
    budget = AskBudget()
    for number in range(2 * MAX_PEERS):
        budget.take(number.to_bytes(32, "little"), 0.0)
    assert len(budget._left) == MAX_PEERS


@pytest.mark.waiting
def test_questions_beyond_the_share_are_not_read_and_others_get_the_model(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "FREE", 0)
    monkeypatch.setattr(asking, "TIMES", 1)
    monkeypatch.setattr(asking, "SLOWEST", 0.0)
    monkeypatch.setattr(asking, "REFILL_SECONDS", 1e9)
    read: list[bytes] = []
    decode = messages.decode_request

    def counted(data: bytes) -> object:
        read.append(data)
        return decode(data)

    monkeypatch.setattr("distro_optim.comm.iroh.sharing.transfer.decode_request", counted)
    blobs = Blobs()
    greedy, honest, giver = make_node(), make_node(), make_node()
    ModelSharing(giver, blobs.publisher(giver)).offer(MODEL)
    share = len(MODEL.parameters) + 1

    async def ask_without_end() -> int:
        sharing, answered = ModelSharing(greedy, blobs.publisher(greedy)), 0
        for _ in range(share + 5):
            try:
                await sharing.request_config(giver.endpoint_id)
                answered += 1
            except ExchangeError:
                pass
        return answered

    async def download() -> None:
        sharing = ModelSharing(honest, blobs.publisher(honest))
        assert same(await download_model(sharing, [giver.endpoint_id], blobs.fetch, max_parameter_bytes=1 << 20), MODEL)

    assert greedy.submit(ask_without_end()).result(SECONDS) == share
    assert len(read) == share
    honest.submit(download()).result(SECONDS)
    assert len(read) == 2 * share


def test_a_question_is_counted_before_anything_of_it_is_awaited() -> None:
    class Connection:
        remote_id = ALICE

        async def accept_bi(self, *, timeout: float) -> None:
            raise AssertionError("it was read")

    budget = AskBudget()
    asked(budget, ALICE, 1e12)

    async def answer(data: bytes) -> None:
        raise AssertionError("it was answered")

    with pytest.raises(ExchangeError, match="asked too often"):
        asyncio.run(requests.answer_request(Connection(), budget, answer))  # type: ignore[arg-type]
