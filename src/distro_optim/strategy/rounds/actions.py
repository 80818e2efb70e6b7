"""What :class:`~distro_optim.strategy.rounds.rounds.Rounds` wants done: plain data, carried out by others. No I/O.

The actions under "trainer" change the model. They are carried out one after the other, in the order in which they came
out; what comes out because of an answer is done after everything that came out before. Only :class:`CancelTraining`
overtakes others, to reach the training that it stops. Everything else may happen at once.
"""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from ...comm.model_exchange import Patience
from ...comm.tickets import BlobTicket
from ...compress import CompressedUpdate
from ...coordinator.messages import HealthChecks
from ...coordinator.model import Checkpoint
from ...coordinator.types import BatchId, Witness
from ...verify.audit import Challenge
from ...verify.momentum import MomentumCommitment

__all__ = [
    "Action",
    "AllowPeers",
    "Announce",
    "AnnounceWeights",
    "ApplyResults",
    "AuditMomentum",
    "AuditResult",
    "AuditResults",
    "AuditSettled",
    "CancelTraining",
    "DecayWeights",
    "Desynced",
    "DropReason",
    "Dropped",
    "FetchBlob",
    "FinishEpoch",
    "Forget",
    "HashWeights",
    "Initialize",
    "OpenMomentum",
    "Outbox",
    "OwnLink",
    "PrepareAudit",
    "PublishResult",
    "Rejoin",
    "RepairWeights",
    "ResultMissing",
    "RunEnded",
    "SendHealthChecks",
    "SendWarmupWitness",
    "SendWitness",
    "StoreBlob",
    "TrainBatch",
]


# -- trainer -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Initialize:
    """Load the model and begin with an empty optimizer; answer with ``initialized`` or ``initialization_failed``.

    Attributes:
        epoch: to come.
        step: at whose start the weights are wanted.
        checkpoint: where they are.
        providers: public keys of peers to ask where the checkpoint is with the peers, best first. If there are none,
            ours is the model.
        patience: with peers that have nothing to share yet.
    """

    epoch: int
    step: int
    checkpoint: Checkpoint
    providers: tuple[bytes, ...]
    patience: Patience = Patience.LONG


@dataclass(frozen=True, kw_only=True)
class TrainBatch:
    """Train a batch; answer with ``trained`` or ``cancelled``.

    Whether it completes or is cancelled: the lookahead is off afterwards, and weight decay was done exactly once.

    Attributes:
        step: of the coordinator.
        batch: data indices.
        lr: learning rate of the step, the cold start's factor included.
        previous_lr: of the step before, for the lookahead.
        bounds: first and last step of the cold start, if there is one.
        zero_optim: forget the optimizer's memory first.
        own_previous: what ``trained`` was given as ``own`` for the step before; None if nothing was sent then.
        commits: afterwards answer with ``momentum_committed``, too, beside what follows.
    """

    step: int
    batch: BatchId
    lr: float
    previous_lr: float
    bounds: tuple[int, int] | None
    zero_optim: bool
    own_previous: object
    commits: bool = False


@dataclass(frozen=True)
class CancelTraining:
    """The round is over: stop the training of ``step``. Its result is not wanted any more."""

    step: int


@dataclass(frozen=True, kw_only=True)
class CountedResult:
    """A result that counts, for people to look at.

    Attributes:
        owner: public key of the peer that trained it.
        samples: it is of so many.
        bytes: that it has on the wire.
    """

    owner: bytes
    samples: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class ApplyResults:
    """Change the weights by these contributions; an empty list changes nothing.

    Attributes:
        step: whose learning rate counts.
        lr: learning rate.
        bounds: of the cold start.
        updates: in ascending order of their batches, on the model's own plan.
        counted: whose they are, in the same order.
    """

    step: int
    lr: float
    bounds: tuple[int, int] | None
    updates: tuple[CompressedUpdate, ...]
    counted: tuple[CountedResult, ...] = field(default=(), compare=False)


@dataclass(frozen=True, kw_only=True)
class AuditResult:
    """A result that is to be audited.

    Attributes:
        trainer: public key of who sent it.
        batch: that it says it was trained on.
        update: what was sent, on the model's own plan.
    """

    trainer: bytes
    batch: BatchId
    update: CompressedUpdate


@dataclass(frozen=True, kw_only=True)
class AuditResults:
    """Compare results with the gradients of their batches, at the weights as they are now; answer with ``audited`` for
    each. Changes nothing. May be left unanswered: who cannot audit does not.

    Attributes:
        step: of the coordinator, now; when its training is to be stopped, so is this.
        of_step: in which the results were made.
        audited: others' results.
        control: a batch that none of them was trained on: ours, if we had one.
        own: our result on ``control``; None if there is none.
    """

    step: int
    of_step: int
    audited: tuple[AuditResult, ...]
    control: BatchId
    own: CompressedUpdate | None


@dataclass(frozen=True)
class OpenMomentum:
    """We are audited by test 2: answer with ``momentum_opened``. Changes nothing, and computes nothing in the thread
    that trains.

    Attributes:
        step: whose momentum is asked for, before and after it.
        leaves: to open, ascending.
    """

    step: int
    leaves: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class OwnLink:
    """Our own result of a step that is audited, to be audited by ourselves, which tells what honest noise is.

    Attributes:
        batch: it was made of.
        leaves: to compare.
        previous: our result of the step before.
        sent: our result.
    """

    batch: BatchId
    leaves: tuple[int, ...]
    previous: CompressedUpdate
    sent: CompressedUpdate


@dataclass(frozen=True, kw_only=True)
class PrepareAudit:
    """We will audit results of a step by test 2 as soon as what was asked for is here: remember the weights of then.
    Comes before anything is applied in ``step``, two steps later. Changes nothing.

    Attributes:
        step: of the coordinator, now; when its training is to be stopped, so is this.
        of_step: in which the results were made.
        own: answer with ``own_momentum_audited``; None leaves it.
    """

    step: int
    of_step: int
    own: OwnLink | None


@dataclass(frozen=True, kw_only=True)
class AuditMomentum:
    """Compute the momentum that was opened again, at the weights of :class:`PrepareAudit`; answer with
    ``momentum_audited``. Changes nothing. May be left unanswered: who cannot audit does not.

    Attributes:
        step: of the coordinator, now; when its training is to be stopped, so is this.
        of_step: in which the result was made.
        challenge: what was asked.
        opening: what came, as bytes of a stranger.
        batch: that the result is of.
        before, after: what was committed to.
        decays: that the trainer says it keeps its momentum by, one for each parameter group.
        previous, sent: its results of the step before, and of this one.
    """

    step: int
    of_step: int
    challenge: Challenge
    opening: bytes
    batch: BatchId
    before: MomentumCommitment
    after: MomentumCommitment
    decays: tuple[float, ...]
    previous: CompressedUpdate
    sent: CompressedUpdate


@dataclass(frozen=True, kw_only=True)
class DecayWeights:
    """Decay the weights as training would have: the others train this step and we do not.

    Attributes:
        step: of the coordinator.
        lr: learning rate of the step, the cold start's factor included.
        bounds: first and last step of the cold start, if there is one.
        own_previous: as of :class:`TrainBatch`.
    """

    step: int
    lr: float
    bounds: tuple[int, int] | None
    own_previous: object


@dataclass(frozen=True)
class HashWeights:
    """Hash all tensors as they are now; answer with ``weights_hashed``. May be left unanswered."""

    step: int


@dataclass(frozen=True, kw_only=True)
class RepairWeights:
    """Replace the tensors that differ from those of ``providers``; answer with ``weights_repaired``.

    Attributes:
        step: at whose start they differ; its :class:`HashWeights` came before, and nothing has changed since.
        root: over the hashes of all tensors as they should be.
        providers: public keys of peers that have reported this root.
        seconds: that it may take.
    """

    step: int
    root: bytes
    providers: tuple[bytes, ...]
    seconds: float


@dataclass(frozen=True)
class FinishEpoch:
    """Round the weights to what is shared, offer them to joiners, save them.

    Attributes:
        step: the last one whose round took place.
    """

    step: int


# -- peers -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AllowPeers:
    """Listen and talk to these peers only."""

    peers: frozenset[bytes]


@dataclass(frozen=True)
class PublishResult:
    """Answer with ``publish`` once everything that came out before is on its way, and the result is encoded.

    Encoding a result takes milliseconds, for which the round need not wait: it can end as soon as everybody has
    trained, since results are only wanted in the next one.
    """

    step: int


@dataclass(frozen=True, kw_only=True)
class StoreBlob:
    """Offer ``data`` under ``tag``, before it is announced."""

    data: bytes
    tag: str


@dataclass(frozen=True)
class Announce:
    """Sign these bytes (a :class:`~.broadcasts.Broadcast`) and send them to everybody.

    Attributes:
        carrying: the stored blob that they are about, in a run of our own kind: it may go along.
    """

    data: bytes
    carrying: bytes | None = None


@dataclass(frozen=True)
class AnnounceWeights:
    """Sign these bytes (a :class:`~.broadcasts.WeightsReport`, an :class:`~.audits.reports.AuditReport`, or a
    :class:`~.audits.momentum_messages.MomentumMessage`) and send them to peers of our own kind."""

    data: bytes


@dataclass(frozen=True, kw_only=True)
class FetchBlob:
    """Get a blob; answer with ``fetched`` or ``fetch_failed``, which brings this action again.

    Attributes:
        providers: public keys of peers that may have it, too.
        max_size: bytes; no honest result of this model is larger.
        tag: keeps it, and offers it to others.
    """

    ticket: BlobTicket
    providers: tuple[bytes, ...]
    max_size: int
    tag: str


@dataclass(frozen=True)
class Forget:
    """Release the blobs whose tags end in ``_`` and a step before this one."""

    before_step: int


# -- coordinator -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SendWitness:
    """Report to the coordinator what was seen of the round before ``step``."""

    step: int
    witness: Witness


@dataclass(frozen=True)
class SendWarmupWitness:
    """Tell the coordinator that everybody is ready."""

    witness: Witness


@dataclass(frozen=True)
class SendHealthChecks:
    """Tell the coordinator which clients did no work."""

    checks: HealthChecks


@dataclass(frozen=True)
class Rejoin:
    """Ask the coordinator to let us into the next epoch: we are not in this one any more."""


# -- what happened -----------------------------------------------------------------------------------------------------


class DropReason(enum.Enum):
    """Why a message or a result was not taken."""

    MALFORMED = "it is not a message of this protocol"
    NOT_RUNNING = "we are not in the run yet"
    UNKNOWN_SENDER = "its sender is not in the list of the epoch"
    WRONG_STEP = "it is about a round that is not under way"
    WRONG_PROOF = "its sender does not have the role that it claims"
    BAD_SIGNATURE = "the commitment is not signed by its sender"
    NOT_ASSIGNED = "the batch belongs to another client, or to none"
    DUPLICATE = "it was said before"
    TOO_MANY = "its sender announces too much"
    NOT_A_BLOB = "the ticket is not of a single blob"
    WRONG_HASH = "the data are not what was announced"
    INVALID_RESULT = "the result does not fit the model"


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """A message or a result of a peer was not taken. To be logged; it is counted in ``Rounds.dropped``.

    Attributes:
        sender: the peer's public key.
    """

    sender: bytes
    reason: DropReason
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class AuditSettled:
    """Auditors have decided. A host acts on it; others tell it.

    Attributes:
        trainer: public key.
        step: of the result that was audited last.
        passed: False if the peer has failed: it does not train what it is given.
        words: what was found.
    """

    trainer: bytes
    step: int
    passed: bool
    words: str


@dataclass(frozen=True, kw_only=True)
class ResultMissing:
    """The round is over, and results that the witnesses saw never came. The weights are in doubt from here on.

    Attributes:
        step: at which they should have been applied.
        batches: that were trained two rounds before.
    """

    step: int
    batches: tuple[BatchId, ...]


@dataclass(frozen=True, kw_only=True)
class Desynced:
    """Our weights are not those of the others. We do not train until the next warm-up, which loads them again.

    Attributes:
        step: where it was noticed.
        reason: in words.
        tensors: names of those that differ, as far as that is known.
    """

    step: int
    reason: str
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RunEnded:
    """Nothing more will come.

    Attributes:
        step: of the coordinator.
        error: why, if it is not simply finished.
    """

    step: int
    error: str | None = None


Action = (
    Initialize
    | TrainBatch
    | CancelTraining
    | ApplyResults
    | AuditMomentum
    | AuditResults
    | OpenMomentum
    | PrepareAudit
    | DecayWeights
    | HashWeights
    | RepairWeights
    | FinishEpoch
    | AllowPeers
    | PublishResult
    | StoreBlob
    | Announce
    | AnnounceWeights
    | FetchBlob
    | Forget
    | SendWitness
    | SendWarmupWitness
    | SendHealthChecks
    | Rejoin
    | Dropped
    | AuditSettled
    | ResultMissing
    | Desynced
    | RunEnded
)


SPOKEN: Final = (
    Announce,
    AnnounceWeights,
    OpenMomentum,
    PublishResult,
    Rejoin,
    SendHealthChecks,
    SendWarmupWitness,
    SendWitness,
    StoreBlob,
    TrainBatch,
)
"""What others would hear or see of us. Of one that only watches none of it comes out."""


class Outbox:
    """Actions in the order in which they come out.

    Args:
        silent: nothing of :data:`SPOKEN` comes out.

    Attributes:
        dropped: how many messages and results were not taken, by reason.
    """

    def __init__(self, *, silent: bool = False) -> None:
        self.dropped: Counter[DropReason] = Counter()
        self._actions: list[Action] = []
        self._silent = silent

    def put(self, action: Action) -> None:
        """Adds an action."""
        if not (self._silent and isinstance(action, SPOKEN)):
            self._actions.append(action)

    def drop(self, sender: bytes, reason: DropReason, detail: str = "") -> None:
        """Adds :class:`Dropped` and counts it."""
        self.dropped[reason] += 1
        self._actions.append(Dropped(sender=sender, reason=reason, detail=detail))

    def take(self) -> list[Action]:
        """All actions since the last time."""
        actions, self._actions = self._actions, []
        return actions
