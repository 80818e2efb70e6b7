"""Clients on probation: who has not finished a round yet is not waited for, has small work, and is in no quorum.

Identities cost nothing. In a run of our own kind a client is on probation until a quorum has seen results of it; which
clients that are, the coordinator decides (:mod:`..server.probation`) and says in its list of clients, so that all
compute the same from it:

- the round's data go to the others, but for a pair of sequences for some on probation (:func:`newcomers_share`);
- nobody on probation is elected as a witness, so none is in a quorum. They say when they have finished in a report that
  counts nothing (:func:`newcomers_report`), for which the coordinator may hold a round for a little while;
- in warm-up the others wait for them only as long as the coordinator says.

While nobody in the list has finished a round, nobody is on probation. In a run of Psyche's nobody ever is.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Final

from ..types import ON_PROBATION, Client, ClientState, Coordinator, MerkleRoot, NodeIdentity, Witness, WitnessProof
from .checkpoints import is_run_of_psyche

__all__ = [
    "NEWCOMERS_EACH",
    "NEWCOMERS_PART",
    "NOBODY",
    "Probation",
    "has_probation",
    "marked",
    "newcomers_report",
    "newcomers_share",
    "on_probation",
    "regular_clients",
]

NEWCOMERS_PART: Final = 8
"""One in so many sequences of a round is for clients on probation, since it is lost if they do nothing. Rounds of fewer
than twice as many have one client's, and those of fewer still only in some rounds. Chosen arbitrarily."""

NEWCOMERS_EACH: Final = 2
"""Sequences for each of them; a norm over the samples of a batch does not train with one. One, in rounds of fewer than
four."""


@dataclass(frozen=True)
class Probation:
    """What a coordinator decides about who is waited for.

    Attributes:
        newcomers: clients on probation from the next round or epoch on.
        late: clients for which the present round does not wait any longer.
        is_over: whether the warm-up does not wait any longer for those on probation.
        holds: whether the present round still waits for one of them, although all others have reported.
    """

    newcomers: frozenset[NodeIdentity] = frozenset()
    late: frozenset[NodeIdentity] = frozenset()
    is_over: bool = False
    holds: bool = False


NOBODY: Final = Probation()
"""Nobody is on probation: all are waited for."""


def has_probation(state: Coordinator) -> bool:
    """Whether clients of this run can be on probation: a prompt run whose weights only its peers have."""
    return state.config.round_witness_time == 0 and not is_run_of_psyche(state)


def on_probation(state: Coordinator) -> frozenset[int]:
    """The places in the list of clients of those on probation."""
    if not has_probation(state):
        return frozenset()
    places = [place for place, client in enumerate(state.epoch_state.clients) if client.exited_height == ON_PROBATION]
    return frozenset(places) if len(places) < len(state.epoch_state.clients) else frozenset()


def regular_clients(state: Coordinator) -> frozenset[NodeIdentity]:
    """Those of the list that are not on probation, whether they have left meanwhile or not."""
    newcomers = on_probation(state)
    return frozenset(client.id for place, client in enumerate(state.epoch_state.clients) if place not in newcomers)


def newcomers_share(total: int, newcomers: int, seed: int) -> tuple[int, int]:
    """How many of so many clients on probation have work in a round, and how many sequences each of them.

    Args:
        total: sequences of the round.
        newcomers: on probation.
        seed: of the round.
    """
    if total < 2 * NEWCOMERS_EACH:
        count, each = int(total > 1 or (total == 1 and seed % NEWCOMERS_PART == 0)), 1
    else:
        each = NEWCOMERS_EACH
        count = total // (NEWCOMERS_PART * each) or int(seed % NEWCOMERS_PART < total)
    return min(newcomers, count), each


def newcomers_report(proof: WitnessProof, seed: bytes) -> Witness:
    """What a client on probation sends instead of a witness's report when it has finished a round.

    It says nothing about others, and no state ever holds it. In place of the root it has the hash of the round's seed,
    so that one of an earlier round is not taken for one of this.

    Args:
        proof: that it is no witness in this round.
        seed: SHA-256 of the round's seed, 32 bytes.
    """
    return Witness(proof, broadcast_merkle=MerkleRoot(seed))


def marked(clients: Collection[Client], newcomers: Collection[NodeIdentity]) -> tuple[Client, ...]:
    """``clients`` with those of ``newcomers`` that have not left on probation, and no others."""
    return tuple(
        replace(client, exited_height=ON_PROBATION if client.id in newcomers else 0)
        if client.state is ClientState.HEALTHY and (client.exited_height == ON_PROBATION) != (client.id in newcomers)
        else client
        for client in clients
    )
