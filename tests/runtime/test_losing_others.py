"""Others vanish without a word, the network loses and parts, results are of no use: the run goes on, or says why."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import warm_python
from distro_optim.comm.iroh import streams
from distro_optim.compress import CompressedUpdate
from distro_optim.errors import RunLostError
from distro_optim.strategy.rounds import actions as act
from distro_optim.strategy.rounds.actions import DropReason
from distro_optim.testing.swarm import MemoryNetwork
from distro_optim.testing.updates import random_update
from rounds.simulator import PLAN
from runtime.live import config, live_run
from runtime.memory import MemoryRun
from runtime.training import assert_equal_weights, changed_weights

pytestmark = [pytest.mark.waiting, pytest.mark.slow]

HERE = Path(__file__).parent


def test_a_run_whose_host_is_gone_ends_with_the_reason_and_the_weights_stay() -> None:
    with live_run() as run:
        host = run.host(config(min_peers=2, total_steps=10_000))
        friend = run.join(give_up_seconds=0.5)
        friend.until(lambda peer: len(peer.of(act.ApplyResults)) > 3)
        host.close()
        friend.join()
        assert isinstance(friend.error, RunLostError)
        assert "the run's coordinator is gone" in str(friend.error)
        assert changed_weights(friend)


def test_a_peer_that_is_killed_is_given_up_long_before_the_time_of_a_round_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streams.IrohListener.__init__, "__kwdefaults__", {"silence": 2.0})
    with live_run() as run:
        # A round would wait longer for it than this test may take.
        host = run.host(config(min_peers=2, keep_peers=1, epoch_time=1000, max_round_train_time=900))
        ticket = host.port.ticket
        assert ticket is not None
        with warm_python.Popen([sys.executable, str(HERE / "one_peer.py"), ticket, "0.02"]) as victim:
            try:
                host.until(lambda peer: any(len(a.updates) == 2 for a in peer.of(act.ApplyResults)), 100)
            finally:
                victim.kill()
        before = len(host.of(act.ApplyResults))
        host.until(lambda peer: len(peer.of(act.ApplyResults)) > before + 4 or peer.is_done)
        assert len(host.of(act.ApplyResults)[-1].updates) == 1
        host.until(lambda peer: any("left" in event for event in peer.port.view().last_events))


@pytest.mark.parametrize("seed", [1, 2])
def test_announcements_that_are_lost_cost_time_and_nothing_else(seed: int) -> None:
    with MemoryRun(
        lambda: MemoryNetwork(latency=(0.0, 0.01), loss=0.05, seed=seed),
        hurried=True,
        min_peers=3,
        total_steps=15,
        max_round_train_time=3,
    ) as run:
        peers = [run.peer(number) for number in (1, 2, 3)]
        for peer in peers:
            peer.join(100)
            assert peer.error is None
        healthy = [peer for peer in peers if not peer.of(act.Desynced) and peer.port.view().fault is None]
        assert len(healthy) >= 2
        last = max(max(peer.hashes) for peer in healthy)
        assert len({peer.hashes[last] for peer in healthy if last in peer.hashes}) == 1


def test_a_peer_that_is_cut_off_from_the_others_says_so_and_comes_back() -> None:
    with MemoryRun(
        hurried=True, min_peers=3, keep_peers=1, total_steps=10_000, max_round_train_time=1, epoch_time=6, warmup_time=4
    ) as run:
        peers = [run.peer(number, step_seconds=0.01) for number in (1, 2, 3)]
        lonely = peers[2]
        key = lonely.port.identity.p2p_identity
        lonely.until(lambda peer: len(peer.of(act.ApplyResults)) > 3)
        run.on_loop(lambda: run.network.partition([key]))
        lonely.until(lambda peer: peer.port.view().fault is not None)
        assert lonely.port.take_events()
        run.on_loop(run.network.heal)
        starts = len(lonely.of(act.Initialize))
        lonely.until(lambda peer: len(peer.of(act.Initialize)) > starts and peer.port.view().fault is None)
        step = lonely.of(act.Initialize)[-1].step
        for peer in peers:
            peer.until(lambda p: any(s > step + 2 for s in p.hashes))
        for late in range(step, step + 3):
            assert len({peer.hashes[late] for peer in peers if late in peer.hashes}) == 1


def not_a_number(action: act.TrainBatch, honest: CompressedUpdate) -> CompressedUpdate:
    update = random_update(PLAN, quantized=False, seed=action.step)
    update.value[0][0, 0] = float("nan")
    return update


def test_a_result_with_not_a_number_is_not_even_sent() -> None:
    with MemoryRun(hurried=True, min_peers=2, keep_peers=1, total_steps=8, max_round_train_time=1) as run:
        honest, broken = run.peer(1), run.peer(2, gradient=not_a_number)
        for peer in (honest, broken):
            peer.join()
            assert peer.error is None
        assert_equal_weights(honest, broken)
        assert broken.port.view().dropped[DropReason.INVALID_RESULT] > 0
        assert all(len(action.updates) == 1 for action in honest.of(act.ApplyResults)[1:])
