"""Several nodes, of which one asks for a pause or is behind: another is asked, or it is said in one sentence."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import pytest
from solders.system_program import TransferParams, transfer

from distro_optim.comm.backoff import BackoffPolicy
from distro_optim.coordinator.solana.fees import FeeMeter
from distro_optim.coordinator.solana.rpc import NodesBehindError, RpcClient
from distro_optim.coordinator.solana.sending import Sender, TransactionExpiredError
from distro_optim.errors import CoordinatorLinkError
from distro_optim.testing import Validator
from distro_optim.testing.coordinator import training, until_true
from distro_optim.testing.solana.server import ValidatorServer
from distro_optim.testing.solana.validator import BLOCKHASHES
from solana.solana_arena import SOL, SolanaArena, in_arena, wallet

pytestmark = pytest.mark.waiting

KEYS = wallet(5)
KEY = KEYS.pubkey()


class World:
    """Nodes of one cluster, and a clock that sleeping moves."""

    def __init__(self, nodes: list[ValidatorServer]) -> None:
        self.nodes = nodes
        self.now = 1000.0
        self.slept: list[float] = []
        self.rpc = RpcClient(
            [node.url for node in nodes],
            retrying=BackoffPolicy(first=0.5, jitter=0.0),
            clock=lambda: self.now,
            sleep=self._sleep,
        )

    @property
    def validator(self) -> Validator:
        return self.nodes[0].validator

    def asked(self, method: str) -> list[int]:
        """How often each node was."""
        return [node.requests.get(method, 0) for node in self.nodes]

    async def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def with_nodes(count: int, check: Callable[[World], Awaitable[None]]) -> None:
    async def run() -> None:
        validator = Validator()
        validator.fund(KEY, SOL)
        async with AsyncExitStack() as stack:
            nodes = [await stack.enter_async_context(ValidatorServer(validator)) for _ in range(count)]
            world = World(nodes)
            stack.push_async_callback(world.rpc.close)
            await check(world)

    asyncio.run(run())


# -- 429 ---------------------------------------------------------------------------------------------------------------


def test_another_node_is_asked_while_one_wants_a_pause() -> None:
    async def check(world: World) -> None:
        world.nodes[0].faults.too_many_requests, world.nodes[0].faults.retry_after = 1, 60
        for _ in range(3):
            assert await world.rpc.balance(KEY) == SOL
        assert world.asked("getBalance") == [0, 3]
        assert world.slept == []
        world.now += 60
        assert await world.rpc.balance(KEY) == SOL
        assert world.asked("getBalance") == [1, 3]

    with_nodes(2, check)


def test_a_pause_that_all_nodes_want_is_kept() -> None:
    async def check(world: World) -> None:
        for node, seconds in zip(world.nodes, (60, 20), strict=True):
            node.faults.too_many_requests, node.faults.retry_after = 1, seconds
        with pytest.raises(CoordinatorLinkError, match=r"asked too often.*; .*asked too often"):
            await world.rpc.balance(KEY)
        assert await world.rpc.balance(KEY) == SOL
        assert world.slept == [20]  # the one that is free first
        assert world.asked("getBalance") == [0, 1]

    with_nodes(2, check)


def test_the_only_node_is_waited_for() -> None:
    async def check(world: World) -> None:
        world.nodes[0].faults.too_many_requests, world.nodes[0].faults.retry_after = 2, 90
        assert await world.rpc.balance(KEY) == SOL
        assert world.slept == [90, 90]

    with_nodes(1, check)


def test_a_node_that_wants_a_very_long_pause_is_left_alone_for_that_long() -> None:
    async def check(world: World) -> None:
        world.nodes[0].faults.too_many_requests, world.nodes[0].faults.retry_after = 1, 3600
        for _ in range(2):
            with pytest.raises(CoordinatorLinkError) as caught:
                await world.rpc.balance(KEY)
            assert str(caught.value).endswith("it asks to be left alone for 3600 s")
            assert "\n" not in str(caught.value)
        assert world.nodes[0].faults.happened == ["429"]  # the second time it was not even asked
        assert world.slept == []
        world.now += 3600
        assert await world.rpc.balance(KEY) == SOL

    with_nodes(1, check)


# -- behind ------------------------------------------------------------------------------------------------------------


def test_a_node_that_is_behind_is_passed_over() -> None:
    async def check(world: World) -> None:
        world.nodes[0].lag()
        world.validator.advance(10)
        slot = world.validator.clock.slot
        assert (await world.rpc.account(KEY)).slot < slot
        assert (await world.rpc.account(KEY, min_slot=slot)).slot == slot
        assert world.asked("getAccountInfo") == [2, 1]

    with_nodes(2, check)


def test_what_is_old_is_better_than_nothing() -> None:
    async def check(world: World) -> None:
        for node in world.nodes:
            node.lag()
        world.validator.advance(10)
        assert (await world.rpc.account(KEY, min_slot=world.validator.clock.slot)).lamports == SOL
        options = {"minContextSlot": world.validator.clock.slot}
        with pytest.raises(NodesBehindError, match="it is behind the others"):
            await world.rpc.call("isBlockhashValid", [str(world.validator.blockhash), options])

    with_nodes(2, check)


def test_a_transaction_that_only_one_node_has_seen_is_found_there() -> None:
    """The first node knows neither the transaction nor that its blockhash is still good."""

    async def check(world: World) -> None:
        slow = world.nodes[0]
        slow.methods.unconfirmed_polls = 10**6
        fees = FeeMeter()
        sender = Sender(world.rpc, KEYS, fees, poll_seconds=0.001, clock=lambda: world.now)
        pay = transfer(TransferParams(from_pubkey=KEY, to_pubkey=wallet(6).pubkey(), lamports=SOL // 10))
        await sender.send([pay])
        assert fees.transactions == 1
        # Once the blockhash is over, every node is asked before the transaction is given up.
        send = world.rpc.call

        async def late(method: str, *given: object, **more: object) -> object:
            found = await send(method, *given, **more)  # type: ignore[arg-type]
            if method == "sendTransaction":
                world.validator.advance_blocks(BLOCKHASHES)
            return found

        world.rpc.call = late  # type: ignore[method-assign]
        await sender.send([pay])
        assert fees.transactions == 2
        world.nodes[1].methods.unconfirmed_polls = 10**6
        with pytest.raises(TransactionExpiredError, match="not taken within the minute"):
            await sender.send([pay])
        assert fees.transactions == 2

    with_nodes(2, check)


def test_a_run_goes_on_though_the_first_node_stands_still() -> None:
    """Its sockets are silent and its answers old; the second node has it all."""

    async def check(arena: SolanaArena) -> None:
        async with ValidatorServer(arena.validator) as second:
            arena.more_nodes = (second,)
            arena.poll_seconds = 0.05
            for number in range(3):
                arena.validator.fund(wallet(number + 1).pubkey(), SOL)
            arena.server.lag()
            arena.server.faults.silent = True
            arena.validator.advance(1)
            second.faults.silent = True
            followers = await training(arena)
            assert len({follower.latest.current_round.height for follower in followers}) == 1
            await until_true(lambda: all(f.client.state == arena.state for f in followers))
            assert second.requests["getAccountInfo"] > 0
            for client in arena.clients:
                await client.close()

    in_arena(check)


def test_an_answer_is_signed_and_sent_once_however_often_it_is_asked_for() -> None:
    """The same bytes at both nodes: the cluster takes them once."""

    async def check(world: World) -> None:
        world.nodes[0].faults.lost_answers = 4
        world.nodes[0].faults.lost_methods = frozenset({"sendTransaction"})
        sender = Sender(world.rpc, KEYS, FeeMeter(), poll_seconds=0.001, clock=lambda: world.now)
        pay = transfer(TransferParams(from_pubkey=KEY, to_pubkey=wallet(6).pubkey(), lamports=SOL // 10))
        await sender.send([pay])
        assert world.validator.balance(wallet(6).pubkey()) == SOL // 10
        assert world.asked("sendTransaction") == [4, 1]

    with_nodes(2, check)


def test_what_is_cut_short_on_its_way_counts_as_paid_and_what_was_refused_does_not() -> None:
    async def check(world: World) -> None:
        world.nodes[0].methods.unconfirmed_polls = 10**6
        fees = FeeMeter()
        sender = Sender(world.rpc, KEYS, fees, poll_seconds=0.001, clock=lambda: world.now)
        pay = transfer(TransferParams(from_pubkey=KEY, to_pubkey=wallet(6).pubkey(), lamports=SOL // 10))
        sending = asyncio.create_task(sender.send([pay]))
        await until_true(lambda: world.asked("getSignatureStatuses") != [0])
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        spent = SOL - world.validator.balance(KEY) - SOL // 10
        assert fees.spent == spent > 0
        much = transfer(TransferParams(from_pubkey=KEY, to_pubkey=wallet(6).pubkey(), lamports=2 * SOL))
        with pytest.raises(CoordinatorLinkError):
            await sender.send([much])
        assert (fees.spent, fees.transactions) == (spent, 1)

    with_nodes(1, check)
