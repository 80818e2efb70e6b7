"""Warm-up: load the model, say that we have it, and hear who else has it. No I/O.

The model is asked for again a few times if it does not come. Once everybody of the epoch has said that it is ready, we
tell the coordinator.
"""

from __future__ import annotations

from typing import Final

from ...coordinator.rules.checkpoints import is_shared_by_peers
from ...coordinator.rules.probation import regular_clients
from ...coordinator.types import Committee, CommitteeProof, Coordinator, MerkleRoot, NodeIdentity, RunState
from ...verify.commitment import finished_hash
from ...verify.merkle import EMPTY_ROOT
from .actions import DropReason, Outbox, SendWarmupWitness
from .admission import NotAdmitted, check_commitment
from .announcer import Announcer
from .broadcasts import Broadcast, Finished
from .choose_providers import whom_to_ask
from .moment import Moment
from .reading import Reader
from .trust.votes import Electorate
from .witness_reports import warmup_witness

__all__ = ["MAX_LOADS", "WarmUp"]

MAX_LOADS: Final = 3
"""Attempts to load the model in one warm-up. Chosen arbitrarily."""

_PROOF: Final = CommitteeProof(Committee.TIE_BREAKER, 0, 0)
"""Nobody has a role before the first round."""


class WarmUp:
    """What we have done in the present warm-up, and who is ready.

    Args:
        me: our own identity.
        announcer: says that we are ready.
        outbox: where what is to be done goes.
        reader: of what peers send.
        watches: we are in no list, and wait for nobody.

    Attributes:
        source: public keys of peers whose weights were found right where ours were wrong; they are asked first.
    """

    def __init__(
        self, me: NodeIdentity, announcer: Announcer, outbox: Outbox, reader: Reader, *, watches: bool = False
    ) -> None:
        self._watches = watches
        self.source: tuple[bytes, ...] = ()
        self._me = me
        self._announcer = announcer
        self._outbox = outbox
        self._reader = reader
        # Epoch and start of the present warm-up, and what was done in it.
        self._which: tuple[int, int] | None = None
        self._ready: set[NodeIdentity] = set()
        self._said_ready = False
        self._witnessed = False
        self._loads = 0
        # The step of the latest attempt to load the model, and whether any attempt has ever succeeded.
        self._load_step = 0
        self._was_loaded = False
        # Whom a state waits for, with the state; every message asks.
        self._regular_of: tuple[Coordinator, frozenset[NodeIdentity]] | None = None
        # Attempts in a row, over all warm-ups, in which nobody gave us the model.
        self._vain_loads = 0

    def begin(self, state: Coordinator) -> bool:
        """Begins the warm-up of ``state``; False if it has begun already."""
        which = (state.progress.epoch, state.epoch_state.start_timestamp)
        if which == self._which:
            return False
        self._which = which
        self._said_ready, self._witnessed, self._loads = False, False, 0
        self._ready.clear()
        return True

    # -- loading -------------------------------------------------------------------------------------------------------

    @property
    def may_load(self) -> bool:
        """Whether there is an attempt left in this warm-up."""
        return self._loads < MAX_LOADS

    def had_the_weights(self, state: Coordinator) -> bool:
        """Whether our weights were once the run's, in a run that its peers share: then they are not far from it."""
        # One that only watches never gives its own.
        return self._was_loaded and is_shared_by_peers(state.model.checkpoint) and not self._watches

    def load(self, state: Coordinator, electorate: Electorate, *, has_standing: bool) -> None:
        """Asks for the model. Until it is here we are not ready. For the rest see :func:`.whom_to_ask`."""
        self._loads += 1
        self._load_step = state.progress.step
        self._ready.discard(self._me)
        self._outbox.put(
            whom_to_ask(
                state,
                self._me,
                right=self.source,
                electorate=electorate,
                has_standing=has_standing,
                ready=self._ready,
                had_the_weights=self.had_the_weights(state),
                vain_attempts=self._vain_loads,
            )
        )

    def loaded(self, at: Moment) -> bool:
        """The model is here; False if training has begun in the meantime, so that it is not the run's any more."""
        self._was_loaded, self._said_ready, self._vain_loads = True, False, 0
        return not at.is_in(RunState.COOLDOWN) and at.step == self._load_step

    def load_failed(self) -> None:
        """Nobody gave us the model."""
        self._vain_loads += 1

    # -- who is ready --------------------------------------------------------------------------------------------------

    @property
    def said_ready(self) -> bool:
        """Whether we have said that our model is loaded."""
        return self._said_ready

    def say_ready(self, now: float) -> None:
        """Tells the peers that our model is loaded."""
        self._said_ready = True
        self._ready.add(self._me)
        self._announcer.say(0, _PROOF, finished_hash(EMPTY_ROOT), Finished(MerkleRoot(), warmup=True), now)

    def hear_ready(self, sender: NodeIdentity, broadcast: Broadcast, at: Moment) -> None:
        """A peer says that it is ready.

        Raises:
            NotAdmitted: it is not warm-up, or the message is not what it should be.
        """
        if not at.is_in(RunState.WARMUP) or broadcast.step != 0:
            raise NotAdmitted(DropReason.WRONG_STEP, "it is not warm-up")
        if sender in self._ready:
            raise NotAdmitted(DropReason.DUPLICATE)
        check_commitment(broadcast, sender, self._reader)
        self._ready.add(sender)
        self._announcer.repeats.answer_ready(at.now)

    def witness(self, at: Moment) -> None:
        """Tells the coordinator, once, if everybody is ready that is waited for."""
        if self._watches or self._witnessed or self._me not in self._ready:
            return
        if self._regular_of is None or self._regular_of[0] is not at.state:
            self._regular_of = (at.state, regular_clients(at.state))
        regular = self._regular_of[1]
        if len(self._ready) >= len(regular) and self._ready.issuperset(regular):
            self._witnessed = True
            self._outbox.put(SendWarmupWitness(warmup_witness(at.clients.index(self._me))))
