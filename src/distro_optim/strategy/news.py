"""What a session tells people: in the log, through the script's own function, and in its report."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final

from ..callbacks import SafeCallback
from .environment import RunEnvironment
from .monitor.bars import above_bars
from .monitor.figures import Progress
from .port import Note, RunEvent, RunFacts
from .rounds import actions as act
from .run_report import RunReporter, weights_hash

__all__ = ["News"]

_SHOWN: Final = 3
"""Names of tensors in a sentence."""

_log: Final = logging.getLogger(__name__)


class News:
    """See the module.

    Args:
        on_event: called with each sentence. What it raises is logged and stops nothing, but for KeyboardInterrupt and
            SystemExit. Without it what a person should know is logged as a warning, which Python shows by default.
        environment: says where the report is wanted, if at all.
        quiet: another process of this machine tells the same.
    """

    def __init__(
        self, on_event: Callable[[str], None] | None, environment: RunEnvironment, *, quiet: bool = False
    ) -> None:
        self._on_event = SafeCallback(on_event, "on_event") if on_event is not None else None
        self._environment = environment
        self._level = logging.INFO if quiet or on_event is not None else logging.WARNING
        self._reporter = RunReporter(None)
        self.progress: Progress | None = None
        """Told how rounds end, and the sentences; for those who look at the run."""

    @property
    def is_reporting(self) -> bool:
        """Whether rounds are written down, with the hashes of the weights."""
        return self._reporter.is_writing

    def joined(self, run: RunFacts, num_parameters: int) -> None:
        """We are in the run."""
        self._reporter = RunReporter.from_environment(
            self._environment, peer=run.identity.p2p_identity, num_parameters=num_parameters
        )
        view = run.view()
        self._reporter.joined(
            run_state=view.run_state,
            epoch=view.epoch,
            step=view.step,
            total_steps=view.total_steps,
            num_peers=view.num_peers,
            text=view.run_id,
        )

    def tell(self, text: str, step: int | None = None, *, routine: bool = False) -> None:
        """Something happened that a person should know.

        Args:
            text: that, in a sentence.
            step: of the run; None takes that of the last round.
            routine: a person may want to know it, but need not.
        """
        with above_bars():
            _log.log(logging.INFO if routine else self._level, "%s", text)
        self._reporter.tell(text, step=step)
        if self.progress is not None:
            self.progress.tell(text)
        if self._on_event is not None:
            self._on_event(text)

    def event(self, event: RunEvent) -> None:
        """Something happened in the run."""
        match event:
            case act.Desynced(step=step, reason=reason, tensors=tensors):
                more = " ..." if len(tensors) > _SHOWN else ""
                named = f" ({', '.join(tensors[:_SHOWN])}{more})" if tensors else ""
                self.tell(f"step {step}: our weights are not the run's any more: {reason}{named}; loading them again")
            case Note(text=text):
                self.tell(text)
            case act.ResultMissing(step=step, batches=batches):
                self.tell(f"step {step}: {len(batches)} results that count never came here", routine=True)

    def round(self, run: RunFacts, step: int, loss: float | None, digests: Callable[[], Sequence[bytes]]) -> None:
        """We are done with a round.

        Args:
            run: how it is going.
            step: of the round.
            loss: our own, a mean over our samples; None if we did not train.
            digests: gives those of the weights at the start of the round, 32 bytes for each tensor, and waits for them
                if need be; called if they are wanted.
        """
        if self.progress is not None:
            self.progress.ends(loss)
        if not self._reporter.is_writing:
            return
        view = run.view()
        self._reporter.round(
            epoch=view.epoch,
            step=step,
            total_steps=view.total_steps,
            run_state=view.run_state,
            num_peers=view.num_peers,
            waiting_peers=view.waiting_peers,
            loss=loss,
            bytes_sent=view.bytes_sent,
            bytes_received=view.bytes_received,
            seconds_training=view.seconds_training,
            seconds_waiting=view.seconds_waiting,
            weights_hash=weights_hash(digests()),
        )

    def ended(self, run: RunFacts, step: int, digests: Callable[[], Sequence[bytes]], text: str) -> None:
        """We leave the run.

        Args:
            run: how it is going.
            step: of the run.
            digests: gives those of the weights as they are, 32 bytes for each tensor; called if they are wanted.
                Nothing where they are not known.
            text: why we leave, if not because the run is finished.
        """
        if self._reporter.is_writing:
            view, known = run.view(), digests()
            self._reporter.ended(
                step=step,
                run_state=view.run_state,
                bytes_sent=view.bytes_sent,
                bytes_received=view.bytes_received,
                seconds_training=view.seconds_training,
                seconds_waiting=view.seconds_waiting,
                weights_hash=weights_hash(known) if known else "",
                text=text,
            )
        self._reporter.close()
