"""Which messages the twin takes: ``apply_message``, and what its caller checks. No I/O.

PsycheFoundation/psyche, ``shared/client/src/{client,state/steps}.rs``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...comm import postcard
from ...comm.announcements import Announcement
from ...comm.signing import is_signed_by
from ...coordinator.types import Committee, Coordinator, NodeIdentity
from ...errors import ProtocolError
from ...strategy.rounds.actions import DropReason
from ...strategy.rounds.broadcasts import Broadcast, Finished, TrainingResult
from .rounds import Announced, TwinRound

__all__ = ["NotTaken", "take"]


class NotTaken(Exception):
    """A message that Psyche's client calls invalid or ignores. An answer rather than an error.

    Attributes:
        reason: that ours would give.
    """

    def __init__(self, reason: DropReason) -> None:
        super().__init__(reason.value)
        self.reason = reason


def take(
    announcement: Announcement,
    *,
    state: Coordinator,
    lookup: Mapping[bytes, NodeIdentity],
    rounds: Sequence[TwinRound],
) -> tuple[TwinRound, Announced | None]:
    """Puts a message into the round that it is about; returns that, and the result that it announces, if it does.

    Args:
        announcement: of a peer.
        state: of the run.
        lookup: those who count, by public key.
        rounds: the present one, and the one before.

    Raises:
        NotTaken: says why.
    """
    try:
        broadcast: Broadcast = postcard.decode(Broadcast, announcement.data)
    except ProtocolError:
        raise NotTaken(DropReason.MALFORMED) from None
    sender = lookup.get(announcement.sender)
    data_hash = broadcast.commitment.data_hash
    if sender is None:
        raise NotTaken(DropReason.UNKNOWN_SENDER)
    if not is_signed_by(announcement.sender, data_hash, broadcast.commitment.signature):
        raise NotTaken(DropReason.BAD_SIGNATURE)
    round_ = next((each for each in rounds if each.step == broadcast.step), None)
    if round_ is None:
        raise NotTaken(DropReason.WRONG_STEP)
    _check_role(broadcast, sender, round_, state)
    announced = _put(broadcast, sender, round_)
    round_.broadcasts.append(data_hash)
    return round_, announced


def _check_role(broadcast: Broadcast, sender: NodeIdentity, round_: TwinRound, state: Coordinator) -> None:
    clients = state.epoch_state.clients
    if isinstance(broadcast.data, Finished) and broadcast.data.warmup:
        if sender not in [client.id for client in clients]:
            raise NotTaken(DropReason.UNKNOWN_SENDER)
    elif round_.selection is None:
        raise NotTaken(DropReason.NOT_RUNNING)
    elif (
        not round_.selection.verify_committee(sender, broadcast.proof, clients)
        or broadcast.proof.committee is not Committee.TRAINER
    ):
        raise NotTaken(DropReason.WRONG_PROOF)


def _put(broadcast: Broadcast, sender: NodeIdentity, round_: TwinRound) -> Announced | None:
    match broadcast.data:
        case TrainingResult(batch, ticket):
            if round_.of_blob(ticket.hash) is not None:
                raise NotTaken(DropReason.DUPLICATE)
            if round_.assignments.get(batch) != sender:
                raise NotTaken(DropReason.NOT_ASSIGNED)
            announced = Announced(sender, broadcast.commitment, ticket)
            round_.results.setdefault(batch, []).append(announced)
            return announced
        case Finished():
            if sender in round_.finished:
                raise NotTaken(DropReason.DUPLICATE)
            round_.finished.add(sender)
    return None
