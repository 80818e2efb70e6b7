"""Who may talk to us, and which messages are taken: the checks of a message, the cheapest first. No I/O.

A message about the round that comes next is kept until it can be checked. Rules: PsycheFoundation/psyche,
``shared/client/src/client.rs`` and ``state/steps.rs``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from ...comm.tickets import BlobFormat
from ...coordinator.types import Committee, NodeIdentity
from ...errors import CoordinatorError
from ...verify.commitment import finished_hash
from .actions import AllowPeers, DropReason, Outbox
from .broadcasts import Broadcast, Finished, TrainingResult
from .reading import Reader
from .round_state import MAX_CLAIMS, MAX_SPARE_CLAIMS, Claim, RoundState

__all__ = ["MAX_EARLY_PER_SENDER", "EarlyMessages", "NotAdmitted", "Peers", "check_broadcast", "check_commitment"]

MAX_EARLY_PER_SENDER: Final = 4
"""Messages kept that are about the next round, of which the coordinator has not told us yet. An honest peer sends two
at most, its result and "finished"; chosen arbitrarily above that."""


class NotAdmitted(Exception):
    """A message is not taken. An answer rather than an error: it never leaves this folder.

    Attributes:
        reason: why.
    """

    def __init__(self, reason: DropReason, detail: str = "") -> None:
        super().__init__(detail or reason.value)
        self.reason = reason
        self.detail = detail


class Peers:
    """The clients whose messages count now.

    Args:
        me: our own identity.
        outbox: told when the peers change.

    Attributes:
        keys: public keys of all peers, in the order in which they were allowed; the same object while it is the same.
    """

    def __init__(self, me: NodeIdentity, outbox: Outbox) -> None:
        self._me = me
        self._outbox = outbox
        self.keys: tuple[bytes, ...] = ()
        self._others: dict[bytes, NodeIdentity] = {}
        self._of_our_kind: frozenset[bytes] = frozenset()
        self._allowed: frozenset[bytes] = frozenset()

    def allow(self, clients: Iterable[NodeIdentity]) -> None:
        """From now on these are the peers. We may be among them; clients that occur twice do not matter."""
        own_key = self._me.p2p_identity
        self._others = {client.p2p_identity: client for client in clients if client.p2p_identity != own_key}
        keys = tuple(self._others)
        if keys != self.keys:
            self.keys = keys
        allowed = frozenset(self._others)
        self._of_our_kind &= allowed
        if allowed != self._allowed:
            self._allowed = allowed
            self._outbox.put(AllowPeers(allowed))

    def note_our_kind(self, key: bytes) -> None:
        """The peer with this public key has said something that no client of Psyche's says."""
        if key in self._others and key not in self._of_our_kind:
            self._of_our_kind |= {key}

    def is_of_our_kind(self, key: bytes) -> bool:
        """Whether it has."""
        return key in self._of_our_kind

    def find(self, key: bytes) -> NodeIdentity | None:
        """The peer with this public key; None if there is none, or if the key is ours."""
        return self._others.get(key)


class EarlyMessages:
    """Messages about the round that comes next: gossip can be faster than the coordinator."""

    def __init__(self) -> None:
        self._held: dict[bytes, list[Broadcast]] = {}

    def hold(self, sender: NodeIdentity, broadcast: Broadcast) -> None:
        """Keeps a message.

        Raises:
            NotAdmitted: it is kept already, or there are too many of its sender.
        """
        held = self._held.setdefault(sender.p2p_identity, [])
        if any(replace(kept, nonce=broadcast.nonce) == broadcast for kept in held):
            raise NotAdmitted(DropReason.DUPLICATE)  # repetitions must not take the place of what is new
        if len(held) >= MAX_EARLY_PER_SENDER:
            raise NotAdmitted(DropReason.TOO_MANY, "more about the next round")
        held.append(broadcast)

    def take(self) -> list[tuple[bytes, Broadcast]]:
        """All messages with the public keys of their senders; nothing is kept."""
        held, self._held = self._held, {}
        return [(sender, broadcast) for sender, broadcasts in held.items() for broadcast in broadcasts]

    def clear(self) -> None:
        """Forgets everything."""
        self._held.clear()


def check_commitment(broadcast: Broadcast, sender: NodeIdentity, reader: Reader | None) -> None:
    """Checks that the commitment is the sender's, and that a "finished" commits to its own root.

    Args:
        reader: checks the commitment's own signature, as Psyche's clients do; None where the message's is enough. That
            one is by the same key, over all of the message, and nobody is shown a commitment without it.

    Raises:
        NotAdmitted: it does not.
    """
    commitment, data = broadcast.commitment, broadcast.data
    if isinstance(data, Finished) and commitment.data_hash != finished_hash(data.broadcast_merkle.inner):
        raise NotAdmitted(DropReason.WRONG_HASH, "the commitment is not to the root")
    if reader is not None and not reader.is_signed_by(sender.p2p_identity, commitment.data_hash, commitment.signature):
        raise NotAdmitted(DropReason.BAD_SIGNATURE)


def check_broadcast(
    broadcast: Broadcast, sender: NodeIdentity, round_: RoundState, reader: Reader | None
) -> Claim | None:
    """Checks that ``sender`` may say this about ``round_``, to which the step belongs.

    Args:
        reader: see :func:`check_commitment`.

    Returns:
        what it claims, if it announces a result.

    Raises:
        NotAdmitted: it may not.
    """
    proof = broadcast.proof
    client = round_.clients[proof.index] if proof.index < len(round_.clients) else None
    if client is not sender and client != sender:
        raise NotAdmitted(DropReason.WRONG_PROOF, f"it is not at index {proof.index} of the round")
    try:
        if not round_.selection.holds(proof) or proof.committee is not Committee.TRAINER:
            true_proof = round_.selection.get_committee(proof.index)
            raise NotAdmitted(DropReason.WRONG_PROOF, f"it is {true_proof.committee.name} at {true_proof.position}")
    except CoordinatorError as error:
        raise NotAdmitted(DropReason.WRONG_PROOF, str(error)) from error
    claim, data = None, broadcast.data
    if isinstance(data, TrainingResult):
        claim = Claim(sender, round_.as_assigned(data.batch_id, sender), broadcast.commitment, data.ticket)
        _check_result(claim, round_)
    elif data.warmup:
        raise NotAdmitted(DropReason.WRONG_STEP, "the warm-up is over")
    elif sender in round_.finished:
        raise NotAdmitted(DropReason.DUPLICATE)
    check_commitment(broadcast, sender, reader)
    return claim


def _check_result(claim: Claim, round_: RoundState) -> None:
    batch, ticket = claim.batch, claim.ticket
    if round_.assignments.get(batch) != claim.sender:
        raise NotAdmitted(DropReason.NOT_ASSIGNED, f"{batch} is not its batch")
    if ticket.format is not BlobFormat.RAW:
        raise NotAdmitted(DropReason.NOT_A_BLOB)
    # Psyche takes no blob twice in a round: a peer that announces another's blob first, as its own, silences the other.
    if any(other.ticket.hash == ticket.hash for other in round_.claims.get(batch, ())):
        raise NotAdmitted(DropReason.DUPLICATE)
    if not round_.has_room_for(claim):
        raise NotAdmitted(DropReason.TOO_MANY, f"{MAX_CLAIMS + MAX_SPARE_CLAIMS} results for {batch} already")
