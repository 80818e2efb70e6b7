"""Loss, a partition, a crash, a return, a slow peer and a liar at once: runtimes of one process get through it.

The same with real processes, over hundreds of rounds, is ``benchmarks/chaos.py``.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from typing_extensions import override

from distro_optim.comm.swarm import Swarm
from distro_optim.coordinator.types import RunState
from distro_optim.strategy.network.link import RunLink
from distro_optim.strategy.network.runtime import Runtime
from distro_optim.strategy.rounds import actions as act
from distro_optim.strategy.rounds import announcer, phases
from distro_optim.testing.swarm import MemoryNetwork
from distro_optim.testnet.disturbed import DisturbedRun
from distro_optim.testnet.lies import LIES, LyingSwarm, mis_signed
from rounds.simulator import secret
from runtime.memory import MemoryRun, MemorySource
from runtime.training import TrainingThread

pytestmark = [pytest.mark.waiting, pytest.mark.slow]

STEPS = 20
LIAR = 9


class Mortal(MemorySource):
    """A way into the run that can be cut off, as ``kill -9`` would."""

    link: RunLink

    @override
    async def open(self) -> RunLink:
        self.link = await super().open()
        return self.link

    def kill(self) -> None:
        async def close() -> None:
            await self.link.aclose()

        self.run.loop.run(close(), 10)


def join(run: MemoryRun, source: MemorySource, disturb: Callable[[Swarm], Swarm], **options: float) -> TrainingThread:
    peer = TrainingThread(Runtime(DisturbedRun(source, disturb), loop=run.loop), **options)  # type: ignore[arg-type]
    run.peers.append(peer)
    return peer.start()


def test_the_honest_end_with_equal_weights_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    # What takes seconds on the internet takes milliseconds here.
    quick = announcer.Pace(first=0.1, longest=1.0, in_warm_up=1.0)
    monkeypatch.setattr(announcer, "PROMPT", quick)
    monkeypatch.setattr(phases, "PROMPT", quick)
    liars: list[LyingSwarm] = []

    def lying(swarm: Swarm) -> Swarm:
        # It never says what is true among our own kind: it is soon dropped, and repeats nothing to who has missed it.
        liars.append(LyingSwarm(swarm, secret(LIAR), [lie for lie in LIES.values() if lie is not mis_signed]))
        return liars[-1]

    run = MemoryRun(
        lambda: MemoryNetwork(latency=(0.001, 0.02), loss=0.3, seed=3),
        hurried=True,
        total_steps=STEPS,
        global_batch_size=10,
        min_peers=2,
        max_round_train_time=3,
        joiner_wait_time=2,
        epoch_time=120,
    )
    with run:
        first = run.peer(1)
        run.peer(2)
        run.peer(3, step_seconds=0.2)
        mortal = Mortal(run, secret(4))
        dying = join(run, mortal, lambda swarm: swarm)
        join(run, MemorySource(run, secret(LIAR)), lying)

        def reach(step: int) -> None:
            first.until(lambda _: run.state.progress.step >= step or run.state.run_state is RunState.FINISHED, 120)

        reach(4)
        mortal.kill()
        reach(7)
        run.on_loop(lambda: run.network.partition([secret(2).public]))
        reach(9)
        run.on_loop(run.network.heal)
        run.peers.remove(dying)
        assert dying.error is not None
        reborn = run.peer(5)
        first.join(120)

        honest = [peer for peer in run.peers if peer.port.identity.p2p_identity != secret(LIAR).public]
        for peer in honest:
            peer.join(30)
            assert peer.error is None
            assert peer.of(act.RunEnded)[-1].error is None
        assert liars[0].told
        assert reborn.of(act.TrainBatch), "it came too late to train"
        assert sum(bool(action.updates) for action in first.of(act.ApplyResults)) > STEPS / 2
        ended_right = [peer for peer in honest if peer.port.view().fault is None]
        assert first in ended_right
        assert len(ended_right) >= len(honest) - 1
        for peer in ended_right:
            same = zip(peer.trainer.weights, first.trainer.weights, strict=True)
            assert all(torch.equal(a, b) for a, b in same)
