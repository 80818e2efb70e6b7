"""Ctrl-C and SIGTERM in the midst of a change wait until the weights are those of a step: then they can be saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from distro_optim.strategy.config import RunConfig
from distro_optim.strategy.model.checkpoint import CheckpointStore
from distro_optim.strategy.model.held_interrupts import interrupts_held
from distro_optim.strategy.model.loading import ModelLoader
from distro_optim.strategy.model.trainer import SwarmTrainer
from distro_optim.strategy.session import SwarmSession
from frameworks.quiet_run import QuietRun

from .scripts import SAMPLES, new_model, new_optimizer, samples

CONFIG = RunConfig(global_batch_size=4, total_steps=6, min_peers=1)


class Interrupted(Exception):
    """What our handler of SIGTERM raises."""


@pytest.fixture
def handled() -> Iterator[list[int]]:
    """The signals that were handled, all of which raise."""
    numbers: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        numbers.append(number)
        raise Interrupted

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    yield numbers
    assert all(signal.getsignal(number) is handler for number in before), "the handlers are back"
    for number, old in before.items():
        signal.signal(number, old)


def train_until_interrupted(folder: Path, port: QuietRun) -> None:
    model, data = new_model(), samples(torch.float32)
    session = SwarmSession(model, new_optimizer(model), port=port, dataset_size=SAMPLES, checkpoint_dir=folder)

    def train() -> None:
        with session:
            for round_ in session.rounds():
                model(data[round_.indices]).pow(2).mean().backward()
                round_.finish()

    with pytest.raises(Interrupted):
        train()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("amid", ["begin", "finish", "apply", "lay_down"])
def test_a_signal_in_the_midst_of_a_change_leaves_a_checkpoint(
    amid: str, number: int, tmp_path: Path, handled: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    port, changed = QuietRun(CONFIG), getattr(SwarmTrainer, amid)

    def change(trainer: SwarmTrainer, *args: Any, **kwargs: Any) -> Any:
        if port._step == 4:
            signal.raise_signal(number)
            assert not handled
        return changed(trainer, *args, **kwargs)

    monkeypatch.setattr(SwarmTrainer, amid, change)
    train_until_interrupted(tmp_path, port)
    assert handled == [number]
    saved = CheckpointStore(tmp_path).latest()
    assert saved is not None
    assert saved.step == 4


def test_what_waits_for_others_is_interrupted_at_once(
    tmp_path: Path, handled: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(loader: ModelLoader, action: object) -> None:
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("it waits")

    monkeypatch.setattr(ModelLoader, "load", load)
    train_until_interrupted(tmp_path, QuietRun(CONFIG))
    assert handled == [signal.SIGTERM]
    assert CheckpointStore(tmp_path).latest() is None


def test_the_second_signal_does_not_wait(handled: list[int]) -> None:
    @interrupts_held()
    def change() -> None:
        signal.raise_signal(signal.SIGTERM)
        assert not handled
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGINT)
        assert handled == [signal.SIGINT]

    with pytest.raises(Interrupted):
        change()
    assert handled == [signal.SIGINT, signal.SIGTERM]


def test_a_block_in_a_block_holds_to_the_end_of_the_outer_one(handled: list[int]) -> None:
    @interrupts_held()
    def change() -> None:
        with interrupts_held():
            signal.raise_signal(signal.SIGINT)
        assert not handled

    with pytest.raises(Interrupted):
        change()
    assert handled == [signal.SIGINT]


def test_an_error_in_the_block_is_the_context_of_the_interrupt(handled: list[int]) -> None:
    @interrupts_held()
    def change() -> None:
        signal.raise_signal(signal.SIGINT)
        raise ValueError

    with pytest.raises(Interrupted) as caught:
        change()
    assert isinstance(caught.value.__context__, ValueError)
    assert handled == [signal.SIGINT]


def test_what_has_no_handler_in_python_keeps_its_effect() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with interrupts_held():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_in_another_thread_nothing_is_changed(handled: list[int]) -> None:
    seen: list[object] = []
    handler = signal.getsignal(signal.SIGINT)

    def body() -> None:
        with interrupts_held():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [handler]
    assert not handled
