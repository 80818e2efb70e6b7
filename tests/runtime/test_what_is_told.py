"""Logs and live tables: a view is right, cheap and for any thread; models are asked for patiently."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

import pytest
from typing_extensions import override

from distro_optim.comm.model_exchange import Check, ModelExchange, Patience, SharedModel, download_patiently
from distro_optim.errors import ExchangeError, NotSharedError
from distro_optim.strategy.rounds import actions as act
from distro_optim.testing.swarm import MemoryNetwork
from runtime.memory import MemoryRun

pytestmark = [pytest.mark.waiting]


@pytest.mark.slow
def test_a_view_of_a_run_that_is_over_tells_how_it_went() -> None:
    with MemoryRun(min_peers=2, total_steps=10) as run:
        peers = [run.peer(number) for number in (1, 2)]
        for peer in peers:
            peer.join()
        for index, peer in enumerate(peers):
            peer.close()
            view = peer.port.view()
            assert (view.run_state, view.stage, view.step, view.total_steps) == ("FINISHED", "ENDED", 10, 10)
            assert view.fault is None
            assert view.rounds_trained == 10
            assert view.rounds_cancelled == 0
            assert view.weights_step is not None
            assert view.losses[peer.port.identity.p2p_identity].step == 10
            assert view.last_events[-1] == "step 10: the run is finished"
            given = view.contributions
            assert {key: given[key].rounds for key in given} == {p.port.identity.p2p_identity: 10 for p in peers}
            assert all(contribution.bytes for contribution in given.values())
            assert any("epoch 0 forms, with 2 peers" in event for event in view.last_events)
            assert view.bytes_sent > 0
            assert view.seconds_waiting > 0
            assert peer.port.identity == run.state.epoch_state.clients[index].id


def test_while_it_runs_a_view_knows_the_peers() -> None:
    with MemoryRun(min_peers=2, total_steps=10_000) as run:
        first, second = (run.peer(number, step_seconds=0.01) for number in (1, 2))
        first.until(lambda peer: peer.of(act.ApplyResults))
        first.until(lambda peer: peer.port.view().peers)
        view = first.port.view()
        assert [peer.id for peer in view.peers] == [second.port.identity.p2p_identity]
        assert view.neighbors == 1
        assert view.num_peers == 2
        assert view.peer_index == 0
        assert view.connected


class Shy(ModelExchange):
    """Has nothing to share until it has been asked a few times."""

    def __init__(self, refusals: int) -> None:
        self.refusals = refusals

    @override
    def offer(self, model: SharedModel) -> None: ...

    @override
    def withdraw(self) -> None: ...

    @override
    async def download(
        self,
        providers: Iterable[bytes],
        *,
        max_parameter_bytes: int,
        check: Check | None = None,
        progress: Callable[[int, int], None] | None = None,
        patience: Patience = Patience.ONCE,
        seconds: float = 0.0,
    ) -> SharedModel:
        if self.refusals:
            self.refusals -= 1
            raise NotSharedError("not yet", reason="ParametersNotInitialized")
        return SharedModel("here")


def ask(models: ModelExchange, providers: tuple[bytes, ...], seconds: float) -> SharedModel:
    return asyncio.run(download_patiently(models, providers, seconds=seconds, max_parameter_bytes=1))


def test_peers_that_have_no_model_yet_are_asked_again() -> None:
    assert ask(Shy(2), (bytes(32),), 30.0).config == "here"


def test_when_nobody_has_it_in_time_the_last_reason_is_told() -> None:
    with pytest.raises(ExchangeError, match=r"1 peers.*not yet"):
        ask(Shy(1000), (bytes(32),), 0.3)


def test_with_nobody_to_ask_there_is_nothing_to_wait_for() -> None:
    with pytest.raises(ExchangeError, match="no peer to ask"):
        ask(Shy(0), (), 30.0)


def test_what_a_peer_sends_waits_for_its_line() -> None:
    async def work() -> tuple[list[float], float]:
        network = MemoryNetwork(latency=(0.5, 0.5), bandwidth=8000.0)
        sent = [network.transit(b"a", receiver, 1000) for receiver in (b"b", b"c")]
        return sent, network.transit(b"d", b"b", 1000)

    (first, second), third = asyncio.run(work())
    assert first == pytest.approx(1.5, abs=0.1)
    assert second == pytest.approx(2.5, abs=0.1)  # after the first
    assert third == pytest.approx(2.5, abs=0.1)  # after what b receives already
