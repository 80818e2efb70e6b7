"""A run on a validator of this process, for the contract of coordinator clients."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

from solders.instruction import Instruction
from solders.keypair import Keypair
from solders.pubkey import Pubkey
from typing_extensions import override

from distro_optim.comm.backoff import BackoffPolicy
from distro_optim.coordinator.formats.account import CoordinatorAccount
from distro_optim.coordinator.solana.client import SolanaCoordinator
from distro_optim.coordinator.solana.instructions import RunInstructions
from distro_optim.coordinator.solana.programs import Programs
from distro_optim.coordinator.types import Coordinator, RunState
from distro_optim.testing import Validator
from distro_optim.testing.coordinator import Arena, dummy_run, until_true
from distro_optim.testing.solana.server import ValidatorServer
from distro_optim.testing.solana.transactions import Transaction

SOL = 1_000_000_000
QUICK = BackoffPolicy(first=0.01, jitter=0.0)


def wallet(number: int) -> Keypair:
    return Keypair.from_seed(number.to_bytes(32, "little"))


OPERATOR, RUN, ANYBODY = wallet(1001), wallet(1002), wallet(1003)


class SolanaArena(Arena):
    can_leave = False
    hosts_one_run = False
    ticks = False

    def __init__(
        self, run: Coordinator | None = None, programs: Programs | None = None, mint: Pubkey | None = None
    ) -> None:
        self.run_id = (run or dummy_run()).run_id
        self.validator = Validator(programs, unix_timestamp=0)
        self.validator.host(
            run or dummy_run(),
            RUN.pubkey(),
            main_authority=OPERATOR.pubkey(),
            join_authority=OPERATOR.pubkey(),
            mint=mint,
        )
        self.instructions = RunInstructions(self.validator.programs, self.run_id, RUN.pubkey())
        for key in (OPERATOR, ANYBODY):
            self.validator.fund(key.pubkey(), SOL)
        self.server = ValidatorServer(self.validator)
        self.more_nodes: tuple[ValidatorServer, ...] = ()
        """Of the same cluster, asked after :attr:`server`."""
        self.poll_seconds = 10.0
        self.clients: list[SolanaCoordinator] = []

    async def __aenter__(self) -> SolanaArena:
        await self.server.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        for client in self.clients:
            await client.close()
        await self.server.__aexit__()

    @override
    def client(self, number: int, run_id: str | None = None) -> SolanaCoordinator:
        return self.participant(number, run_id=run_id or self.run_id, ticks=self.ticks)

    def participant(
        self,
        number: int,
        *,
        run_id: str | None = None,
        ticks: bool = False,
        lamports: int = SOL,
        max_fees: int | None = None,
        authorizer: Pubkey | None = None,
        claimer: Pubkey | None = None,
        poll_seconds: float | None = None,
        on_note: Callable[[str], None] | None = None,
        compute_unit_price: int = 0,
    ) -> SolanaCoordinator:
        keys = wallet(number + 1)
        missing = lamports - self.validator.balance(keys.pubkey())
        if missing > 0:
            self.validator.fund(keys.pubkey(), missing)
        client = SolanaCoordinator(
            [node.url for node in (self.server, *self.more_nodes)],
            [node.websocket_url for node in (self.server, *self.more_nodes)],
            keys,
            run_id or self.run_id,
            ticks=ticks,
            max_fees=max_fees,
            programs=self.validator.programs,
            authorizer=authorizer,
            claimer=claimer,
            on_note=on_note,
            compute_unit_price=compute_unit_price,
            poll_seconds=poll_seconds or self.poll_seconds,
            confirm_seconds=0.005,
            tick_seconds=0.01,
            retrying=QUICK,
            unix_time=lambda: self.validator.clock.unix_timestamp,
            generator=random.Random(number),
        )
        self.clients.append(client)
        return client

    @property
    def account(self) -> CoordinatorAccount:
        return self.validator.run(self.run_id)

    @property
    @override
    def state(self) -> Coordinator:
        return self.account.state.coordinator

    def process(self, *instructions: Instruction, payer: Keypair = ANYBODY) -> None:
        outcome = self.validator.process(Transaction(payer.pubkey(), instructions))
        assert outcome.error is None, outcome.logs

    def all_asked_again(self) -> bool:
        """Whether the clients that have joined before have joined the epoch that is being formed."""
        pending = self.account.state.clients_state.pending()
        return all(client.identity in pending for client in self.clients if client._joined and not client._closed)

    @override
    async def advance(self, seconds: int) -> None:
        if self.state.run_state is RunState.WAITING_FOR_MEMBERS:
            await until_true(self.all_asked_again)
        self.validator.advance(seconds)
        self.process(self.instructions.tick(ANYBODY.pubkey()))
        await asyncio.sleep(0)


def in_arena(check: Callable[[SolanaArena], Awaitable[None]], arena: SolanaArena | None = None) -> None:
    """Runs ``check`` against ``arena``, or one of its own."""

    async def run() -> None:
        async with arena or SolanaArena() as entered:
            await check(entered)

    asyncio.run(run())
