"""The state machine of a run: ``(state, input, now, seed) -> new state``.

Rules: PsycheFoundation/psyche, ``shared/coordinator/src/coordinator.rs``, bit for bit; ``docs/coordinator.md`` draws
them. States are immutable. A refused input raises :class:`~distro_optim.errors.CoordinatorError` and leaves nothing
behind. No function reads a clock or draws a random number: ``now`` is Unix time in whole seconds, ``seed`` a fresh
random number of 64 bits that becomes the seed of a round, should one start.

Two tables in :mod:`.transitions` list all that is legal: which input a phase takes, and where a phase can lead.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from enum import Enum
from typing import Final

from ...errors import CoordinatorErrorCode
from ..model import Checkpoint
from ..types import (
    MAX_NUM_CLIENTS,
    Client,
    ClientState,
    CommitteeProof,
    Coordinator,
    CoordinatorEpochState,
    NodeIdentity,
    RunState,
    Witness,
)
from .checkpoints import shared_checkpoint, stored_checkpoint, uploaded_checkpoint
from .committee import CommitteeSelection
from .consensus import is_healthy, witness_quorum
from .probation import NOBODY, Probation, has_probation, marked
from .steps import (
    DRAIN_ROUNDS,
    check_index,
    is_complete,
    is_due,
    is_epoch_due,
    is_everybody_ready,
    is_prompt,
    last_trained_step,
    move_clients_to_exited,
    next_data_index,
    round_train_seconds,
    start_cooldown,
    start_round_train,
    start_waiting_for_members,
    store_witness,
    with_checkpoint,
    with_epoch,
)
from .transitions import Input, enter, expect, is_active, refusal

__all__ = [
    "TickResult",
    "checkpoint",
    "health_check",
    "pause",
    "resume",
    "tick",
    "warmup_witness",
    "withdraw",
    "withdraw_all",
    "witness",
]


class TickResult(Enum):
    """What a tick did."""

    TICKED = "Ticked"
    EPOCH_END = "EpochEnd(true)"
    """An epoch is complete: the time to save the state."""
    EPOCH_ABANDONED = "EpochEnd(false)"
    """Too few clients were left during warm-up; the run waits for members again."""


MIN_LAST_STEP: Final = 4
"""Psyche sets no last step before this one: the pipeline of overlapping rounds would not be full yet."""

MIN_HEALTH_CHECK_HEIGHT: Final = 2

REPORT_SECONDS: Final = 3
"""Where ``round_witness_time`` is 0, which Psyche does not allow: a round is over as soon as all reports are in, and
this long after its training at the latest. Chosen arbitrarily."""

_U16: Final = 0xFFFF
_U32: Final = 0xFFFF_FFFF


# -- inputs ------------------------------------------------------------------------------------------------------------


def tick(
    state: Coordinator,
    pending: Collection[NodeIdentity] | None,
    now: int,
    seed: int,
    *,
    end_epoch: bool = False,
    probation: Probation = NOBODY,
) -> tuple[Coordinator, TickResult]:
    """Time passes.

    Args:
        state: the run.
        pending: the clients that want to be in the next epoch, in the order of the list (beyond 256: ignored); None if
            they are not known. Only used while waiting for members.
        now: Unix time in seconds.
        seed: for the round that may start.
        end_epoch: whether the epoch is to end as if its time were over.
        probation: in a run of our own kind, who is not waited for.

    Raises:
        CoordinatorError: HALTED.
    """
    expect(state, Input.TICK)
    match state.run_state:
        case RunState.WAITING_FOR_MEMBERS:
            return _tick_waiting_for_members(state, pending, now, probation)
        case RunState.WARMUP:
            return _tick_warmup(state, now, seed, probation)
        case RunState.ROUND_TRAIN:
            due = is_complete(state, probation.late) and not probation.holds
            due = due or is_due(state, now, round_train_seconds(state))
            return (enter(state, RunState.ROUND_WITNESS, now) if due else state), TickResult.TICKED
        case RunState.ROUND_WITNESS:
            due = is_due(state, now, state.config.round_witness_time or REPORT_SECONDS)
            due = due or is_complete(state, probation.late)
            return (_end_round(state, now, seed, end_epoch, probation) if due else state), TickResult.TICKED
        case _:
            return _tick_cooldown(state, now)


def warmup_witness(state: Coordinator, sender: NodeIdentity, report: Witness, now: int, seed: int) -> Coordinator:
    """A client says that it and all of its peers are ready; training starts when enough have said so.

    Psyche accepts such a report from anyone, under any index, and panics at the next one if the index is not in the
    list. Here the report must carry the sender's own index.

    Raises:
        CoordinatorError: HALTED, INVALID_RUN_STATE, INVALID_WITNESS, DUPLICATE_WITNESS, WITNESSES_FULL.
    """
    expect(state, Input.WARMUP_WITNESS)
    if state.run_state is RunState.ROUND_TRAIN:
        return state  # it came too late, which is not a mistake
    check_index(state, sender, report.proof.index, Input.WARMUP_WITNESS, CoordinatorErrorCode.INVALID_WITNESS)
    state, complete = store_witness(state, sender, report, Input.WARMUP_WITNESS)
    return start_round_train(state, now, seed) if complete else state


def witness(state: Coordinator, sender: NodeIdentity, report: Witness, now: int, *, holds: bool = False) -> Coordinator:
    """An elected client reports what it saw of the round before; all reports together end the training early.

    Unless the round ``holds`` for a client on probation.

    Only the election is verified. The filters and the root in the report are the witness's word, which counts as
    part of a quorum.

    Raises:
        CoordinatorError: HALTED, INVALID_RUN_STATE, INVALID_COMMITTEE_SELECTION, INVALID_WITNESS, DUPLICATE_WITNESS,
            WITNESSES_FULL.
    """
    expect(state, Input.WITNESS)
    selection = CommitteeSelection.for_round(state, state.current_round)
    if not report.proof.witness or not selection.verify_witness(sender, report.proof, state.epoch_state.clients):
        raise refusal(
            state, Input.WITNESS, CoordinatorErrorCode.INVALID_WITNESS, f"client {sender} is not elected as it claims"
        )
    state, complete = store_witness(state, sender, report, Input.WITNESS)
    if complete and not holds and state.run_state is not RunState.ROUND_WITNESS:
        return enter(state, RunState.ROUND_WITNESS, now)
    return state


def health_check(state: Coordinator, checks: Sequence[tuple[NodeIdentity, CommitteeProof]]) -> tuple[Coordinator, int]:
    """A client names others that did no work. Returns the new state and how many of them were dropped.

    They leave the list when the round ends. If one of them is healthy, the whole message is refused.

    Raises:
        CoordinatorError: HALTED, INVALID_HEALTH_CHECK, NO_ACTIVE_ROUND, INVALID_COMMITTEE_PROOF.
    """
    expect(state, Input.HEALTH_CHECK)
    if state.current_round.height < MIN_HEALTH_CHECK_HEIGHT:
        raise refusal(
            state,
            Input.HEALTH_CHECK,
            CoordinatorErrorCode.INVALID_HEALTH_CHECK,
            f"round {state.current_round.height} is before round {MIN_HEALTH_CHECK_HEIGHT}",
        )
    for client, proof in checks:
        if is_healthy(state, client, proof):
            raise refusal(
                state, Input.HEALTH_CHECK, CoordinatorErrorCode.INVALID_HEALTH_CHECK, f"client {client} is healthy"
            )
    clients = list(state.epoch_state.clients)
    dropped = 0
    for index in {proof.index for _, proof in checks}:
        if clients[index].state is ClientState.HEALTHY:
            clients[index] = replace(clients[index], state=ClientState.DROPPED)
            dropped += 1
    return (with_epoch(state, clients=tuple(clients)) if dropped else state), dropped


def checkpoint(state: Coordinator, sender: NodeIdentity, index: int, uploaded: Checkpoint) -> Coordinator:
    """A client has uploaded the model. The last to say so wins; kinds that do not fit the present one change nothing.

    Raises:
        CoordinatorError: INVALID_COMMITTEE_PROOF, the sender is not at this index of the list.
    """
    check_index(state, sender, index, Input.CHECKPOINT, CoordinatorErrorCode.INVALID_COMMITTEE_PROOF)
    return with_checkpoint(state, uploaded_checkpoint(state.model.checkpoint, uploaded))


def withdraw(state: Coordinator, index: int) -> Coordinator:
    """A client leaves: it stays in the list until the round ends.

    Raises:
        CoordinatorError: INVALID_WITHDRAW, there is no such client, or it has already left.
    """
    clients = state.epoch_state.clients
    if not 0 <= index < len(clients) or clients[index].state is not ClientState.HEALTHY:
        raise refusal(
            state, Input.WITHDRAW, CoordinatorErrorCode.INVALID_WITHDRAW, f"no healthy client at index {index}"
        )
    gone = replace(clients[index], state=ClientState.WITHDRAWN)
    return with_epoch(state, clients=(*clients[:index], gone, *clients[index + 1 :]))


def withdraw_all(state: Coordinator) -> Coordinator:
    """All clients leave."""
    clients = tuple(
        replace(client, state=ClientState.WITHDRAWN) if client.state is ClientState.HEALTHY else client
        for client in state.epoch_state.clients
    )
    return with_epoch(state, clients=clients)


def pause(state: Coordinator, now: int) -> Coordinator:
    """Stops the run: at once if it is not training, else after the round and its cooldown.

    Raises:
        CoordinatorError: HALTED.
    """
    expect(state, Input.PAUSE)
    if is_active(state):
        return replace(state, pending_pause=True)
    return with_epoch(enter(withdraw_all(state), RunState.PAUSED, now), cold_start_epoch=True)


def resume(state: Coordinator, now: int) -> Coordinator:
    """Goes on after a pause.

    Raises:
        CoordinatorError: CANNOT_RESUME.
    """
    expect(state, Input.RESUME)
    return start_waiting_for_members(state, now)


# -- ticks -------------------------------------------------------------------------------------------------------------


def _tick_waiting_for_members(
    state: Coordinator, pending: Collection[NodeIdentity] | None, now: int, probation: Probation
) -> tuple[Coordinator, TickResult]:
    config = state.config
    if (
        pending is None
        or len(pending) < config.init_min_clients
        or not is_due(state, now, config.waiting_for_members_extra_time)
    ):
        return state, TickResult.TICKED
    state = move_clients_to_exited(state, state.current_round.height)
    joining = dict.fromkeys(pending)
    if not any(client.id in joining for client in state.epoch_state.clients):
        # No client is left to share the parameters, so they must come from storage.
        state = with_checkpoint(state, stored_checkpoint(state.model.checkpoint))
    clients = tuple(Client(id=identity) for identity in list(joining)[:MAX_NUM_CLIENTS])
    if has_probation(state):
        clients = marked(clients, probation.newcomers)
    epoch_state = CoordinatorEpochState(
        clients=clients,
        start_step=state.progress.step,
        start_timestamp=now,
        first_round=True,
        cold_start_epoch=state.epoch_state.cold_start_epoch,
    )
    return enter(replace(state, epoch_state=epoch_state), RunState.WARMUP, now), TickResult.TICKED


def _tick_warmup(state: Coordinator, now: int, seed: int, probation: Probation) -> tuple[Coordinator, TickResult]:
    if is_due(state, now, state.config.warmup_time):
        state = start_round_train(state, now, seed)
    else:
        state = move_clients_to_exited(state, 0)
        if is_everybody_ready(state, is_over=probation.is_over):
            state = start_round_train(state, now, seed)
    if len(state.epoch_state.clients) < state.config.min_clients:
        return start_waiting_for_members(state, now), TickResult.EPOCH_ABANDONED
    return state, TickResult.TICKED


def _end_round(state: Coordinator, now: int, seed: int, end_epoch: bool, probation: Probation) -> Coordinator:
    """The round's witness time is over: the next round, or the end of the epoch."""
    config = state.config
    step = (state.progress.step + 1) & _U32
    state = replace(state, progress=replace(state.progress, step=step))
    state = with_epoch(state, first_round=False)
    num_witnesses = len(state.current_round.witnesses)
    state = move_clients_to_exited(state, state.current_round.height)

    if num_witnesses == 0:
        # We cannot tell whether only the witnesses are gone or everybody is.
        return start_cooldown(withdraw_all(state), now)

    if not state.epoch_state.last_step:
        state = with_epoch(state, last_step=_last_step(state, end_epoch or is_epoch_due(state, now)))

    ends = (
        (state.epoch_state.last_step and step == state.epoch_state.last_step)
        or len(state.epoch_state.clients) < config.min_clients
        or num_witnesses < witness_quorum(config.witness_nodes, num_witnesses)
        or step >= config.total_steps
        or state.pending_pause
    )
    if ends:
        return start_cooldown(state, now)
    if has_probation(state):
        state = with_epoch(state, clients=marked(state.epoch_state.clients, probation.newcomers))
    return start_round_train(state, now, seed)


def _last_step(state: Coordinator, epoch_is_due: bool) -> int:
    """The step with which the epoch will end, if that can be said now; else 0."""
    last_step = (state.progress.step + DRAIN_ROUNDS) & _U32
    if is_prompt(state):
        if last_step >= state.config.total_steps:
            return state.config.total_steps
        if last_step > last_trained_step(state.config):
            return 0  # no epoch would follow: what is left to be trained is trained in this one
    return last_step if epoch_is_due and last_step >= MIN_LAST_STEP else 0


def _tick_cooldown(state: Coordinator, now: int) -> tuple[Coordinator, TickResult]:
    if not is_due(state, now, state.config.cooldown_time):
        return state, TickResult.TICKED
    round_ = state.current_round
    progress = replace(
        state.progress,
        epoch=(state.progress.epoch + 1) & _U16,
        epoch_start_data_index=next_data_index(state),
    )
    state = move_clients_to_exited(replace(state, progress=progress), round_.height)
    state = with_checkpoint(state, shared_checkpoint(state.model.checkpoint))
    if state.pending_pause:
        state = enter(withdraw_all(state), RunState.PAUSED, now)
        state = with_epoch(replace(state, pending_pause=False), cold_start_epoch=True)
    else:
        state = with_epoch(start_waiting_for_members(state, now), cold_start_epoch=False)
    return state, TickResult.EPOCH_END
