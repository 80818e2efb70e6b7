"""What each client has done in an epoch, as a quorum of witnesses saw it, and the points for it.

Two ways to count, both shown, since they answer different questions:

``equal``  Psyche's rule: a fixed amount per epoch, divided by the number of its clients at the end; each that is
           healthy then gets one share, and what is left over nobody (PsycheFoundation/psyche
           ``architectures/decentralized/solana-coordinator``, ``earning_rate_total_shared``).
``work``   the same amount, in proportion to the samples that a quorum saw.

Who has failed an audit in an epoch has no points for it.

A round's trainers are known when it begins; that they did their work is known two rounds later, when the reports about
it are complete (:mod:`.consensus`). So an :class:`Account` is shown every state of a run, and says at the end of an
epoch what there is to be written down. It is the witnesses' word: who saw the results, not what is in them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Final

from ...errors import CoordinatorError
from ..types import ROUND_PHASES, BatchId, ClientState, Coordinator, NodeIdentity
from .assignment import assign_data
from .consensus import trainer_scores, witness_quorum

__all__ = ["EPOCH_POINTS", "Account", "ClientAccount", "EpochAccount"]

EPOCH_POINTS: Final = 1_000_000
"""That an epoch is worth. Chosen arbitrarily: the ratios of points count."""

MAX_PAST: Final = 1024
"""Identities whose earlier epochs are added up. They cost nothing, so of more those that did least are forgotten."""

_ABOUT: Final = 2
"""Rounds from one to that with which the reports about it are complete."""


@dataclass(frozen=True)
class ClientAccount:
    """What one identity did in an epoch.

    Attributes:
        batches, samples, tokens: of which a quorum saw a result.
        bytes_served: that came from it to the host, results and models, where the host is a peer that can count them.
            What the other peers got from it nobody but they knows.
        audits_passed, audits_failed: as most of its auditors judged.
        healthy: whether it was in the epoch to its end.
        equal, work: points, by the two ways to count.
    """

    batches: int = 0
    samples: int = 0
    tokens: int = 0
    bytes_served: int = 0
    audits_passed: int = 0
    audits_failed: int = 0
    healthy: bool = False
    equal: int = 0
    work: int = 0


@dataclass(frozen=True)
class EpochAccount:
    """An epoch that is complete.

    Attributes:
        epoch: of the run.
        first_step, last_step: of it, both inside.
        clients: by public key.
    """

    epoch: int
    first_step: int
    last_step: int
    clients: Mapping[bytes, ClientAccount]


class Account:
    """Follows a run. Does no I/O.

    Args:
        received: bytes that have come from each peer so far, by public key; None where nobody counts them.
    """

    def __init__(self, received: Callable[[], Mapping[bytes, int]] | None = None) -> None:
        self._received = received
        self._received_before: Mapping[bytes, int] = {}
        self._epoch: tuple[int, int] | None = None
        self._height = -1
        self._given: dict[int, dict[BatchId, NodeIdentity]] = {}
        self._clients: dict[bytes, ClientAccount] = {}
        self._past: dict[bytes, ClientAccount] = {}

    def see(self, state: Coordinator) -> None:
        """The run is like this now. To be called with every state of a round, in their order."""
        if state.run_state not in ROUND_PHASES:
            return
        epoch = state.progress.epoch, state.epoch_state.start_step
        if epoch != self._epoch:
            self._epoch, self._height, self._given, self._clients = epoch, -1, {}, {}
            if self._received is not None:
                self._received_before = self._received()
        height = state.current_round.height
        if height == self._height:
            return
        self._height = height
        try:
            self._given[height] = assign_data(state)
        except CoordinatorError:
            self._given[height] = {}  # a run with verifiers, whose work nobody has defined
        self._credit(state, self._given.pop(height - _ABOUT, {}))

    def so_far(self, state: Coordinator) -> dict[bytes, ClientAccount]:
        """Sums over all epochs that were seen, the present one as if it ended in this state; for people to look at."""
        present = self._paid(state) if self._goes_on(state) else {}
        return {key: _sum(self._past.get(key), present.get(key)) for key in {**self._past, **present}}

    def audited(self, key: bytes, *, passed: bool) -> None:
        """Most auditors of a client say so."""
        before = self._clients.get(key, ClientAccount())
        if passed:
            self._clients[key] = replace(before, audits_passed=before.audits_passed + 1)
        else:
            self._clients[key] = replace(before, audits_failed=before.audits_failed + 1)

    def end(self, state: Coordinator) -> EpochAccount | None:
        """The epoch is complete; None if nothing of it was seen.

        Args:
            state: the last one of the epoch, in which its clients are listed.
        """
        if self._epoch is None or not self._goes_on(state):
            return None
        paid = self._paid(state)
        account = EpochAccount(*self._epoch, max(self._epoch[1], state.progress.step - 1), paid)
        self._epoch = None
        for key, one in paid.items():
            self._past[key] = _sum(self._past.get(key), one)
        if len(self._past) > MAX_PAST:
            most = sorted(self._past, key=lambda key: -self._past[key].samples)
            self._past = {key: self._past[key] for key in most[:MAX_PAST]}
        return account

    def _goes_on(self, state: Coordinator) -> bool:
        """Whether the epoch that is followed is that of a state."""
        return self._epoch == (state.progress.epoch, state.epoch_state.start_step)

    def _paid(self, state: Coordinator) -> dict[bytes, ClientAccount]:
        """The epoch's accounts with their points, if it ends in this state."""
        clients = dict(self._clients)
        members = state.epoch_state.clients
        for client in members:
            before = clients.get(client.id.signer, ClientAccount())
            clients[client.id.signer] = replace(before, healthy=client.state is ClientState.HEALTHY)
        received = self._received() if self._received is not None else {}
        for key in clients.keys() & received.keys():
            came = max(0, received[key] - self._received_before.get(key, 0))
            clients[key] = replace(clients[key], bytes_served=came)
        share = EPOCH_POINTS // len(members) if members else 0
        worked = sum(one.samples for one in clients.values() if not one.audits_failed)
        return {
            key: replace(
                one,
                equal=share if one.healthy and not one.audits_failed else 0,
                work=EPOCH_POINTS * one.samples // worked if worked and not one.audits_failed else 0,
            )
            for key, one in clients.items()
        }

    def _credit(self, state: Coordinator, given: Mapping[BatchId, NodeIdentity]) -> None:
        """Those of whom the reports of the previous round say that they trained what they were given before it."""
        previous = state.previous_round
        if previous is None or not previous.witnesses:
            return
        quorum = witness_quorum(state.config.witness_nodes, len(previous.witnesses))
        scores = trainer_scores(given.values(), previous.witnesses)
        for (batch, owner), score in zip(given.items(), scores, strict=True):
            if score >= quorum:
                before = self._clients.get(owner.signer, ClientAccount())
                self._clients[owner.signer] = replace(
                    before,
                    batches=before.batches + 1,
                    samples=before.samples + len(batch),
                    tokens=before.tokens + len(batch) * state.model.max_seq_len,
                )


_SUMMED: Final = tuple(field.name for field in fields(ClientAccount) if field.name != "healthy")


def _sum(before: ClientAccount | None, one: ClientAccount | None) -> ClientAccount:
    """Of two epochs; ``healthy`` is that of the later one."""
    first, second = before or ClientAccount(), one or ClientAccount()
    sums = {name: getattr(first, name) + getattr(second, name) for name in _SUMMED}
    return ClientAccount(**sums, healthy=second.healthy)
