"""What the training thread sees of a run: a queue of actions to carry out on the model, and answers to give.

Five seams stand between a training loop and the network, so that each part of a session takes what it needs:

==================  ==========================================================
:class:`RunFacts`   who we are, which run it is, and how it is going
:class:`RunActions` what is to be done to the model next
:class:`RunAnswers` what came of it
:class:`ModelSharing` the model on its way from and to other peers
:class:`RunLife`    from joining to leaving
==================  ==========================================================

A session takes all five as a :class:`RunAccess`. :class:`RunPort` is one object that has them all:
:class:`~.runtime.Runtime` is the one over the internet, and tests put a list of actions in its place::

    run.life.start()
    try:
        while not isinstance(action := run.actions.next_action(), RunEnded):
            match action:
                case TrainBatch():
                    run.answers.trained(action.step, update, own)
                ...
    finally:
        run.life.close()

The order of the actions is a promise, made in :mod:`.actions`: an action that an answer causes comes after those that
came before the answer. Only :meth:`RunActions.is_cancelled` overtakes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from typing_extensions import override

from ..comm.live_weights import FetchedTensors, LiveWeights, WantedTensors
from ..comm.model_exchange import Check, Patience, SharedModel
from ..comm.swarm import PeerInfo
from ..compress import CompressedUpdate, TilePlan
from ..coordinator.rules.points import ClientAccount
from ..coordinator.server.acting import HostActs
from ..coordinator.types import Coordinator, NodeIdentity
from ..errors import ExchangeError
from ..verify.audit import Verdict
from ..verify.calibrate import Limits, Noise
from ..verify.recompute import Evidence
from .rounds.actions import (
    ApplyResults,
    AuditMomentum,
    AuditResults,
    DecayWeights,
    Desynced,
    DropReason,
    FinishEpoch,
    HashWeights,
    Initialize,
    OpenMomentum,
    PrepareAudit,
    RepairWeights,
    ResultMissing,
    RunEnded,
    TrainBatch,
)
from .rounds.audits.docket import AuditCount

__all__ = [
    "Contribution",
    "LossReport",
    "ModelSharing",
    "Note",
    "RunAccess",
    "RunActions",
    "RunAnswers",
    "RunEvent",
    "RunFacts",
    "RunLife",
    "RunPort",
    "RunView",
    "TrainerAction",
]

TrainerAction = (
    Initialize
    | TrainBatch
    | ApplyResults
    | AuditMomentum
    | AuditResults
    | OpenMomentum
    | PrepareAudit
    | DecayWeights
    | HashWeights
    | RepairWeights
    | FinishEpoch
    | RunEnded
)
"""What :meth:`RunActions.next_action` gives. After :class:`~.actions.RunEnded` nothing follows."""


@dataclass(frozen=True)
class Note:
    """A sentence for people, of the network."""

    text: str


RunEvent = Desynced | ResultMissing | Note
"""What :meth:`RunActions.take_events` gives: nothing has to be done, but it is worth a line in the log."""


@dataclass(frozen=True, kw_only=True)
class LossReport:
    """The loss that a peer says it had.

    Attributes:
        step: of the run.
        loss: mean over its samples.
    """

    step: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """What an identity has given to the run, as far as this peer has seen it: since it joined.

    Attributes:
        rounds: in which a result of it counted.
        samples: that these results are of.
        bytes: that these results have on the wire.
        dropped: messages and results of it that were not taken, but for those that came late or more than once.
    """

    rounds: int = 0
    samples: int = 0
    bytes: int = 0
    dropped: int = 0


@dataclass(frozen=True, kw_only=True)
class RunView:
    """A snapshot of a run for logs and live tables.

    Attributes:
        run_id: the run.
        run_state: name of the coordinator's phase, such as ``"ROUND_TRAIN"``; ``"CONNECTING"`` before the first state.
        epoch: of the run.
        step, total_steps: of the run, as people count them: see
            :func:`~distro_optim.coordinator.rules.steps.counted_steps`.
        height: rounds since the epoch began.
        num_peers: clients of the present epoch, ourselves included.
        clients: their public keys, in their order.
        peer_index: our place in their list; None if we are not in the epoch.
        waits_for: what we wait for until we are in an epoch, in words; None if we are in one.
        waiting_peers: clients that wait for the next epoch; None where that is not known, as it is only to the host.
        stage: name of the :class:`~.rounds.Stage`.
        watches: whether we are in no list of the run and only look at it: nothing of ours is given to anybody.
        fault: why our weights are not those of the others; None if they are, as far as we know.
        connected: whether there is a link to the coordinator.
        gives_up_after: seconds without one after which the run counts as lost; None if it never does.
        lr: learning rate of the step in the run's own schedule; None before the first round.
        fees: lamports that taking part has cost so far, what is on its way included; None where it costs nothing.
        bytes_sent, bytes_received: with peers, all protocols together.
        peers: those that are or were connected.
        neighbors: how many of them pass announcements on to us directly.
        dropped: messages and results not taken, by reason.
        rounds_trained: rounds in which we trained to the end.
        rounds_cancelled: rounds whose training was stopped because they were over.
        seconds_waiting: time the training thread has waited in :meth:`RunActions.next_action`.
        seconds_training: time between a :class:`~.actions.TrainBatch` and its answer.
        weights_root: root over the hashes of our weights; None before the first.
        weights_step: at whose start they were those.
        losses: the latest reports known, by public key; ours is among them.
        contributions: what each identity has given, by public key; ours is among them.
        audits: of each identity, by public key, as this peer has heard of them.
        audit_limits: by which momenta are judged; None in a run without such audits, and until they are learnt.
        audits_nothing: momenta are audited, and honest peers find so much noise in their own that nothing can be said.
        points: of each identity by public key, so far; None where they are not known, as they are to a host that keeps
            a ledger or has results audited.
        last_events: the latest news in words, the newest last.
    """

    run_id: str
    run_state: str = "CONNECTING"
    epoch: int = 0
    step: int = 0
    total_steps: int = 0
    height: int = 0
    num_peers: int = 0
    clients: tuple[bytes, ...] = ()
    peer_index: int | None = None
    waits_for: str | None = None
    waiting_peers: int | None = None
    stage: str = "OUTSIDE"
    watches: bool = False
    fault: str | None = None
    connected: bool = False
    gives_up_after: float | None = None
    lr: float | None = None
    fees: int | None = None
    bytes_sent: int = 0
    bytes_received: int = 0
    peers: tuple[PeerInfo, ...] = ()
    neighbors: int = 0
    dropped: Mapping[DropReason, int] = field(default_factory=dict)
    rounds_trained: int = 0
    rounds_cancelled: int = 0
    seconds_waiting: float = 0.0
    seconds_training: float = 0.0
    weights_root: bytes | None = None
    weights_step: int | None = None
    losses: Mapping[bytes, LossReport] = field(default_factory=dict)
    contributions: Mapping[bytes, Contribution] = field(default_factory=dict)
    audits: Mapping[bytes, AuditCount] = field(default_factory=dict)
    audit_limits: Limits | None = None
    audits_nothing: bool = False
    points: Mapping[bytes, ClientAccount] | None = None
    last_events: tuple[str, ...] = ()


class RunFacts(ABC):
    """Who we are, which run it is, and how it is going."""

    @property
    @abstractmethod
    def identity(self) -> NodeIdentity:
        """Who we are. Known before :meth:`RunLife.start`."""

    @property
    @abstractmethod
    def run_id(self) -> str:
        """The run."""

    @property
    @abstractmethod
    def ticket(self) -> str | None:
        """What others pass as ``run`` to join; None before :meth:`RunLife.start`."""

    @property
    @abstractmethod
    def is_host(self) -> bool:
        """Whether the run's coordinator is in this process, so that the run ends when we leave."""

    @property
    @abstractmethod
    def state(self) -> Coordinator | None:
        """The latest state of the coordinator; None only before :meth:`RunLife.start` has returned, or
        :meth:`RunLife.look`. For any thread."""

    @abstractmethod
    def view(self) -> RunView:
        """A cheap snapshot. For any thread."""


class RunActions(ABC):
    """What is to be done to the model next. Belongs to the training thread."""

    @abstractmethod
    def next_action(self, timeout: float | None = None) -> TrainerAction | None:
        """The next thing to do to the model, in order. Waits for it; Ctrl-C gets through.

        Args:
            timeout: seconds; None waits for as long as it takes.

        Returns:
            None if nothing came in time.

        Raises:
            RunLostError: the coordinator is gone for good. The model is as the last action left it.
            RunError: the run cannot go on for another reason.
        """

    @abstractmethod
    def is_cancelled(self, step: int) -> bool:
        """Whether the training of ``step`` is to be stopped, since its round is over. To be asked between batches."""

    @abstractmethod
    def take_events(self) -> list[RunEvent]:
        """What happened since the last call; the oldest go if nobody asks."""


class RunAnswers(ABC):
    """What came of the actions. Belongs to the training thread, but for :meth:`weights_hashed`."""

    @abstractmethod
    def initialized(self, plan: TilePlan, names: Sequence[str]) -> None:
        """Answers :class:`~.actions.Initialize`: the model is loaded.

        A peer that had no others to load it from, :attr:`~.actions.Initialize.providers` being empty, offers it with
        :meth:`ModelSharing.offer_model` before this: joiners ask for it right away.

        Args:
            plan: how its tensors are tiled.
            names: of the tensors, in the plan's order.
        """

    @abstractmethod
    def initialization_failed(self, reason: str) -> None:
        """Answers :class:`~.actions.Initialize`: it could not be loaded. It is asked for again a few times."""

    @abstractmethod
    def trained(self, step: int, update: CompressedUpdate, own: object, *, loss: float | None = None) -> None:
        """Answers :class:`~.actions.TrainBatch`.

        Args:
            step: of the action.
            update: what to send; must not be changed afterwards.
            own: comes back as ``own_previous`` in the next round.
            loss: mean over our samples, for people to look at.
        """

    @abstractmethod
    def cancelled(self, step: int) -> None:
        """Answers :class:`~.actions.TrainBatch`, too: the training was stopped. Allowed at any time."""

    @abstractmethod
    def weights_hashed(self, step: int, digests: Sequence[bytes]) -> None:
        """Answers :class:`~.actions.HashWeights`: see :func:`~.weights.tensor_digest`, in the order of the names.

        For any thread: nobody waits for the hashes, and the training may have gone on meanwhile.
        """

    def weights_repaired(  # noqa: B027 - a run that never asks for a repair leaves it out
        self, step: int, digests: Sequence[bytes] | None
    ) -> None:
        """Answers :class:`~.actions.RepairWeights`.

        Args:
            step: of the action.
            digests: what :meth:`weights_hashed` would be told now; None if the tensors did not come. Then it may be
                asked for again.
        """


class AuditAnswers(ABC):  # noqa: B024 - who cannot audit leaves out all of it
    """What came of audits, and what is to be shown to those who audit us. Belongs to the training thread, but for what
    is committed and opened."""

    def audited(  # noqa: B027
        self, step: int, trainer: bytes, found: Evidence, own: Evidence | None
    ) -> None:
        """Answers :class:`~.actions.AuditResults`, for one of its results.

        Args:
            step: in which it was made.
            trainer: public key of who sent it.
            found: by test 1.
            own: likewise in our own result, with the two batches changed round; None if there is none.
        """

    def momentum_committed(  # noqa: B027
        self, step: int, root: bytes, decays: Sequence[float]
    ) -> None:
        """Answers :class:`~.actions.TrainBatch`, too, where it asks for it. For any thread.

        Args:
            step: that was trained.
            root: of our momentum after it, see :class:`~distro_optim.verify.momentum.Snapshot`.
            decays: of the momentum, one for each parameter group.
        """

    def momentum_opened(self, step: int, data: bytes) -> None:  # noqa: B027
        """Answers :class:`~.actions.OpenMomentum`: what is to be sent. For any thread."""

    def own_momentum_audited(self, step: int, noise: Noise) -> None:  # noqa: B027
        """Answers :class:`~.actions.PrepareAudit`: what we found in our own momentum of a step."""

    def momentum_audited(self, step: int, trainer: bytes, verdict: Verdict) -> None:  # noqa: B027
        """Answers :class:`~.actions.AuditMomentum`.

        Args:
            step: in which the audited result was made.
            trainer: public key of who sent it.
            verdict: by test 2.
        """


class ModelSharing(ABC):
    """The model on its way from and to other peers. Belongs to the training thread."""

    @abstractmethod
    def download_model(
        self,
        providers: Iterable[bytes],
        *,
        max_parameter_bytes: int,
        check: Check | None = None,
        progress: Callable[[int, int], None] | None = None,
        patience: Patience = Patience.LONG,
    ) -> SharedModel:
        """Gets the model from peers and waits for it.

        Args:
            providers: those of :class:`~.actions.Initialize`.
            max_parameter_bytes: a larger parameter is refused.
            check: called with the text of a peer's configuration and the names of its parameters before any of them is
                asked for, from another thread. If it raises ProtocolError, another peer is asked. May return bounds
                below ``max_parameter_bytes``, one for all or one for each name.
            progress: called with parameters done and in all, by the thread that waits.
            patience: with peers that have nothing to share yet.

        Raises:
            ExchangeError: nobody gave it, within the time of the warm-up.
        """

    @abstractmethod
    def offer_model(self, model: SharedModel) -> None:
        """Shares a model with joiners from now on. Its tensors must not change any more: pass a copy."""

    @abstractmethod
    def withdraw_model(self) -> None:
        """Shares nothing any more."""

    def offer_live(self, live: LiveWeights | None) -> None:  # noqa: B027 - it may be of no use to anybody
        """Gives single tensors of the model in training to peers that ask; None gives none any more.

        ``live`` is asked from other threads. A run that shares whole models only leaves this out.
        """

    def download_tensors(self, providers: Iterable[bytes], wanted: WantedTensors, *, seconds: float) -> FetchedTensors:
        """Gets the tensors in which ours differ from those of peers, and waits for them, for ``seconds`` at most.

        Args:
            providers: those of :class:`~.actions.RepairWeights`.
            wanted: which, and how they are known to be right.
            seconds: likewise of the action.

        Raises:
            ExchangeError: nobody gave them in that time.
        """
        raise ExchangeError("single tensors cannot be fetched in this run")


class RunLife(ABC):
    """From joining to leaving. Belongs to the training thread.

    Attributes:
        interrupt: called several times a second while we wait for the network; raises if the wait is to end.
    """

    interrupt: Callable[[], None] | None = None

    def look(self) -> None:  # noqa: B027 - only what is joined can be looked at before
        """Reads the state of a run that is to be joined, without asking to be in it: nobody there knows of us yet.

        :attr:`RunFacts.state` is known from then on. May be left out, and called again. Raises what :meth:`start` does.
        """

    def judge_by(self, limits: Limits | None) -> None:  # noqa: B027 - an access to runs that audit no momenta
        """Before :meth:`start`: by these limits momenta are audited until the run has learnt its own. None: by none."""

    @property
    def acts(self) -> HostActs | None:
        """What can be done to the run from here, from :meth:`look` on; None where it is hosted elsewhere."""
        return None

    @abstractmethod
    def start(self) -> None:
        """Hosts the run or joins it, and returns when the coordinator has taken us.

        Everything is released again if this raises.

        Raises:
            JoinRefusedError: the coordinator hosts another run, is full, or does not want this key.
            CoordinatorLinkError: it cannot be reached.
            ProtocolError: what answers there is not a coordinator.
            ExchangeError: our own endpoint cannot be opened.
        """

    @abstractmethod
    def close(self, timeout: float = 5.0) -> None:
        """Leaves the run cleanly and releases everything, in at most ``timeout`` seconds.

        May be called again, before :meth:`start`, and after any error. A host's run ends with it.
        """


class RunAccess(Protocol):
    """One participant's access to a run: the six seams of this module."""

    @property
    def facts(self) -> RunFacts:
        """Who we are, which run it is, and how it is going."""

    @property
    def actions(self) -> RunActions:
        """What is to be done to the model next."""

    @property
    def answers(self) -> RunAnswers:
        """What came of it."""

    @property
    def audit_answers(self) -> AuditAnswers:
        """What came of audits."""

    @property
    def sharing(self) -> ModelSharing:
        """The model on its way from and to other peers."""

    @property
    def life(self) -> RunLife:
        """From joining to leaving."""


class RunPort(RunFacts, RunActions, RunAnswers, AuditAnswers, ModelSharing, RunLife, RunAccess):
    """A :class:`RunAccess` that is one object and has all six seams itself."""

    @property
    @override
    def facts(self) -> RunFacts:
        return self

    @property
    @override
    def actions(self) -> RunActions:
        return self

    @property
    @override
    def answers(self) -> RunAnswers:
        return self

    @property
    @override
    def audit_answers(self) -> AuditAnswers:
        return self

    @property
    @override
    def sharing(self) -> ModelSharing:
        return self

    @property
    @override
    def life(self) -> RunLife:
        return self
