"""What there is to tell about a run while it goes: counters, the last events in words, and a witness's numbers."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from ...comm.swarm import PeerInfo
from ...coordinator.rules.assignment import round_batch_size
from ...coordinator.rules.outlook import waits_for
from ...coordinator.rules.points import ClientAccount
from ...coordinator.rules.schedule import effective_learning_rate
from ...coordinator.rules.steps import counted_steps
from ...coordinator.types import Coordinator, NodeIdentity, RunState, WitnessMetadata
from ...errors import CoordinatorError
from ...verify.merkle import merkle_root
from ..port import LossReport, RunView
from ..rounds.actions import Desynced, ResultMissing, RunEnded
from ..rounds.rounds import Rounds, Stage
from .contributions import Contributions
from .mailbox import Mailbox

__all__ = ["Journal", "with_state"]

_MAX_NOTES: Final = 50
"""The last events that are kept. Chosen arbitrarily."""

_NO_LOSS: Final = float("nan")
"""What a report says before the first batch, as in Psyche's client."""

_ROUND: Final = frozenset({RunState.ROUND_TRAIN, RunState.ROUND_WITNESS})
"""Phases in which a learning rate applies."""


class Journal:
    """One client's notes. Belongs to the network's thread; the views that it makes may go anywhere.

    Args:
        run_id: the run.
        me: the client.
        clock: monotonic seconds.
        reports: what clients last reported, where that is known.
        waiting: how many clients wait for the next epoch, where that is known.
        missing: how many have still to come before an epoch can begin, likewise.
        points: of each identity so far, where that is known.
        fees: lamports that taking part has cost so far, where it costs something.
        gives_up_after: seconds without a link to the coordinator after which the run counts as lost; None: never.
    """

    def __init__(
        self,
        run_id: str,
        me: NodeIdentity,
        clock: Callable[[], float],
        *,
        reports: Callable[[], Mapping[NodeIdentity, WitnessMetadata]] = dict,
        waiting: Callable[[], int | None] = lambda: None,
        missing: Callable[[], int | None] = lambda: None,
        points: Callable[[], Mapping[bytes, ClientAccount] | None] = lambda: None,
        fees: Callable[[], int | None] = lambda: None,
        gives_up_after: float | None = None,
    ) -> None:
        self._run_id = run_id
        self._me = me
        self._clock = clock
        self._reports = reports
        self._waiting = waiting
        self._missing = missing
        self._points = points
        self._fees = fees
        self._notes: deque[str] = deque(maxlen=_MAX_NOTES)
        self._state: Coordinator | None = None
        self._gives_up_after = gives_up_after
        self._connected = True
        self._began = clock()
        self._round_began = clock()
        self._round_seconds = 0.0
        self._seconds_training = 0.0
        self._bandwidth = 0.0
        self._loss: LossReport | None = None
        self._weights: tuple[int, bytes] | None = None
        self.contributions = Contributions()
        """Of all peers."""

    # -- what happens --------------------------------------------------------------------------------------------------

    def tell(self, words: str) -> None:
        """A line among the last events of :meth:`view`."""
        step = counted_steps(self._state)[0] if self._state is not None else 0
        self._notes.append(f"step {step}: {words}")

    def state(self, state: Coordinator) -> None:
        """The coordinator's state is this now."""
        before, self._state = self._state, state
        if before is None:
            self._round_began = self._clock()  # or before: how long this round takes is not known
        elif before.progress.step != state.progress.step:
            now = self._clock()
            self._round_seconds, self._round_began = now - self._round_began, now
        if before is None or before.run_state is not state.run_state:
            self._note_phase(state)
        if before is not None:
            ours, theirs = _members(state), _members(before)
            if before.epoch_state.start_timestamp == state.epoch_state.start_timestamp and theirs - ours:
                self.tell(f"{', '.join(sorted(map(str, theirs - ours)))} left")

    def _note_phase(self, state: Coordinator) -> None:
        match state.run_state:
            case RunState.WARMUP:
                count = len(state.epoch_state.clients)
                self.tell(f"epoch {state.progress.epoch} forms, with {count} peer{'s' if count != 1 else ''}")
            case RunState.WAITING_FOR_MEMBERS:
                self.tell("waiting for members")
            case RunState.PAUSED:
                self.tell("the run is paused")

    def connection(self, connected: bool) -> None:
        """Whether there is a link to the coordinator."""
        if connected is not self._connected:
            self.tell("the link to the coordinator is back" if connected else "the link to the coordinator is lost")
        self._connected = connected

    def event(self, event: Desynced | ResultMissing) -> None:
        """Something happened to our weights."""
        match event:
            case Desynced(reason=reason, tensors=tensors):
                where = f" (first in {tensors[0]})" if tensors else ""
                self.tell(f"our weights differ: {reason}{where}; they are loaded again when the next epoch forms")
            case ResultMissing(batches=batches):
                self.tell(f"{len(batches)} results that count never came")

    def ended(self, action: RunEnded) -> None:
        """The run is over for us."""
        self.tell(action.error or "the run is finished")

    def trained(self, step: int, loss: float | None) -> None:
        """We trained the batch of ``step``; ``loss`` is the mean over its samples, if it is known."""
        if loss is not None:
            self._loss = LossReport(step=step, loss=loss)

    def hashed(self, step: int, digests: Sequence[bytes]) -> None:
        """Our weights at the start of ``step`` have these digests, 32 bytes for each tensor."""
        self._weights = (step, merkle_root(list(digests)))

    # -- what it tells -------------------------------------------------------------------------------------------------

    def metadata(self, step: int) -> WitnessMetadata:
        """What goes along with a witness's report, for people to look at."""
        state = self._state
        speed = 0.0
        if state is not None and self._round_seconds > 0:
            samples = round_batch_size(state, state.current_round)
            speed = samples * state.model.max_seq_len / self._round_seconds
        elapsed = self._clock() - self._began
        return WitnessMetadata(
            step=step,
            tokens_per_sec=speed,
            bandwidth_per_sec=self._bandwidth,
            loss=self._loss.loss if self._loss is not None else _NO_LOSS,
            evals=(),
            prompt_results=(),
            prompt_index=0,
            efficency=min(1.0, self._seconds_training / elapsed) if elapsed > 0 else 0.0,
        )

    def view(self, rounds: Rounds, peers: Sequence[PeerInfo], mailbox: Mailbox) -> RunView:
        """The present situation."""
        self._bandwidth = sum(peer.send_rate + peer.receive_rate for peer in peers)
        self._seconds_training = mailbox.seconds_training
        view = RunView(
            run_id=self._run_id,
            stage=rounds.stage.name,
            fault=rounds.fault.reason if rounds.fault is not None else None,
            connected=self._connected,
            gives_up_after=self._gives_up_after,
            fees=self._fees(),
            bytes_sent=sum(peer.bytes_sent for peer in peers),
            bytes_received=sum(peer.bytes_received for peer in peers),
            peers=tuple(peers),
            neighbors=sum(peer.is_neighbor for peer in peers),
            dropped=dict(rounds.dropped),
            rounds_trained=mailbox.rounds_trained,
            rounds_cancelled=mailbox.rounds_cancelled,
            seconds_waiting=mailbox.seconds_waiting,
            seconds_training=mailbox.seconds_training,
            weights_root=self._weights[1] if self._weights is not None else None,
            weights_step=self._weights[0] if self._weights is not None else None,
            waiting_peers=self._waiting(),
            losses=self._losses(),
            contributions=self.contributions.seen(),
            audits=rounds.audits,
            audit_limits=rounds.audit_limits,
            audits_nothing=rounds.audits_nothing,
            points=self._points(),
            last_events=tuple(self._notes),
        )
        if self._state is None:
            return view
        view = with_state(view, self._state, self._me, self._missing())
        # One that watches is in no epoch, and waits for none once it has the model.
        return replace(view, waits_for=None) if rounds.watches and rounds.stage is Stage.RUNNING else view

    def _losses(self) -> dict[bytes, LossReport]:
        losses = {
            client.p2p_identity: LossReport(step=report.step, loss=report.loss)
            for client, report in self._reports().items()
            if report.loss == report.loss  # not a number: it has not trained yet
        }
        if self._loss is not None:
            losses[self._me.p2p_identity] = self._loss
        return losses


def with_state(view: RunView, state: Coordinator, me: NodeIdentity, missing: int | None) -> RunView:
    """``view``, with what the state of the coordinator says.

    Args:
        view: of a run.
        state: of its coordinator.
        me: the client that looks.
        missing: how many clients have still to come before an epoch can begin; None if that is not known.
    """
    clients = [client.id for client in state.epoch_state.clients]
    step, total_steps = counted_steps(state)
    try:
        lr = effective_learning_rate(state, state.progress.step) if state.run_state in _ROUND else None
    except CoordinatorError:
        lr = None
    return replace(
        view,
        run_state=state.run_state.name,
        epoch=state.progress.epoch,
        step=step,
        total_steps=total_steps,
        height=state.current_round.height,
        num_peers=len(clients),
        clients=tuple(client.p2p_identity for client in clients),
        peer_index=clients.index(me) if me in clients else None,
        waits_for=waits_for(state, me, time.time(), missing),
        lr=lr,
    )


def _members(state: Coordinator) -> set[NodeIdentity]:
    return {client.id for client in state.epoch_state.clients}
