"""How it goes, in numbers: those of Psyche's client where there are any (``shared/client/src/state/stats.rs``)."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from ...coordinator.rules.assignment import round_batch_size
from ...coordinator.rules.committee import CommitteeSelection
from ...coordinator.rules.outlook import first_data_index
from ...coordinator.types import BatchId, Coordinator, RunState
from ...errors import CoordinatorError
from ..port import RunView
from ..run_report import ddp_bytes

__all__ = ["Figures", "Progress", "StepClock", "run_numbers"]

KEPT_STEPS: Final = 16
"""Durations of steps that the speed is an average of (``stats.rs``)."""

KEPT_EVENTS: Final = 8
"""The last news that is shown."""

_ROUND: Final = frozenset({RunState.ROUND_TRAIN, RunState.ROUND_WITNESS})
"""Phases in which there is a current round."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """A moment.

    Attributes:
        view: of the run.
        key: our public key.
        role: ``"not_in_round"``, ``"trainer"`` or ``"witness"`` (who also trains), as in Psyche's metrics.
        batch: that we train, or trained last.
        loss: of our latest batch, in nats per token; None before.
        global_batch_size: sequences of the present round.
        total_tokens: that the run has trained before this round; never falls.
        tokens_per_second: of the whole run; None before two rounds.
        efficiency: share of the time that we computed, of the latest steps.
        last_train_seconds: that our latest batch took.
        downloaded: parts of the model downloaded, and in all; None if none are.
        seq_len: tokens of a sample; 1 where samples are no sequences of tokens, 0 before that is known.
        ddp_bytes: that we would have sent, had the gradients of our rounds been summed by a ring all-reduce in bf16.
        uploads: of checkpoints, by what became of them: ``done``, ``failed``, ``left_out``, ``waiting``; empty if none
            are wanted.
    """

    view: RunView
    key: bytes
    role: str
    batch: BatchId | None
    loss: float | None
    global_batch_size: int
    total_tokens: int
    tokens_per_second: float | None
    efficiency: float | None
    last_train_seconds: float | None
    downloaded: tuple[int, int] | None
    events: tuple[str, ...]
    ddp_bytes: int = 0
    seq_len: int = 0
    uploads: Mapping[str, int] = field(default_factory=dict)

    @property
    def perplexity(self) -> float | None:
        """``exp(loss)``; None where that is not a finite number."""
        if self.loss is None or not math.isfinite(self.loss) or self.loss > math.log(1e300):
            return None
        return math.exp(self.loss)


def run_numbers(figures: Figures) -> dict[str, float]:
    """What belongs into the logs of an experiment, under names that begin with ``run/``.

    Sums count from the start of this process, in bytes and seconds.
    """
    view = figures.view
    return {
        "run/peers": float(view.num_peers),
        "run/epoch": float(view.epoch),
        "run/bytes_sent": float(view.bytes_sent),
        "run/bytes_received": float(view.bytes_received),
        "run/ddp_bytes": float(figures.ddp_bytes),
        "run/seconds_training": view.seconds_training,
        "run/seconds_waiting": view.seconds_waiting,
        "run/rounds_missed": float(view.rounds_cancelled),
        "run/dropped": float(sum(view.dropped.values())),
        "run/weights_in_doubt": float(view.fault is not None),
    }


class StepClock:
    """Durations of the latest steps: time between the ends of consecutive rounds."""

    def __init__(self) -> None:
        self._durations: deque[float] = deque(maxlen=KEPT_STEPS)
        self._trained: deque[float] = deque(maxlen=KEPT_STEPS)
        self._last: tuple[int, int, float] | None = None  # epoch, step, when it was first seen

    def saw(self, epoch: int, step: int, now: float, seconds_training: float) -> None:
        """The run is at ``step``; ``seconds_training`` is what we computed in the step before."""
        if self._last is not None and self._last[:2] == (epoch, step):
            return
        # The time between two epochs is not a step.
        if self._last is not None and self._last[0] == epoch and step == self._last[1] + 1:
            self._durations.append(now - self._last[2])
            self._trained.append(seconds_training)
        self._last = (epoch, step, now)

    def per_second(self, amount: float) -> float | None:
        """So much a step, in a second."""
        total = sum(self._durations)
        return amount * len(self._durations) / total if total > 0 else None

    @property
    def efficiency(self) -> float | None:
        """Share of the time in which we computed; None before the second step."""
        total = sum(self._durations)
        return min(1.0, sum(self._trained) / total) if total > 0 else None


class Progress:
    """What this client does, noted by the thread that trains and read by the one that shows it."""

    def __init__(self, key: bytes, clock: Callable[[], float] = time.monotonic) -> None:
        self._key = key
        self._clock = clock
        self._steps = StepClock()
        self._began: float | None = None
        self._batch: BatchId | None = None
        self._loss: float | None = None
        self._train_seconds: float | None = None
        self._downloaded: tuple[int, int] | None = None
        self._events: deque[str] = deque(maxlen=KEPT_EVENTS)
        self._total_tokens = 0
        self._lock = threading.Lock()
        self.ddp_bytes = 0
        """See :class:`Figures`."""
        self.uploads: Callable[[], Mapping[str, int]] = dict
        """Gives those of :class:`Figures`; from any thread."""

    def begins(self, step: int, batch: BatchId, *, num_parameters: int = 0, num_peers: int = 0) -> None:
        """We train ``batch``, of a model of ``num_parameters``, with ``num_peers`` in all."""
        self._began, self._batch = self._clock(), batch
        self.ddp_bytes += ddp_bytes(num_parameters, num_peers)

    def ends(self, loss: float | None) -> None:
        """That is over; ``loss`` is None if it was cancelled."""
        if self._began is not None:
            self._train_seconds = self._clock() - self._began
        self._began = None
        if loss is not None:
            self._loss = loss

    def downloaded(self, done: int, total: int) -> None:
        """So many parameters of the model have come from peers."""
        self._downloaded = (done, total)

    def tell(self, text: str) -> None:
        """Something happened, in a sentence."""
        self._events.append(text)

    def figures(self, view: RunView, state: Coordinator | None) -> Figures:
        """The present moment. For any thread."""
        with self._lock:
            return self._figures(view, state)

    def _figures(self, view: RunView, state: Coordinator | None) -> Figures:
        in_round = state is not None and state.run_state in _ROUND
        size = 0
        if state is not None:
            tokens = first_data_index(state) * state.model.max_seq_len
            # A run that was started again from an earlier checkpoint trains what it trained before.
            self._total_tokens = max(self._total_tokens, tokens)
        if state is not None and in_round:
            self._steps.saw(state.progress.epoch, state.progress.step, self._clock(), self._train_seconds or 0.0)
            size = round_batch_size(state, state.current_round)
        seq_len = state.model.max_seq_len if state is not None else 0
        return Figures(
            view=view,
            key=self._key,
            role=_role(view, state) if in_round else "not_in_round",
            batch=self._batch,
            loss=self._loss,
            global_batch_size=size,
            total_tokens=self._total_tokens,
            tokens_per_second=self._steps.per_second(size * seq_len) if size else None,
            efficiency=self._steps.efficiency,
            last_train_seconds=self._train_seconds,
            downloaded=self._downloaded,
            events=tuple(self._events),
            ddp_bytes=self.ddp_bytes,
            seq_len=seq_len,
            uploads=self.uploads(),
        )


def _role(view: RunView, state: Coordinator | None) -> str:
    if state is None or view.peer_index is None:
        return "not_in_round"
    try:
        selection = CommitteeSelection.for_round(state, state.current_round)
        return "witness" if selection.get_witness(view.peer_index).witness else "trainer"
    except CoordinatorError:  # the list and the round are of two moments
        return "not_in_round"
