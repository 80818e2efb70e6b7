"""A training thread without a model to speak of: two small tensors, and a gradient made of them and of the batch.

A peer that trains on other weights sends something else, and one that applies another list of results has other weights
from then on; see :mod:`rounds.simulator`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from distro_optim.comm.model_exchange import SharedModel
from distro_optim.compress import CompressedUpdate
from distro_optim.errors import DistroError, RunError
from distro_optim.strategy.port import RunPort, TrainerAction
from distro_optim.strategy.rounds import actions as act
from rounds.simulator import NAMES, PLAN, Trainer
from runtime.hurry import CountedMailbox, HurriedThread

SECONDS = 60.0
SLICE = 0.005
LOOK_SECONDS = 0.05


class TrainingThread:
    """Carries out what the port gives, as a session would.

    Args:
        port: the run.
        step_seconds: that a training takes.
        gradient: replaces the honest result.
    """

    def __init__(
        self,
        port: RunPort,
        *,
        step_seconds: float = 0.0,
        gradient: Callable[[act.TrainBatch, CompressedUpdate], CompressedUpdate] | None = None,
    ) -> None:
        self.port = port
        self.trainer = Trainer()
        self.step_seconds = step_seconds
        self.gradient = gradient
        self.hashes: dict[int, tuple[bytes, ...]] = {}
        self.log: list[TrainerAction] = []
        self.error: BaseException | None = None
        self.changed = threading.Condition()
        self._hurried: HurriedThread | None = None
        self._thread = threading.Thread(target=self._main, daemon=True)

    def start(self) -> TrainingThread:
        loop = getattr(self.port, "_loop", None)
        if isinstance(loop, HurriedThread):
            self._hurried = loop
            self.port._mailbox = CountedMailbox(loop.clock)  # type: ignore[attr-defined]
        self.port.start()
        self._thread.start()
        return self

    def join(self, seconds: float = SECONDS) -> None:
        with self._waiting(lambda: self.is_done):
            self._thread.join(seconds)
        assert not self._thread.is_alive(), f"it still trains: {self.port.view()}"

    def close(self) -> None:
        self.port.close()
        if self._thread.ident is not None:
            self.join()

    def of(self, kind: type[Any]) -> list[Any]:
        return [action for action in list(self.log) if isinstance(action, kind)]

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def until(self, wanted: Callable[[TrainingThread], object], seconds: float = SECONDS) -> None:
        """Waits until ``wanted`` is so. It is looked at in this thread, and in that of the network, too."""
        with self.changed:
            deadline = time.monotonic() + seconds
            while not (ok := bool(wanted(self))) and self.error is None and time.monotonic() < deadline:
                with self._waiting(lambda: wanted(self) or self.error is not None):
                    self.changed.wait(LOOK_SECONDS)  # not all that may be wanted comes with an action
        if self.error is not None and not wanted(self):
            raise self.error
        assert ok, f"it never came to that: {self.port.view()}"

    def _waiting(self, wanted: Callable[[], object]) -> AbstractContextManager[None]:
        return nullcontext() if self._hurried is None else self._hurried.clock.waiting(wanted)

    def _train_for(self, seconds: float) -> None:
        if self._hurried is not None:
            self._hurried.sleep(seconds)
        else:
            time.sleep(seconds)

    @property
    def _now(self) -> float:
        return self._hurried.clock.time() if self._hurried is not None else time.monotonic()

    def _main(self) -> None:
        try:
            while True:
                action = self.port.next_action(SECONDS)
                assert action is not None, f"nothing to do for {SECONDS} s: {self.port.view()}"
                self.carry_out(action)
                with self.changed:
                    self.log.append(action)
                    self.changed.notify_all()
                if isinstance(action, act.RunEnded):
                    return
        except BaseException as error:
            with self.changed:
                self.error = error
                self.changed.notify_all()
        finally:
            if self._hurried is not None:
                self.port._mailbox.leave()  # type: ignore[attr-defined]

    def carry_out(self, action: TrainerAction) -> None:
        trainer, port = self.trainer, self.port
        match action:
            case act.Initialize(providers=providers):
                try:
                    self._load(providers)
                except RunError:
                    raise
                except DistroError as error:
                    port.initialization_failed(str(error))
                else:
                    port.initialized(PLAN, NAMES)
            case act.TrainBatch(step=step):
                end = self._now + self.step_seconds
                while (left := end - self._now) > 0 and not port.is_cancelled(step):
                    self._train_for(min(SLICE, left))
                update = trainer.gradient(action)
                if self.gradient is not None:
                    update = self.gradient(action, update)
                trainer.decay(action.lr)
                if port.is_cancelled(step):
                    port.cancelled(step)
                else:
                    port.trained(step, update, ("own", step), loss=1.0 / step)
            case act.ApplyResults():
                trainer.apply(action)
            case act.DecayWeights(lr=lr):
                trainer.decay(lr)
            case act.HashWeights(step):
                digests = trainer.digests()
                self.hashes[step] = tuple(digests)
                port.weights_hashed(step, digests)
            case act.FinishEpoch():
                self._offer()

    def _load(self, providers: tuple[bytes, ...]) -> None:
        if providers:
            model = self.port.download_model(providers, max_parameter_bytes=1 << 20)
            self.trainer.weights = [model.parameters[name].clone() for name in NAMES]
        self._offer()

    def _offer(self) -> None:
        copies = {name: tensor.clone() for name, tensor in zip(NAMES, self.trainer.weights, strict=True)}
        self.port.offer_model(SharedModel("{}", parameters=copies))


def assert_equal_weights(*peers: TrainingThread) -> set[int]:
    """All that looked at the same step saw the same weights; returns the steps that all of them saw."""
    for a in peers:
        for b in peers:
            differing = [step for step in a.hashes.keys() & b.hashes.keys() if a.hashes[step] != b.hashes[step]]
            assert not differing, differing
    return set.intersection(*(set(peer.hashes) for peer in peers))


def changed_weights(peer: TrainingThread) -> bool:
    return not all(torch.equal(a, b) for a, b in zip(peer.trainer.weights, Trainer().weights, strict=True))
