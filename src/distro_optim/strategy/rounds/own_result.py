"""Our own result, from the end of its training until it is announced. No I/O.

Encoding a result takes milliseconds, for which a round need not wait; and a result is wanted only in the round after
the next, so it need not be on the line before the reports that end its own round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from blake3 import blake3

from ...comm.addresses import EndpointAddr
from ...comm.tickets import BlobTicket
from ...compress import CompressedUpdate, TilePlan
from ...coordinator.rules.steps import is_prompt
from ...coordinator.types import BatchId, NodeIdentity, RunState
from ...errors import ProtocolError
from .actions import DropReason, Outbox, PublishResult, StoreBlob
from .announcer import Announcer
from .broadcasts import TrainingResult
from .moment import Moment
from .results import EncodedResult, encode_own_result
from .round_state import Claim, ClaimState, RoundState
from .weights import WeightsWatch

__all__ = ["MAX_HOLD_SECONDS", "OwnResult"]

MAX_HOLD_SECONDS: Final = 0.5
"""A result goes out when the round is over, so that it is not on the line before the reports that end the round; it is
wanted only in the round after the next. Where others still train, it does not wait longer than this. Chosen
arbitrarily above a round trip."""

_U32: Final = 0xFFFF_FFFF


@dataclass
class _Unpublished:
    """A result that was trained and has not gone out yet.

    Attributes:
        round: in which it was trained.
        batch: on which.
        own: what the trainer wants back with the next round.
        nonce: how often we had trained before.
        plan: of the model, on which peers read it.
        encoded: what :meth:`OwnResult.encoding` gave, if that has come.
        held_until: when it goes out even if its round is not over; None while it is being encoded.
    """

    round: RoundState
    batch: BatchId
    update: CompressedUpdate
    own: object
    nonce: int
    plan: TilePlan
    encoded: EncodedResult | None = None
    held_until: float | None = None

    def encode(self) -> EncodedResult:
        """What is to be sent.

        Raises:
            ProtocolError: no peer could use it.
        """
        return encode_own_result(
            self.update, step=self.round.step, trainer_nonce=self.nonce, batch=self.batch, plan=self.plan
        )

    def is_encoded_by(self, encoded: EncodedResult) -> bool:
        """Whether ``encoded`` is of this result."""
        return (encoded.step, encoded.result.trainer_nonce) == (self.round.step, self.nonce)


class OwnResult:
    """Holds at most one result, and publishes it.

    Args:
        me: our own identity.
        address: where peers can fetch blobs that we offer.
        announcer: announces it.
        watch: with wrong weights nothing is published.
        outbox: where what is to be done goes.

    Attributes:
        address: as above; it may change during a run.
    """

    def __init__(
        self, me: NodeIdentity, address: EndpointAddr, announcer: Announcer, watch: WeightsWatch, outbox: Outbox
    ) -> None:
        self.address = address
        self._me = me
        self._announcer = announcer
        self._watch = watch
        self._outbox = outbox
        self._nonce = 0
        self._unpublished: _Unpublished | None = None

    # -- from training to publishing -----------------------------------------------------------------------------------

    def restart(self) -> None:
        """The model was loaded: its trainer has never trained."""
        self._nonce = 0

    def count_training(self) -> int:
        """The trainer has answered; returns how often it had answered before."""
        nonce, self._nonce = self._nonce, (self._nonce + 1) & _U32
        return nonce

    def add(
        self, round_: RoundState, batch: BatchId, update: CompressedUpdate, own: object, nonce: int, plan: TilePlan
    ) -> None:
        """A result was trained. Asks for :meth:`publish_or_hold`, before which it may be encoded in another thread."""
        self._unpublished = _Unpublished(round_, batch, update, own, nonce, plan)
        self._outbox.put(PublishResult(round_.step))

    def encoding(self) -> Callable[[], EncodedResult] | None:
        """What is to be computed before it goes out, in any thread; None if there is no result.

        The function raises ProtocolError if the result is of no use to any peer.
        """
        pending = self._unpublished
        return pending.encode if pending is not None else None

    def is_unpublished(self, round_: RoundState) -> bool:
        """Whether the result of ``round_`` is still here."""
        return self._unpublished is not None and self._unpublished.round is round_

    # -- publishing ----------------------------------------------------------------------------------------------------

    @property
    def held_until(self) -> float | None:
        """When :meth:`publish_due` has something to do, in monotonic seconds; None if never."""
        return self._unpublished.held_until if self._unpublished is not None else None

    def publish_or_hold(self, at: Moment, current: RoundState | None, encoded: EncodedResult | None) -> bool:
        """Publishes what there is, or holds it if ``current``, its round, is still being trained; returns whether held.

        Only a run whose rounds end with their last report has a reason to hold results. Who is on probation reports
        when its result is on its way.
        """
        pending = self._unpublished
        holds = is_prompt(at.state) and at.is_in(RunState.ROUND_TRAIN)
        if pending is not None and pending.round is current and holds and not pending.round.is_newcomer:
            pending.encoded, pending.held_until = encoded, at.now + MAX_HOLD_SECONDS
            return True
        self.publish(at.now, encoded)
        return False

    def publish_due(self, now: float) -> None:
        """Publishes what was held long enough."""
        if self.held_until is not None and self.held_until <= now:
            self.publish(now)

    def publish_before_next_round(self, at: Moment, current: RoundState | None) -> None:
        """The coordinator goes on from the phase of ``at``: what was trained goes out now, or as soon as it can."""
        pending = self._unpublished
        if pending is None:
            return
        is_encoding = pending.held_until is None and pending.round is current
        if is_prompt(at.state) and is_encoding and self._watch.fault is None:
            pending.round.own = pending.own  # the next round need not wait until it is encoded
        else:
            self.publish(at.now)

    def publish(self, now: float, encoded: EncodedResult | None = None) -> None:
        """Publishes what there is.

        Args:
            now: monotonic time in seconds.
            encoded: what :meth:`encoding` gave, if it was computed in advance.
        """
        pending, self._unpublished = self._unpublished, None
        if pending is None or self._watch.fault is not None:
            return
        encoded = encoded if encoded is not None else pending.encoded
        try:
            # What was encoded in advance may be of an earlier round: then it was published when that round ended.
            if encoded is None or not pending.is_encoded_by(encoded):
                encoded = pending.encode()
            self._announce(pending, encoded, now)
        except ProtocolError as error:
            self._outbox.drop(self._me.p2p_identity, DropReason.INVALID_RESULT, str(error))

    def _announce(self, pending: _Unpublished, encoded: EncodedResult, now: float) -> None:
        round_, blob, data_hash = pending.round, encoded.blob, encoded.data_hash
        round_.own = pending.own
        ticket = BlobTicket.raw(self.address, blake3(blob).digest())
        self._outbox.put(StoreBlob(data=blob, tag=f"distro-result_{round_.step}"))
        result = TrainingResult(pending.batch, ticket)
        commitment = self._announcer.say(round_.step, round_.committee_proof, data_hash, result, now, blob=blob)
        claim = Claim(self._me, pending.batch, commitment, ticket)
        round_.add(claim)
        round_.broadcasts.append(data_hash)
        round_.settle(claim, ClaimState.VALID, encoded.result)
