"""What Psyche's coordinator program does to the account of a run, in Python.

PsycheFoundation/psyche, ``architectures/decentralized/solana-coordinator``: ``instance_state.rs``, ``clients_state.rs``
and ``logic``. The rules of the run itself are :mod:`distro_optim.coordinator.rules`, except that the program takes a
report of a warm-up from any wallet that ever joined, under any index, where ours is stricter.

Give :class:`CoordinatorTwin` the data of an instruction, who signed it and the time::

    twin = CoordinatorTwin()
    result = twin.call(data, signer=bytes(key), unix_timestamp=1700000000, slot=250000000)
    result.error  # None, or a ProgramError with .code and .name
    result.panic  # whether the program panicked
    twin.account  # the account of the run
    twin.digest()  # SHA-256 over the borsh form of its state

An error or a panic leaves the account as it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from ...coordinator.formats import borsh
from ...coordinator.formats.account import (
    ClientsState,
    CoordinatorAccount,
    CoordinatorAccountV2,
    CoordinatorInstanceState,
    SolanaClient,
    SolanaClientV2,
    fresh_account,
)
from ...coordinator.rules import machine
from ...coordinator.rules.steps import start_round_train, with_round
from ...coordinator.rules.transitions import Input, is_halted, refusal
from ...coordinator.rules.validation import config_problems, model_problems
from ...coordinator.solana import arguments as args
from ...coordinator.solana.program_errors import ANCHOR_ERRORS, coordinator_error_number, refusal_name
from ...coordinator.types import (
    MAX_NUM_CLIENTS,
    MAX_NUM_WITNESSES,
    RUN_ID_MAX_LEN,
    ClientState,
    Committee,
    CommitteeProof,
    Coordinator,
    CoordinatorConfig,
    NodeIdentity,
    RunState,
    Witness,
)
from ...errors import CoordinatorError, CoordinatorErrorCode, ProtocolError

__all__ = ["CallResult", "Clock", "CoordinatorTwin", "Panic", "ProgramError", "Refused", "run_instruction"]

CLIENT_VERSION_BYTES: Final = 96


@dataclass(frozen=True)
class ProgramError:
    """An error of a program, or one of Anchor's.

    Attributes:
        code: its number.
        name: its name.
    """

    code: int
    name: str


class Refused(Exception):
    """A program refuses an instruction."""

    def __init__(self, error: ProgramError) -> None:
        super().__init__(error.name)
        self.error = error

    @classmethod
    def by_name(cls, name: str) -> Refused:
        """With an error of the coordinator."""
        return cls(ProgramError(coordinator_error_number(name), name))

    @classmethod
    def by_anchor(cls, code: int) -> Refused:
        """With an error of Anchor."""
        return cls(ProgramError(code, ANCHOR_ERRORS[code]))


class Panic(Exception):
    """The real program panics here."""


@dataclass(frozen=True)
class Clock:
    """The cluster's time.

    Attributes:
        slot: number of the block.
        unix_timestamp: seconds.
    """

    slot: int
    unix_timestamp: int

    @property
    def seed(self) -> int:
        """The random number that the program makes of it, 64 bits."""
        data = self.unix_timestamp.to_bytes(8, "little", signed=True) + self.slot.to_bytes(8, "little")
        return int.from_bytes(hashlib.sha256(data).digest()[:8], "little")


@dataclass(frozen=True)
class CallResult:
    """What became of a call.

    Attributes:
        error: why it was refused; None if it was not.
        panic: whether the program panicked.
    """

    error: ProgramError | None = None
    panic: bool = False


class CoordinatorTwin:
    """One account of a run and the program that owns it; who may call and what it costs is not looked at.

    Args:
        account: the account at first; by default zeros, for ``init_coordinator``.
        account_version: of the program's accounts, 1 or 2.
    """

    def __init__(self, account: CoordinatorAccount | None = None, *, account_version: int = 1) -> None:
        self._zero = fresh_account(account_version)
        self.account = account or self._zero
        self._instructions = args.coordinator_instructions(account_version)

    def call(self, data: bytes, *, signer: bytes, unix_timestamp: int, slot: int) -> CallResult:
        """Carries out one instruction.

        Args:
            data: of the instruction, as it travels.
            signer: public key of the wallet, 32 bytes.
            unix_timestamp: the cluster's time in seconds.
            slot: the cluster's slot.
        """
        try:
            name, arguments = args.decode_arguments(self._instructions, data)
        except ProtocolError:
            return CallResult(Refused.by_anchor(101).error)
        if arguments is None:
            return CallResult(Refused.by_anchor(102).error)
        try:
            if name == "free_coordinator":
                check_free(self.account)
                self.account = self._zero
            else:
                self.account = run_instruction(self.account, signer, arguments, Clock(slot, unix_timestamp))
        except Refused as refused:
            return CallResult(refused.error)
        except Panic:
            return CallResult(panic=True)
        return CallResult()

    def digest(self) -> str:
        """SHA-256 over the borsh form of the state, in hex: independent of padding and unused bytes."""
        return hashlib.sha256(borsh.encode(self.account.state)).hexdigest()


def check_free(account: CoordinatorAccount) -> None:
    """Raises Refused unless the run may be closed."""
    if not is_halted(account.state.coordinator):
        raise Refused.by_name("CloseCoordinatorNotHalted")


def run_instruction(
    account: CoordinatorAccount, signer: bytes, arguments: args.Arguments, clock: Clock
) -> CoordinatorAccount:
    """The account after an instruction.

    Args:
        account: the account before.
        signer: who called, 32 bytes.
        arguments: of any instruction but ``free_coordinator``.
        clock: the cluster's time.

    Raises:
        Refused, Panic: nothing has changed.
    """
    if isinstance(arguments, args.InitCoordinator):
        return _init(account, arguments)
    if isinstance(arguments, args.JoinRun | args.JoinRunV2) and arguments.client_id.signer != signer:
        raise Refused.by_name("SignerMismatch")
    handler = _HANDLERS[type(arguments)]
    try:
        state = handler(account.state, signer, arguments, clock)
    except CoordinatorError as error:
        raise Refused.by_name(refusal_name(error.code)) from None
    counted = 0 if isinstance(arguments, args.UpdateClientVersion) else 1
    return replace(account, state=state, nonce=account.nonce + counted)


def _init(account: CoordinatorAccount, given: args.InitCoordinator) -> CoordinatorAccount:
    if len(given.run_id.encode(errors="surrogateescape")) > RUN_ID_MAX_LEN:
        raise Refused.by_name("RunIdInvalidLength")
    if account.version != 0:
        raise Refused.by_anchor(3000)
    version = given.client_version.encode()[:CLIENT_VERSION_BYTES].decode(errors="surrogateescape")
    coordinator = replace(account.state.coordinator, run_id=given.run_id)
    state = replace(account.state, coordinator=coordinator, client_version=version)
    account_version = 2 if isinstance(account, CoordinatorAccountV2) else 1
    return replace(account, version=account_version, state=state, nonce=0)


# -- steps -------------------------------------------------------------------------------------------------------------


State = CoordinatorInstanceState


def _find(state: State, signer: bytes) -> NodeIdentity:
    for client in state.clients_state.clients:
        if client.id.signer == signer:
            return client.id
    raise Refused.by_name("SignerNotAClient")


def _with_clients(state: State, **changes: Any) -> State:
    return replace(state, clients_state=replace(state.clients_state, **changes))


def _tick(state: State, clock: Clock) -> State:
    pending = None
    if state.coordinator.run_state is RunState.WAITING_FOR_MEMBERS:
        state = replace(state, is_warmup_first_tick=True, is_training_first_tick=True)
        pending = state.clients_state.pending()
    before = state.coordinator
    try:
        coordinator, result = machine.tick(before, pending, clock.unix_timestamp, clock.seed)
    except CoordinatorError as error:
        if error.code is CoordinatorErrorCode.NO_ACTIVE_ROUND:
            raise Panic("a quorum of nobody") from None
        raise
    state = replace(state, coordinator=coordinator)
    if result is not machine.TickResult.TICKED:
        return replace(state, clients_state=_paid(state.clients_state, coordinator))
    if not coordinator.epoch_state.first_round:
        return state
    if coordinator.run_state is RunState.WARMUP and state.is_warmup_first_tick:
        rates = state.clients_state.future_epoch_rates
        return replace(_with_clients(state, current_epoch_rates=rates), is_warmup_first_tick=False)
    if coordinator.run_state is RunState.ROUND_TRAIN and state.is_training_first_tick:
        following = state.clients_state.next_active + 1
        return replace(_with_clients(state, next_active=following), is_training_first_tick=False)
    return state


def _paid(ever_joined: ClientsState, coordinator: Coordinator) -> ClientsState:
    """Points at the end of an epoch. Both lists are only followed as long as they are in the stored order."""
    finished, exited = coordinator.epoch_state.clients, coordinator.epoch_state.exited_clients
    rates = ever_joined.current_epoch_rates
    next_finished = next_exited = 0
    clients = list(ever_joined.clients)
    for place, client in enumerate(clients):
        if next_finished < len(finished) and client.id == finished[next_finished].id:
            if finished[next_finished].state is ClientState.HEALTHY:
                client = _with_points(client, rates.earning_rate_total_shared // len(finished), 0)
            next_finished += 1
        if next_exited < len(exited) and client.id == exited[next_exited].id:
            if exited[next_exited].state is ClientState.EJECTED:
                client = _with_points(client, 0, rates.slashing_rate_per_client)
            next_exited += 1
        clients[place] = client
    return replace(ever_joined, clients=tuple(clients))


def _with_points(client: SolanaClient, earned: int, slashed: int) -> SolanaClient:
    if max(client.earned + earned, client.slashed + slashed) >= 1 << 64:
        raise Panic("attempt to add with overflow")
    if not earned and not slashed:
        return client
    return replace(client, earned=client.earned + earned, slashed=client.slashed + slashed)


def _check_config(config: CoordinatorConfig) -> None:
    # The program knows nothing against verifiers, which nobody has.
    if any(field != "verification_percent" for field, _ in config_problems(config)):
        raise Refused.by_name("ConfigSanityCheckFailed")


def _check_model(state: State) -> None:
    if next(model_problems(state.coordinator.model), None) is not None:
        raise Refused.by_name("ModelSanityCheckFailed")


def _check_cold_start(coordinator: Coordinator) -> None:
    steps, config = coordinator.model.cold_start_warmup_steps, coordinator.config
    if steps == 0:
        return
    if config.epoch_time < config.warmup_time or config.max_round_train_time == 0:
        raise Panic("attempt to subtract with overflow, or to divide by zero")
    if steps > (config.epoch_time - config.warmup_time) // config.max_round_train_time:
        raise Refused.by_name("ConfigSanityCheckFailed")


# -- handlers ----------------------------------------------------------------------------------------------------------


def _join(state: State, signer: bytes, given: args.JoinRun | args.JoinRunV2, clock: Clock) -> State:
    known = state.clients_state
    clients = list(known.clients)
    for place, client in enumerate(clients):
        if client.id == given.client_id:
            clients[place] = replace(client, id=given.client_id, active=known.next_active)  # the claimer stays
            break
    else:
        if state.coordinator.config.global_batch_size_end == len(clients) & 0xFFFF:
            raise Refused.by_name("MoreClientsThanBatches")
        if len(clients) >= MAX_NUM_CLIENTS:
            raise Refused.by_name("ClientsFull")
        if isinstance(given, args.JoinRunV2):
            clients.append(SolanaClientV2(given.client_id, given.claimer, 0, 0, known.next_active))
        else:
            clients.append(SolanaClient(given.client_id, bytes(8), 0, 0, known.next_active))
    state = _with_clients(state, clients=tuple(clients))
    return state if is_halted(state.coordinator) else _tick(state, clock)


def _tick_call(state: State, signer: bytes, given: args.Tick, clock: Clock) -> State:
    return _tick(state, clock)


def _witness(state: State, signer: bytes, given: args.WitnessRound, clock: Clock) -> State:
    sender = _find(state, signer)
    coordinator = machine.witness(state.coordinator, sender, given.report, clock.unix_timestamp)
    return _tick(replace(state, coordinator=coordinator), clock)


def _warmup_witness(state: State, signer: bytes, given: args.WarmupWitness, clock: Clock) -> State:
    sender = _find(state, signer)
    coordinator = _laxly_warmed_up(state.coordinator, sender, given.report, clock)
    return _tick(replace(state, coordinator=coordinator), clock)


def _laxly_warmed_up(state: Coordinator, sender: NodeIdentity, report: Witness, clock: Clock) -> Coordinator:
    if is_halted(state):
        raise refusal(state, Input.WARMUP_WITNESS, CoordinatorErrorCode.HALTED, "it is halted")
    if state.run_state is RunState.ROUND_TRAIN:
        return state
    if state.run_state is not RunState.WARMUP:
        raise refusal(state, Input.WARMUP_WITNESS, CoordinatorErrorCode.INVALID_RUN_STATE, "it is no warm-up")
    clients, witnesses = state.epoch_state.clients, state.current_round.witnesses
    for stored in witnesses:
        if stored.proof.index >= len(clients):
            raise Panic("index out of bounds")
        if clients[stored.proof.index].id == sender:
            raise refusal(state, Input.WARMUP_WITNESS, CoordinatorErrorCode.DUPLICATE_WITNESS, "it is there")
    if len(witnesses) >= MAX_NUM_WITNESSES:
        raise refusal(state, Input.WARMUP_WITNESS, CoordinatorErrorCode.WITNESSES_FULL, "there is no room")
    state = with_round(state, replace(state.current_round, witnesses=(*witnesses, report)))
    expected = state.config.witness_nodes or min(len(clients), MAX_NUM_WITNESSES)
    if len(witnesses) + 1 == expected:
        return start_round_train(state, clock.unix_timestamp, clock.seed)
    return state


def _health_check(state: State, signer: bytes, given: args.HealthCheck, clock: Clock) -> State:
    _find(state, signer)
    proof = CommitteeProof(given.committee, given.position, given.index)
    try:
        coordinator, _ = machine.health_check(state.coordinator, [(given.id, proof)])
    except CoordinatorError as error:
        no_quorum = error.code is CoordinatorErrorCode.NO_ACTIVE_ROUND and state.coordinator.previous_round is not None
        no_work = "has no defined work" in error.message and given.committee is not Committee.TRAINER
        if no_quorum or no_work:
            raise Panic("not implemented") from None
        raise
    return _tick(replace(state, coordinator=coordinator), clock)


def _checkpoint(state: State, signer: bytes, given: args.CheckpointUploaded, clock: Clock) -> State:
    sender = _find(state, signer)
    listed = [client.id for client in state.coordinator.epoch_state.clients]
    if sender not in listed:
        raise Refused.by_name("SignerNotAClient")
    coordinator = machine.checkpoint(state.coordinator, sender, listed.index(sender), given.repo)
    state = replace(state, coordinator=coordinator)
    return state if is_halted(coordinator) else _tick(state, clock)


def _update(state: State, signer: bytes, given: args.Update, clock: Clock) -> State:
    coordinator = state.coordinator
    changes_run = given.config is not None or given.model is not None
    if coordinator.run_state is RunState.FINISHED:
        raise Refused.by_name("UpdateConfigFinished")
    if not is_halted(coordinator) and (changes_run or given.progress is not None):
        raise Refused.by_name("UpdateConfigNotHalted")
    if given.metadata is not None:
        state = replace(state, metadata=given.metadata)
    if given.config is not None:
        _check_config(given.config)
        coordinator = replace(coordinator, config=given.config)
    if given.model is not None:
        coordinator = replace(coordinator, model=given.model)
        _check_model(replace(state, coordinator=coordinator))
    if changes_run:
        _check_cold_start(coordinator)
    if given.progress is not None:
        if given.progress.step == 0:
            raise Refused.by_name("ModelSanityCheckFailed")
        coordinator = replace(coordinator, progress=given.progress)
    return replace(state, coordinator=coordinator)


def _update_client_version(state: State, signer: bytes, given: args.UpdateClientVersion, clock: Clock) -> State:
    if not is_halted(state.coordinator):
        raise Refused.by_name("UpdateConfigNotHalted")
    if len(given.new_version.encode()) > CLIENT_VERSION_BYTES:
        raise Panic("the version is too long")
    return replace(state, client_version=given.new_version)


def _set_future_epoch_rates(state: State, signer: bytes, given: args.SetFutureEpochRates, clock: Clock) -> State:
    rates = state.clients_state.future_epoch_rates
    if given.earning_rate_total_shared is not None:
        rates = replace(rates, earning_rate_total_shared=given.earning_rate_total_shared)
    if given.slashing_rate_per_client is not None:
        rates = replace(rates, slashing_rate_per_client=given.slashing_rate_per_client)
    return _with_clients(state, future_epoch_rates=rates)


def _set_paused(state: State, signer: bytes, given: args.SetPaused, clock: Clock) -> State:
    coordinator = state.coordinator
    if given.paused:
        return replace(state, coordinator=machine.pause(coordinator, clock.unix_timestamp))
    _check_config(coordinator.config)
    _check_model(state)
    _check_cold_start(coordinator)
    if coordinator.run_state is RunState.UNINITIALIZED:
        first = replace(coordinator.progress, step=1)
        coordinator = replace(coordinator, run_state=RunState.PAUSED, progress=first)
    if coordinator.progress.step == 0:
        raise Refused.by_name("ProgressSanityCheckFailed")
    coordinator = machine.resume(coordinator, clock.unix_timestamp)
    state = replace(state, coordinator=coordinator)
    return _tick(_with_clients(state, next_active=state.clients_state.next_active + 1), clock)


_HANDLERS: Final[dict[type, Callable[[State, bytes, Any, Clock], State]]] = {
    args.JoinRun: _join,
    args.JoinRunV2: _join,
    args.Tick: _tick_call,
    args.WitnessRound: _witness,
    args.WarmupWitness: _warmup_witness,
    args.HealthCheck: _health_check,
    args.CheckpointUploaded: _checkpoint,
    args.Update: _update,
    args.UpdateClientVersion: _update_client_version,
    args.SetFutureEpochRates: _set_future_epoch_rates,
    args.SetPaused: _set_paused,
}
