"""Who trains and who witnesses in a round: a shuffle that everyone computes alike from the round's seed.

Rules: PsycheFoundation/psyche, ``shared/coordinator/src/committee_selection.rs`` and ``shared/core/src/swap_or_not.rs``
(the swap-or-not shuffle of Hoang, Morris and Rogaway, 2012, with 90 rounds as in Ethereum's consensus layer).

A client's place in the list of clients is shuffled twice, once for each role, with different salts; the position that
comes out says which role it has. Because one position can be computed without the others, a proof is only a claim
that anyone can recompute. :func:`shuffled_index` is that computation as written down; :func:`shuffled_indices` does it
for a whole list in one pass.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ...errors import CoordinatorError, CoordinatorErrorCode
from ..types import MAX_NUM_WITNESSES, Client, Committee, CommitteeProof, Coordinator, NodeIdentity, Round, WitnessProof
from .probation import on_probation

__all__ = ["CommitteeSelection", "shuffled_index", "shuffled_indices"]

SHUFFLE_ROUNDS: Final = 90
_NUMBERS: Final = tuple(bytes([number]) for number in range(SHUFFLE_ROUNDS))
COMMITTEE_SALT: Final = b"committee"
WITNESS_SALT: Final = b"witness"

MAX_PERCENT: Final = 100

_U64_MAX: Final = 2**64 - 1
_PLACES_PER_HASH: Final = 256
"""One hash decides for 256 places of the list."""

_MAX_COMPOSED: Final = 1024
"""Up to so many places the rounds of a shuffle are worked out all at once: a table of them fits into the cache."""

_MAX_TABLE: Final = 1 << 16
"""A round's client count is a u16, so every real list lies below and is shuffled whole; beyond, place by place."""


def shuffled_index(index: int, count: int, seed: bytes) -> int:
    """Where place ``index`` of a list of ``count`` ends up.

    Raises:
        CoordinatorError: the index is not in the list.
    """
    if not 0 <= index < count:
        raise CoordinatorError(CoordinatorErrorCode.INVALID_COMMITTEE_SELECTION, f"index {index} of {count} clients")
    for round_number in range(SHUFFLE_ROUNDS):
        prefix = seed + bytes([round_number])
        pivot = _pivot(prefix, count)
        flip = (pivot + count - index) % count
        place = max(index, flip)
        bits = _decisions(prefix, place // _PLACES_PER_HASH)
        place %= _PLACES_PER_HASH
        if bits[place // 8] >> (place % 8) & 1:
            index = flip
    return index


def shuffled_indices(count: int, seed: bytes) -> NDArray[np.int64]:
    """``(count,) int64``: :func:`shuffled_index` of every place."""
    places = np.arange(count, dtype=np.int64)
    if not count:
        return places
    sha256, blocks = hashlib.sha256, -(-count // _PLACES_PER_HASH)
    # One hash after the other, with nothing in between that could have been done before: they are most of the time.
    pivots = [int.from_bytes(sha256(seed + number).digest()[:8], "little") % count for number in _NUMBERS]
    source = b"".join([sha256(seed + suffix).digest() for suffix in _suffixes(blocks)])
    bits = np.unpackbits(np.frombuffer(source, dtype=np.uint8), bitorder="little").view(np.bool_)
    decisions = bits.reshape(SHUFFLE_ROUNDS, -1)
    column = np.array(pivots, dtype=np.int64)[:, None]
    if count <= _MAX_COMPOSED:
        return _composed(_swapped(places, column, decisions, count))
    for number in range(SHUFFLE_ROUNDS):
        one = slice(number, number + 1)
        places = _swapped(places, column[one], decisions[one], count)[0]
    return places


def _swapped(
    places: NDArray[np.int64], pivots: NDArray[np.int64], decisions: NDArray[np.bool_], count: int
) -> NDArray[np.int64]:
    """``(rounds, count)``: where each of these rounds by itself puts every one of ``places``."""
    flips = (pivots - places) % count
    return np.where(np.take_along_axis(decisions, np.maximum(places, flips), axis=1), flips, places)


def _composed(rounds: NDArray[np.int64]) -> NDArray[np.int64]:
    """``(count,)``: where all rounds put every place, one after the other. Two by two: each step in numpy costs more
    than the few places of a list."""
    while len(rounds) > 1:
        pairs = len(rounds) // 2
        first_of_second = np.arange(1, 2 * pairs, 2)[:, None] * rounds.shape[1]
        joined = rounds.take(rounds[: 2 * pairs : 2] + first_of_second)
        rounds = np.concatenate([joined, rounds[2 * pairs :]])
    composed: NDArray[np.int64] = rounds[0]
    return composed


def _pivot(prefix: bytes, count: int) -> int:
    return int.from_bytes(hashlib.sha256(prefix).digest()[:8], "little") % count


def _decisions(prefix: bytes, block: int) -> bytes:
    return hashlib.sha256(prefix + (block & 0xFFFF_FFFF).to_bytes(4, "little")).digest()


@lru_cache(maxsize=4)  # a run has one number of clients, or a few
def _suffixes(blocks: int) -> tuple[bytes, ...]:
    """What follows the seed in the hashes that decide, in the order of rounds and blocks."""
    return tuple(number + block.to_bytes(4, "little") for number in _NUMBERS for block in range(blocks))


def _hashed(random_seed: int) -> bytes:
    return hashlib.sha256(random_seed.to_bytes(8, "little")).digest()


@lru_cache(maxsize=32)  # as below; every message of a round asks for it
def _salted(random_seed: int, salt: bytes) -> bytes:
    return hashlib.sha256(_hashed(random_seed) + salt).digest()


@lru_cache(maxsize=32)  # two salts for each of the few rounds that are asked about
def _table(count: int, seed: bytes) -> tuple[int, ...]:
    return tuple(shuffled_indices(count, seed).tolist())


@lru_cache(maxsize=32)
def _with_newcomers_last(count: int, seed: bytes, newcomers: frozenset[int]) -> tuple[int, ...]:
    """Where each place ends up if all ``newcomers`` stand behind the others, both in the order of the shuffle."""
    table = _table(count, seed)
    order = sorted(range(count), key=lambda place: (place in newcomers, table[place]))
    positions = [0] * count
    for position, place in enumerate(order):
        positions[place] = position
    return tuple(positions)


@dataclass(frozen=True)
class CommitteeSelection:
    """The roles of one round.

    Args:
        tie_breaker_nodes: how many tie breakers; always 0 in practice.
        witness_nodes: how many witnesses; 0 means everybody, up to 32.
        verification_percent: share of the others that verify, 0 to 100. Psyche never finished verifiers; a run has 0.
        total_nodes: clients at the start of the round.
        random_seed: the round's seed, 64 bits.
        newcomers: places of clients on probation, which do not witness; none in a run of Psyche's.

    Raises:
        CoordinatorError: INVALID_COMMITTEE_SELECTION, the numbers contradict each other.
    """

    tie_breaker_nodes: int
    witness_nodes: int
    verification_percent: int
    total_nodes: int
    random_seed: int
    newcomers: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        problem = None
        if not 0 <= self.total_nodes < _U64_MAX:
            problem = f"{self.total_nodes} clients are too many"
        elif self.total_nodes < self.tie_breaker_nodes:
            problem = f"{self.tie_breaker_nodes} tie breakers of {self.total_nodes} clients"
        elif self.total_nodes < self.witness_nodes:
            problem = f"{self.witness_nodes} witnesses of {self.total_nodes} clients"
        elif not 0 <= self.verification_percent <= MAX_PERCENT:
            problem = f"{self.verification_percent} percent verifiers"
        if problem:
            raise CoordinatorError(CoordinatorErrorCode.INVALID_COMMITTEE_SELECTION, problem)

    @classmethod
    def for_round(cls, state: Coordinator, round_: Round | None) -> CommitteeSelection:
        """The roles of a round of ``state``.

        Raises:
            CoordinatorError: NO_ACTIVE_ROUND without a round, or INVALID_COMMITTEE_SELECTION.
        """
        if round_ is None:
            raise CoordinatorError(CoordinatorErrorCode.NO_ACTIVE_ROUND, "there is no such round", state.run_state)
        return cls(
            round_.tie_breaker_tasks,
            state.config.witness_nodes,
            state.config.verification_percent,
            round_.clients_len,
            round_.random_seed,
            # The list says who is on probation in the present round; who was in an earlier one is not asked any more.
            on_probation(state) if round_ is state.current_round else frozenset(),
        )

    @property
    def seed(self) -> bytes:
        """SHA-256 of the round's seed, 32 bytes."""
        return _hashed(self.random_seed)

    @property
    def verifier_nodes(self) -> int:
        """How many clients verify."""
        return (self.total_nodes - self.tie_breaker_nodes) * self.verification_percent // MAX_PERCENT

    @property
    def trainer_nodes(self) -> int:
        """How many clients train."""
        return self.total_nodes - self.tie_breaker_nodes - self.verifier_nodes

    def committee_at(self, position: int) -> Committee:
        """The committee of a shuffled position."""
        if position < self.tie_breaker_nodes:
            return Committee.TIE_BREAKER
        if position < self.tie_breaker_nodes + self.verifier_nodes:
            return Committee.VERIFIER
        return Committee.TRAINER

    def committee_of(self, index: int) -> Committee:
        """The committee of client ``index``.

        Raises:
            CoordinatorError: INVALID_COMMITTEE_SELECTION, no client has this index.
        """
        return self.committee_at(self._position(index, COMMITTEE_SALT))

    @property
    def regular_nodes(self) -> int:
        """How many clients are not on probation."""
        return self.total_nodes - len(self.newcomers)

    def is_witness_at(self, position: int) -> bool:
        """Whether a shuffled position witnesses."""
        elected = self.witness_nodes or MAX_NUM_WITNESSES
        return position < (min(elected, self.regular_nodes) if self.newcomers else elected)

    def get_committee(self, index: int) -> CommitteeProof:
        """The role of client ``index`` with its proof.

        Raises:
            CoordinatorError: INVALID_COMMITTEE_SELECTION, no client has this index.
        """
        position = self._position(index, COMMITTEE_SALT)
        return CommitteeProof(committee=self.committee_at(position), position=position, index=index)

    def get_witness(self, index: int) -> WitnessProof:
        """Whether client ``index`` witnesses, with its proof.

        Raises:
            CoordinatorError: INVALID_COMMITTEE_SELECTION, no client has this index.
        """
        position = self._position(index, WITNESS_SALT)
        if self.newcomers:
            position = _with_newcomers_last(self.total_nodes, self._seed_of(WITNESS_SALT), self.newcomers)[index]
        return WitnessProof(position=position, index=index, witness=self.is_witness_at(position))

    def holds(self, proof: CommitteeProof) -> bool:
        """Whether the role is the one of its index, as :meth:`get_committee` says; every message asks.

        Raises:
            CoordinatorError: INVALID_COMMITTEE_SELECTION, no client has this index.
        """
        position = self._position(proof.index, COMMITTEE_SALT)
        return proof.position == position and proof.committee is self.committee_at(position)

    def verify_committee(self, client: NodeIdentity, proof: CommitteeProof, clients: tuple[Client, ...]) -> bool:
        """Whether ``client`` is at the claimed index of ``clients`` and has the claimed role."""
        return self._is_at(client, proof.index, clients) and proof == self.get_committee(proof.index)

    def verify_witness(self, client: NodeIdentity, proof: WitnessProof, clients: tuple[Client, ...]) -> bool:
        """Whether ``client`` is at the claimed index of ``clients`` and its claim to witness, or not to, is true."""
        return self._is_at(client, proof.index, clients) and proof == self.get_witness(proof.index)

    def _is_at(self, client: NodeIdentity, index: int, clients: tuple[Client, ...]) -> bool:
        return index < min(len(clients), self.total_nodes) and clients[index].id == client

    def _seed_of(self, salt: bytes) -> bytes:
        return _salted(self.random_seed, salt)

    def _position(self, index: int, salt: bytes) -> int:
        seed = self._seed_of(salt)
        if 0 <= index < self.total_nodes <= _MAX_TABLE:
            return _table(self.total_nodes, seed)[index]
        return shuffled_index(index, self.total_nodes, seed)
