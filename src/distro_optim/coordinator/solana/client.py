"""One participant of a run whose state is on chain.

A chain answers more than a server: a transaction is confirmed or refused. It also asks for more: who was in an epoch
joins again for the next, somebody has to say that time has passed, and everything costs a fee. All of that happens
here, so that :class:`SolanaCoordinator` keeps the promises of :class:`~..client.CoordinatorClient`; but for one: nobody
can leave a run on chain. Who closes stays in the epoch until its peers report it missing.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, Final

from solders.instruction import Instruction
from solders.keypair import Keypair
from solders.pubkey import Pubkey
from typing_extensions import override

from ...comm.backoff import BackoffPolicy
from ...comm.signing import SecretKey
from ...errors import (
    ConfigurationError,
    CoordinatorLinkError,
    JoinRefusedError,
    PaymentError,
    ProtocolError,
)
from ..client.interface import CoordinatorClient
from ..client.state_feed import StateFeed
from ..formats.account import CoordinatorAccount, read_account
from ..messages import (
    CheckpointMessage,
    ClientToServerMessage,
    HealthCheckMessage,
    Join,
    WarmupStep,
    WitnessMessage,
    WitnessStep,
)
from ..types import Coordinator, NodeIdentity, RunState, WitnessMetadata
from ..unconfirmed_report import UnconfirmedReport
from .decisions.checkpoint_format import OldProgramError, check_checkpoint_format
from .decisions.ticking import is_tick_due, should_tick
from .feed import POLL_SECONDS, AccountFeed
from .fees import FeeMeter, FeesSpentError, shown_sol
from .finding import (
    FoundRun,
    check_balance,
    check_room,
    check_version,
    cluster_time,
    find_authorization,
    find_deployment,
    find_run,
)
from .instructions import RunInstructions, check_claimer
from .programs import Programs
from .rpc import RETRYING, RpcClient, TransactionFailedError
from .sending import POLL_SECONDS as CONFIRM_SECONDS
from .sending import Sender, TransactionExpiredError
from .viewing import printable
from .wallet import derive_peer_secret

__all__ = ["SolanaCoordinator", "without_nan"]

_log = logging.getLogger(__name__)

TICK_SECONDS: Final = 0.5
"""Between two looks at whether a phase is over, as Psyche's client."""

CLOCK_SECONDS: Final = 60.0
"""Between two looks at the cluster's clock."""

TRIES: Final = 5
"""For one message, each with a blockhash of its own."""

OVERDUE_SECONDS: Final = 2.0
"""Between two readings of a state that is overdue."""

_NO_MONEY: Final = frozenset({"AccountNotFound", "InsufficientFundsForFee", "InsufficientFundsForRent"})

_EXPECTED: Final = frozenset(
    {"CoordinatorErrorDuplicateWitness", "CoordinatorErrorInvalidRunState", "CoordinatorErrorHalted"}
)
"""Refusals that belong to a run: a report that came a moment too late, or twice."""


class SolanaCoordinator(CoordinatorClient):
    """A wallet's place in a run on chain.

    Args:
        rpc: http addresses of nodes, in the order in which they are tried.
        websockets: ws addresses to subscribe at. Without any, states come only by reading.
        wallet: pays and signs.
        run_id: the run.
        peer_key: public key of our iroh endpoint; by default the one that Psyche derives from wallet and run.
        programs: the deployment; Psyche's own ids by default.
        authorizer: a key that was authorized and names this wallet as a delegate.
        claimer: which wallet is paid for the points, where accounts of runs have version 2; by default this one.
        join_authority: the key that must let wallets in, to be sure whose run it is.
        main_authority: the key that must operate the run, likewise; of a run whose points are paid its treasury's.
        client_version: which client the run must be for, in its own words; None takes any.
        max_fees: lamports that may be spent in all.
        compute_unit_price: offered to a busy cluster, in millionths of a lamport for each of 200,000 units.
        on_note: told what people should know, in a sentence; by default the log is.
        ticks: whether to tell the chain, when it is due, that time has passed. Somebody has to.
        check_format: look, before a checkpoint is sent, whether the program knows its present form.
        poll_seconds: between two readings of the account.
        confirm_seconds: between two questions for a transaction.
        tick_seconds: between two looks at whether a tick is due.
        retrying: pauses between two tries of a request.
        unix_time: our own clock, in seconds.
        generator: draws whose turn it is to tick.

    Raises:
        ConfigurationError: an argument is wrong.
    """

    def __init__(
        self,
        rpc: Sequence[str],
        websockets: Sequence[str],
        wallet: Keypair,
        run_id: str,
        *,
        peer_key: bytes | None = None,
        programs: Programs | None = None,
        authorizer: Pubkey | None = None,
        claimer: Pubkey | None = None,
        join_authority: Pubkey | None = None,
        main_authority: Pubkey | None = None,
        client_version: str | None = None,
        max_fees: int | None = None,
        compute_unit_price: int = 0,
        on_note: Callable[[str], None] | None = None,
        ticks: bool = True,
        check_format: bool = True,
        poll_seconds: float = POLL_SECONDS,
        confirm_seconds: float = CONFIRM_SECONDS,
        tick_seconds: float = TICK_SECONDS,
        retrying: BackoffPolicy = RETRYING,
        unix_time: Callable[[], float] = time.time,
        generator: random.Random | None = None,
    ) -> None:
        self.run_id = run_id
        self.programs = programs or Programs()
        self.programs.instance(run_id)  # says at once if no run can have this name
        peer = peer_key if peer_key is not None else SecretKey(derive_peer_secret(run_id, wallet)).public
        self.identity = NodeIdentity(bytes(wallet.pubkey()), peer)
        self.fees = FeeMeter(max_fees, compute_unit_price)
        self.account: CoordinatorAccount | None = None
        """The newest state of the account: points and rates are there as well."""
        self._rpc = RpcClient(rpc, retrying=retrying)
        self._websockets = tuple(websockets)
        self._wallet = wallet
        self._authorizer = authorizer
        check_claimer(self.programs, claimer)
        self._claimer = claimer
        self._join_authority = join_authority
        self._main_authority = main_authority
        self._client_version = client_version
        self._note = on_note or _log.warning
        self._ticks = ticks
        self._check_format = check_format
        self._poll_seconds, self._confirm_seconds, self._tick_seconds = poll_seconds, confirm_seconds, tick_seconds
        self._unix_time = unix_time
        self._clock_offset = 0.0
        self._generator = generator or random.Random()
        self._states = StateFeed()
        self._feed: AccountFeed | None = None
        self._sender: Sender | None = None
        self._instructions: RunInstructions | None = None
        self._authorization: Pubkey | None = None
        self._report = UnconfirmedReport()
        self._decode_due: asyncio.Handle | None = None
        self._joining: asyncio.Task[None] | None = None
        self._ticking: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._looked = False
        self._asked = False
        self._joined = False
        self._closed = False

    @property
    @override
    def state(self) -> Coordinator | None:
        return self._states.latest

    @property
    @override
    def connected(self) -> bool:
        feed = self._feed
        return feed is not None and (feed.reachable or feed.subscribed > 0)

    @override
    async def look(self) -> Coordinator:
        if self._looked or self._closed:
            raise ConfigurationError("look() is called once, before join() and close()")
        self._looked = True
        run = await self._find_run()
        self._join_authority, self._main_authority = run.join_authority, run.main_authority
        feed = AccountFeed(
            self._rpc,
            self._websockets,
            run.account,
            self._on_news,
            self._end,
            account_version=self.programs.account_version,
            poll_seconds=self._poll_seconds,
        )
        await feed.read()
        self._feed = feed
        state = self._decode()
        self._clock_offset = await cluster_time(self._rpc) - self._unix_time()
        self._sender = Sender(self._rpc, self._wallet, self.fees, poll_seconds=self._confirm_seconds)
        self._instructions = RunInstructions(self.programs, self.run_id, run.account)
        feed.start()
        self._spawn(self._watch_clock)
        return state

    async def _find_run(self) -> FoundRun:
        return await find_run(
            self._rpc,
            self.programs,
            self.run_id,
            join_authority=self._join_authority,
            main_authority=self._main_authority,
        )

    async def check_admission(self) -> None:
        """Finds what speaks against a join, after :meth:`look`. Reads only, and costs nothing.

        Raises:
            JoinRefusedError: the run is over, full, for another client, or does not want this wallet.
            CoordinatorLinkError: the wallet cannot pay, or the cluster does not answer.
        """
        run = await self._find_run()
        account = self._known()
        check_room(account, self.run_id, self.identity.signer)
        if self._client_version is not None and account.state.client_version != self._client_version:
            raise JoinRefusedError(
                f"the run {self.run_id!r} is for the client {printable(account.state.client_version)!r}, not "
                f"{self._client_version!r}: update, or leave the version out to try it all the same",
                wanted=self.run_id,
            )
        wallet = self._wallet.pubkey()
        self._tell_claimer(account)
        self._authorization = await find_authorization(self._rpc, self.programs, run, wallet, self._authorizer)
        await check_balance(self._rpc, wallet, self.fees)

    @override
    async def join(self) -> Coordinator:
        if self._asked or self._closed:
            raise ConfigurationError("join() is called once, before close()")
        if not self._looked:
            await self.look()
        self._states.skip()
        if self._states.error is not None:
            raise self._states.error
        await self.check_admission()
        self._asked = True
        if self._must_join():
            try:
                await self._send_join()
            except TransactionFailedError as error:
                raise JoinRefusedError(
                    f"the run {self.run_id!r} does not let us in: {error}", wanted=self.run_id
                ) from error
            await self._read()
        else:
            phase = self._known().state.coordinator.run_state
            if phase is RunState.PAUSED:
                self._note(f"the run {self.run_id} is paused; we join it as soon as it goes on")
            else:
                _log.info("the run %s is in %s; we join it for the next epoch", self.run_id, phase.name)
        self._joined = True
        self._join_if_needed()
        if self._ticks:
            self._spawn(self._tick_when_due)
        return self._known().state.coordinator

    @override
    def states(self) -> AsyncIterator[Coordinator]:
        return self._states.read()

    @override
    async def send(self, message: ClientToServerMessage) -> None:
        if not self._asked or self._closed or self._instructions is None:
            raise CoordinatorLinkError(
                f"no message can go to the run {self.run_id!r}: " + ("closed" if self._closed else "not joined")
            )
        if isinstance(message, Join):
            self._join_if_needed()
            return
        if isinstance(message, WitnessMessage) and self._states.latest is not None:
            self._report.sent(message, self._states.latest)
        for instruction in self._instructions_of(message, self._instructions):
            self._spawn(self._deliver, instruction, message)

    @override
    async def close(self) -> None:
        self._closed = True
        self._states.end()
        if self._decode_due is not None:
            self._decode_due.cancel()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        try:
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._feed is not None:
                await self._feed.close()
        finally:  # who is in a hurry, such as after a second Ctrl-C, leaves no connection behind either
            await self._rpc.close()

    # -- states --------------------------------------------------------------------------------------------------------

    def _on_news(self, data: bytes) -> None:
        """A newer copy has come. Of a burst only the newest is decoded, once the burst is over."""
        if self._decode_due is None and self._feed is not None and not self._closed:
            self._decode_due = asyncio.get_running_loop().call_soon(self._decode_quietly)

    def _decode_quietly(self) -> None:
        try:
            self._decode()
        except ProtocolError as error:
            self._end(error)

    def _decode(self) -> Coordinator:
        """Reads the newest copy, and does what its state asks for."""
        self._decode_due = None
        data = self._newest()
        try:
            account = read_account(data)
        except ProtocolError as error:
            raise ProtocolError(
                f"the account of the run {self.run_id!r} cannot be read ({error}): it is of another version of "
                "Psyche's program; look for a newer distro_optim"
            ) from error
        check_version(account, self.programs.account_version)
        before, self.account = self.account, account
        state = account.state.coordinator
        if state.run_id != self.run_id:
            raise ProtocolError(f"the account is that of the run {state.run_id!r}, not {self.run_id!r}")
        self._tell_changes(before, account)
        self._states.put(state)
        self._join_if_needed()
        return state

    def _newest(self) -> bytes:
        data = self._feed.newest.data if self._feed is not None else None
        if data is None:
            raise CoordinatorLinkError("the run has not been looked at yet")
        return data

    def _tell_changes(self, before: CoordinatorAccount | None, account: CoordinatorAccount) -> None:
        if before is None:
            return
        if before.state.client_version != account.state.client_version:
            self._note(
                f"the run {self.run_id} is now for the client {printable(account.state.client_version)}, before for "
                f"{printable(before.state.client_version)}"
            )
        was, now = before.state.coordinator.run_state, account.state.coordinator.run_state
        if self._asked and was is not now and now is RunState.WARMUP:
            self._spawn(self._check_funds)

    async def _read(self) -> None:
        """Reads the account, so that what was just confirmed is in the state."""
        if self._feed is not None:
            await self._feed.read()
            if self._decode_due is not None:
                self._decode_due.cancel()
                self._decode()

    def _known(self) -> CoordinatorAccount:
        if self.account is None:
            raise CoordinatorLinkError("the run has not been looked at yet")
        return self.account

    def _end(self, error: Exception) -> None:
        """There will be no state any more."""
        self._states.end(error)

    # -- joining -------------------------------------------------------------------------------------------------------

    def _must_join(self) -> bool:
        """Whether the run waits for members and does not count on us."""
        if self.account is None or not self._asked:
            return False
        state = self.account.state
        waits = state.coordinator.run_state is RunState.WAITING_FOR_MEMBERS
        return waits and self.identity not in state.clients_state.pending()

    def _tell_claimer(self, account: CoordinatorAccount) -> None:
        """Says so if the points go to another wallet than the one that was named; nobody can change that any more."""
        if not self.programs.has_claimers:
            return
        wanted = self.identity.signer if self._claimer is None else bytes(self._claimer)
        clients = account.state.clients_state.clients
        paid = next((client.claimer for client in clients if client.id == self.identity), wanted)
        if paid != wanted:
            self._note(
                f"the points of {self._wallet.pubkey()} in the run {self.run_id} are paid to "
                f"{Pubkey.from_bytes(paid)}, as when it first joined, not to {Pubkey.from_bytes(wanted)}"
            )

    def _join_if_needed(self) -> None:
        under_way = self._joining is not None and not self._joining.done()
        if self._joined and not self._closed and not under_way and self._must_join():
            self._joining = self._spawn(self._join_again)

    async def _join_again(self) -> None:
        for _ in range(TRIES):
            if not self._must_join():
                return
            try:
                await self._send_join()
            except TransactionFailedError as error:
                self._tell_failure("join", error)
                return
            except TransactionExpiredError as error:
                self._tell_failure("join", error)
            await self._read()

    async def _send_join(self) -> None:
        instructions, sender = self._ready()
        if self._authorization is None:
            raise CoordinatorLinkError("not joined")
        await sender.send([instructions.join(self.identity, self._authorization, claimer=self._claimer)])

    # -- messages ------------------------------------------------------------------------------------------------------

    def _ready(self) -> tuple[RunInstructions, Sender]:
        if self._instructions is None or self._sender is None:
            raise CoordinatorLinkError("the run has not been looked at yet")
        return self._instructions, self._sender

    def _instructions_of(self, message: ClientToServerMessage, run: RunInstructions) -> list[Instruction]:
        me = self._wallet.pubkey()
        match message:
            case WitnessMessage(WitnessStep(report, metadata)):
                return [run.witness(me, report, without_nan(metadata))]
            case WitnessMessage(WarmupStep(report)):
                return [run.warmup_witness(me, report)]
            case HealthCheckMessage(checks):
                return [run.health_check(me, client, proof) for client, proof in checks]
            case CheckpointMessage(checkpoint):
                return [run.checkpoint(me, checkpoint)]
        return []

    async def _deliver(self, instruction: Instruction, message: ClientToServerMessage) -> None:
        _, sender = self._ready()
        what = type(message).__name__
        for _ in range(TRIES):
            try:
                if isinstance(message, CheckpointMessage):
                    await self._check_program()
                await sender.send([instruction])
                return
            except TransactionFailedError as error:
                self._tell_failure(what, error)
                return
            except (FeesSpentError, OldProgramError):
                raise
            except CoordinatorLinkError as error:
                _log.info("%s: %s", what, error)
            if isinstance(message, WitnessMessage) and not await self._is_missing(message):
                return
        _log.warning("%s was not taken in %d attempts", what, TRIES)

    async def _check_program(self) -> None:
        """Raises OldProgramError if the program may take a checkpoint for something else."""
        if self._check_format:
            check_checkpoint_format(
                self.programs.coordinator, await find_deployment(self._rpc, self.programs.coordinator)
            )
            self._check_format = False  # a later deployment is newer still

    async def _is_missing(self, report: WitnessMessage) -> bool:
        """Whether the chain still waits for a report that may have got lost."""
        await self._read()
        latest = self._states.latest
        return latest is not None and self._report.missing_in(latest) is report

    def _tell_failure(self, what: str, error: CoordinatorLinkError) -> None:
        if isinstance(error, TransactionFailedError) and error.name in _NO_MONEY:
            self._end(
                PaymentError(
                    f"the wallet {self._wallet.pubkey()} cannot pay any more: put at least "
                    f"{shown_sol(self.fees.needed_to_begin)} into it"
                )
            )
        elif isinstance(error, TransactionFailedError) and error.name in _EXPECTED:
            _log.info("%s was not taken: %s", what, error)
        else:
            _log.warning("%s was not taken: %s", what, error)

    async def _check_funds(self) -> None:
        warning = self.fees.epoch_begins(await self._rpc.balance(self._wallet.pubkey()))
        if warning:
            self._note(warning)

    # -- time ----------------------------------------------------------------------------------------------------------

    @property
    def cluster_now(self) -> int:
        """The cluster's Unix time in seconds, as far as we know."""
        return math.floor(self._unix_time() + self._clock_offset)

    async def _watch_clock(self) -> None:
        while True:
            await asyncio.sleep(CLOCK_SECONDS)
            self._join_if_needed()  # a run that waits has no news, and who was refused may have been authorized since
            try:
                self._clock_offset = await cluster_time(self._rpc) - self._unix_time()
            except (CoordinatorLinkError, ProtocolError) as error:
                _log.info("the cluster's clock cannot be read: %s", error)

    async def _tick_when_due(self) -> None:
        loop = asyncio.get_running_loop()
        read_at = loop.time()
        while True:
            await asyncio.sleep(self._tick_seconds)
            account = self.account
            if account is None or self._feed is None or (self._ticking is not None and not self._ticking.done()):
                continue
            state, pending, now = account.state.coordinator, account.state.clients_state.pending(), self.cluster_now
            if should_tick(state, pending, now, self._generator.random()):
                self._ticking = self._spawn(self._tick)
            elif is_tick_due(state, pending, now) and loop.time() >= read_at + OVERDUE_SECONDS:
                read_at = loop.time()
                self._feed.hurry()

    async def _tick(self) -> None:
        instructions, sender = self._ready()
        try:
            await sender.send([instructions.tick(self._wallet.pubkey())])
            await self._read()  # or we would tick again before we have seen what it did
        except (TransactionFailedError, TransactionExpiredError) as error:
            self._tell_failure("tick", error)

    # -- tasks ---------------------------------------------------------------------------------------------------------

    def _spawn(self, work: Callable[..., Coroutine[Any, Any, None]], *given: Any) -> asyncio.Task[None]:
        task = asyncio.create_task(self._guarded(work, *given))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _guarded(self, work: Callable[..., Coroutine[Any, Any, None]], *given: Any) -> None:
        """Work in the background: what fails there ends the states, or is told."""
        try:
            await work(*given)
        except FeesSpentError as error:
            self._end(error)
        except (CoordinatorLinkError, ProtocolError) as error:
            _log.warning("%s", error)
        except Exception as error:  # a reader of the states must not wait forever
            self._end(error)


def without_nan(metadata: WitnessMetadata) -> WitnessMetadata:
    """The same with numbers that a chain takes: a loss that is none becomes infinite, any other 0, as in Psyche."""

    def number(value: float) -> float:
        return 0.0 if math.isnan(value) else value

    return replace(
        metadata,
        tokens_per_sec=number(metadata.tokens_per_sec),
        bandwidth_per_sec=number(metadata.bandwidth_per_sec),
        loss=math.inf if math.isnan(metadata.loss) else metadata.loss,
        evals=tuple(replace(result, value=number(result.value)) for result in metadata.evals),
        efficency=number(metadata.efficency),
    )
