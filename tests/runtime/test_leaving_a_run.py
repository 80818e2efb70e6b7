"""Leaving is possible in every phase, takes nothing along, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
from typing_extensions import override

from distro_optim.comm.model_exchange import SharedModel
from distro_optim.errors import ConfigurationError, ExchangeError, RunError
from distro_optim.strategy.network.link import RunLink
from distro_optim.strategy.network.runtime import Runtime
from distro_optim.strategy.port import TrainerAction
from distro_optim.strategy.rounds import actions as act
from rounds.simulator import secret
from runtime.live import LOOPBACK, config, live_run
from runtime.memory import MemoryRun, MemorySource
from runtime.training import TrainingThread, assert_equal_weights

pytestmark = [pytest.mark.waiting]


def threads_of_runs() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "distro-optim-run"]


def until_action(kind: type) -> Callable[[TrainingThread], None]:
    return lambda peer: peer.until(lambda p: p.of(kind))


@pytest.mark.slow
@pytest.mark.parametrize(
    "wait",
    [lambda peer: None, until_action(act.Initialize), until_action(act.TrainBatch), until_action(act.ApplyResults)],
    ids=["while waiting for members", "after loading", "after a training", "in full flow"],
)
def test_a_host_can_leave_in_every_phase_and_nothing_stays_behind(wait: Callable[[TrainingThread], None]) -> None:
    with live_run() as run:
        host = run.host(config(total_steps=10_000))
        wait(host)
        host.close()
        assert isinstance(host.error, RunError)
        assert threads_of_runs() == []


def test_a_host_that_leaves_as_soon_as_the_run_has_ended_has_told_the_others() -> None:
    told = threading.Event()

    class Host(MemorySource):
        is_host = True

        @override
        async def open(self) -> RunLink:
            async def farewell() -> None:
                await asyncio.sleep(0)
                told.set()

            return replace(await super().open(), farewell=farewell)

    class LeavesAtOnce(TrainingThread):
        @override
        def carry_out(self, action: TrainerAction) -> None:
            super().carry_out(action)
            if isinstance(action, act.RunEnded):
                self.port.close()

    with MemoryRun(total_steps=10) as run:
        peer = LeavesAtOnce(Runtime(Host(run, secret(1)), loop=run.loop))
        run.peers.append(peer)
        peer.start().join()
        assert peer.error is None
        assert told.is_set()


def test_leaving_ends_a_training_that_is_under_way() -> None:
    with MemoryRun(total_steps=1000, max_round_train_time=50) as run:
        peer = run.peer(1, step_seconds=1000.0)
        threading.Timer(0.5, peer.port.close).start()
        peer.join()
        assert isinstance(peer.error, RunError)


def test_leaving_ends_a_wait_for_the_model() -> None:
    with MemoryRun() as run:
        peer = run.peer(1)
        errors: list[BaseException] = []

        def ask() -> None:
            try:
                peer.port.download_model([bytes(32)], max_parameter_bytes=100)
            except ExchangeError as error:
                errors.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        peer.port.close()
        asking.join(10)
        assert len(errors) == 1


class Interrupted(Exception):
    pass


def interrupt() -> None:
    raise Interrupted


def test_a_wait_for_the_model_can_be_interrupted() -> None:
    with MemoryRun() as run:
        peer = run.peer(1)
        peer.port.interrupt = interrupt
        with pytest.raises(Interrupted):
            peer.port.download_model([bytes(32)], max_parameter_bytes=100)


def test_joining_a_host_that_says_nothing_can_be_interrupted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = Runtime.connect(f"127.0.0.1:{silent.getsockname()[1]}/run", relay="none")
        port.interrupt = interrupt
        with pytest.raises(Interrupted):
            port.start()
        with pytest.raises(RunError):
            port.start()  # everything was released


@pytest.mark.slow
def test_the_others_go_on_without_the_one_who_leaves() -> None:
    with MemoryRun(hurried=True, min_peers=3, keep_peers=1, total_steps=60) as run:
        stay, also, leaves = (run.peer(number, step_seconds=0.01) for number in (1, 2, 3))
        leaves.until(lambda peer: len(peer.of(act.ApplyResults)) > 3)
        leaves.close()
        for peer in (stay, also):
            peer.join()
            assert peer.error is None
        assert_equal_weights(stay, also)
        assert len(stay.of(act.ApplyResults)[-1].updates) == 2


def test_leaving_before_coming_and_leaving_twice_are_leaving() -> None:
    port = Runtime.connect(config=config(), **LOOPBACK)
    port.close()
    port.close()
    with pytest.raises(RunError, match="closed"):
        port.start()
    with pytest.raises(RunError):
        port.next_action()


def test_answers_after_leaving_are_ignored() -> None:
    with MemoryRun() as run:
        peer = run.peer(1)
        peer.close()
        peer.port.cancelled(1)
        peer.port.initialization_failed("too late")
        peer.port.offer_model(SharedModel("{}"))
        peer.port.withdraw_model()


def test_nothing_can_be_asked_before_the_start() -> None:
    port = Runtime.connect(config=config(), **LOOPBACK)
    assert port.ticket is None
    assert port.view().run_state == "CONNECTING"
    with pytest.raises(ConfigurationError, match="start"):
        port.next_action()
    port.close()
