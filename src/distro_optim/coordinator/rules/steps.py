"""The steps that the inputs of the state machine are composed of: each takes a state and returns the next.

Rules: PsycheFoundation/psyche, ``shared/coordinator/src/coordinator.rs``.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any, Final

from ...errors import CoordinatorErrorCode
from ..model import Checkpoint
from ..types import (
    MAX_NUM_CLIENTS,
    MAX_NUM_WITNESSES,
    NUM_STORED_ROUNDS,
    ClientState,
    Coordinator,
    CoordinatorConfig,
    NodeIdentity,
    Round,
    RunState,
    Witness,
)
from .assignment import round_batch_size
from .committee import CommitteeSelection
from .consensus import witness_quorum
from .probation import on_probation
from .transitions import Input, enter, refusal

DRAIN_ROUNDS: Final = 2
"""Rounds without training at the end of an epoch, in which the last results are applied."""


def is_due(state: Coordinator, now: int, duration: int) -> bool:
    """Whether the present phase has lasted ``duration`` seconds; never within its first second."""
    start = state.run_state_start_unix_timestamp
    return now != start and now >= start + duration


def is_epoch_due(state: Coordinator, now: int) -> bool:
    """Whether the epoch has lasted its time, ``epoch_time`` seconds; never within its first second."""
    start = state.epoch_state.start_timestamp
    return now != start and now >= start + state.config.epoch_time


def is_prompt(state: Coordinator) -> bool:
    """Whether phases end when there is nothing more to wait for. A run of Psyche always has seconds for its reports."""
    return state.config.round_witness_time == 0


def round_train_seconds(state: Coordinator) -> int:
    """After how many seconds of the clock a round's training has had its time.

    A round that begins late in a second has one second less than the clock says. Under Psyche's rules it has less time
    then; rounds of a prompt run may last milliseconds and begin at any moment, and get what they were promised.
    """
    return state.config.max_round_train_time + (1 if is_prompt(state) else 0)


def counted_steps(state: Coordinator) -> tuple[int, int]:
    """The run's step and its last one, as people count them.

    Who asks for 20 steps is told 20: the steps after them, in which a prompt run only applies its last results, are not
    counted. A run of Psyche's is counted as its own clients do.
    """
    config, step = state.config, state.progress.step
    if not is_prompt(state):
        return step, config.total_steps
    last = last_trained_step(config)
    return min(step, last), last


def last_trained_step(config: CoordinatorConfig) -> int:
    """The run's last step in which anybody trains, if all goes well.

    Psyche trains up to the step before ``total_steps`` and never applies its last two updates. A prompt run ends with
    the rounds that apply them.
    """
    drain = DRAIN_ROUNDS if config.round_witness_time == 0 else 0
    return config.total_steps - 1 - drain


def is_done(state: Coordinator) -> bool:
    """Whether no epoch is to begin any more: it would have nothing to train."""
    return state.progress.step > last_trained_step(state.config)


def is_complete(state: Coordinator, late: Collection[NodeIdentity] = ()) -> bool:
    """Whether all reports of a prompt run's round are in: those of the elected that have not left meanwhile.

    Args:
        state: in a round.
        late: clients that are not waited for any longer.
    """
    witnesses, clients = state.current_round.witnesses, state.epoch_state.clients
    if not is_prompt(state) or not witnesses:
        return False
    if len(witnesses) < witness_quorum(state.config.witness_nodes, len(witnesses)):
        return False
    selection = CommitteeSelection.for_round(state, state.current_round)
    reported = {witness.proof.index for witness in witnesses}
    return all(
        index in reported
        or client.state is not ClientState.HEALTHY
        or client.id in late
        or not selection.get_witness(index).witness
        for index, client in enumerate(clients)
    )


def is_everybody_ready(state: Coordinator, *, is_over: bool = False) -> bool:
    """Whether a prompt run's warm-up has nobody left to wait for; a client that was not ready may have left.

    Args:
        state: in warm-up.
        is_over: whether clients on probation are not waited for any longer.
    """
    clients, newcomers = state.epoch_state.clients, on_probation(state)
    if newcomers:
        ready = {witness.proof.index for witness in state.current_round.witnesses}
        regular = len(clients) - len(newcomers)
        if len(clients) < state.config.min_clients or len(ready - newcomers) < min(regular, MAX_NUM_WITNESSES):
            return False
        return is_over or len(ready) >= min(len(clients), MAX_NUM_WITNESSES)
    expected = max(state.config.min_clients, min(len(clients), MAX_NUM_WITNESSES))
    return is_prompt(state) and len(state.current_round.witnesses) >= expected


def next_data_index(state: Coordinator) -> int:
    """Where the data of the next epoch begin, at the end of this one.

    The last two rounds of an epoch change no weights: those of an epoch that ends in good order train nothing, and of
    one that breaks off, their results are never applied. Psyche counts their data as done. A prompt run takes them
    again, so that a pass over the data leaves no sample out.
    """
    round_ = state.current_round
    if not is_prompt(state):
        return round_.data_index + round_batch_size(state, round_)
    before = state.previous_round
    return round_.data_index if before is None else before.data_index


def with_epoch(state: Coordinator, **changes: Any) -> Coordinator:
    """Replaces fields of the epoch."""
    return replace(state, epoch_state=replace(state.epoch_state, **changes))


def with_round(state: Coordinator, round_: Round) -> Coordinator:
    """Replaces the current round."""
    head, rounds = state.epoch_state.rounds_head, state.epoch_state.rounds
    return with_epoch(state, rounds=(*rounds[:head], round_, *rounds[head + 1 :]))


def with_checkpoint(state: Coordinator, checkpoint: Checkpoint) -> Coordinator:
    """Replaces the place of the weights."""
    return replace(state, model=replace(state.model, checkpoint=checkpoint))


def start_waiting_for_members(state: Coordinator, now: int) -> Coordinator:
    """Waits for the members of the next epoch, or ends the run if all of its steps are done."""
    return enter(state, RunState.FINISHED if is_done(state) else RunState.WAITING_FOR_MEMBERS, now)


def start_cooldown(state: Coordinator, now: int) -> Coordinator:
    """Ends the rounds of an epoch."""
    return enter(with_round(state, replace(state.current_round, witnesses=())), RunState.COOLDOWN, now)


def start_round_train(state: Coordinator, now: int, seed: int) -> Coordinator:
    """Begins the next round, or the first one of the epoch, with ``seed``."""
    epoch = state.epoch_state
    if epoch.first_round:
        head, height, data_index = 0, 0, state.progress.epoch_start_data_index
    else:
        previous = state.current_round
        head = (epoch.rounds_head + 1) % NUM_STORED_ROUNDS
        height = previous.height + 1
        data_index = previous.data_index + round_batch_size(state, previous)
    started = Round(
        witnesses=(),
        data_index=data_index,
        random_seed=seed,
        height=height,
        clients_len=len(epoch.clients),
        tie_breaker_tasks=0,
    )
    state = with_round(with_epoch(state, rounds_head=head), started)
    return enter(state, RunState.ROUND_TRAIN, now)


def move_clients_to_exited(state: Coordinator, height: int) -> Coordinator:
    """Moves the clients that are no longer healthy to the list of exited ones; ``height`` is that of the round."""
    epoch = state.epoch_state
    gone = tuple(replace(c, exited_height=height) for c in epoch.clients if c.state is not ClientState.HEALTHY)
    if not gone:
        return state
    # An epoch has at most 256 clients and each leaves once; only a state made by hand can overflow the list.
    exited = (*epoch.exited_clients, *gone)[-MAX_NUM_CLIENTS:]
    return with_epoch(
        state, clients=tuple(c for c in epoch.clients if c.state is ClientState.HEALTHY), exited_clients=exited
    )


def store_witness(state: Coordinator, sender: NodeIdentity, report: Witness, input_: Input) -> tuple[Coordinator, bool]:
    """Keeps a report. The flag says whether it was the last one expected."""
    clients, witnesses = state.epoch_state.clients, state.current_round.witnesses
    newcomers = on_probation(state)
    expected = state.config.witness_nodes or min(len(clients) - len(newcomers), MAX_NUM_WITNESSES)
    # In warm-up the list may have become shorter since a report came in; its index then names no client.
    if any(w.proof.index < len(clients) and clients[w.proof.index].id == sender for w in witnesses):
        raise refusal(state, input_, CoordinatorErrorCode.DUPLICATE_WITNESS, f"client {sender} has reported already")
    if len(witnesses) >= MAX_NUM_WITNESSES:
        raise refusal(state, input_, CoordinatorErrorCode.WITNESSES_FULL, f"{MAX_NUM_WITNESSES} reports are stored")
    if report.proof.index in newcomers:
        # Reports of those on probation, which there are in warm-up only, leave room for the others'.
        missing = len(clients) - len(newcomers) - len({w.proof.index for w in witnesses} - newcomers)
        if len(witnesses) + missing >= MAX_NUM_WITNESSES:
            raise refusal(state, input_, CoordinatorErrorCode.WITNESSES_FULL, "the room is for regular clients")
    witnesses = (*witnesses, report)
    state = with_round(state, replace(state.current_round, witnesses=witnesses))
    if newcomers and state.run_state is RunState.WARMUP:
        return state, is_everybody_ready(state)
    return state, len(witnesses) == expected


def check_index(
    state: Coordinator, sender: NodeIdentity, index: int, input_: Input, code: CoordinatorErrorCode
) -> None:
    """Raises CoordinatorError with ``code`` unless ``sender`` is at ``index`` of the list of clients."""
    clients = state.epoch_state.clients
    if not 0 <= index < len(clients) or clients[index].id != sender:
        raise refusal(state, input_, code, f"client {sender} is not at index {index} of {len(clients)} clients")
