"""Sessions over real endpoints on loopback."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typing_extensions import override

from distro_optim.comm.signing import SecretKey
from distro_optim.coordinator.model import P2P
from distro_optim.coordinator.rules.checkpoints import SHARED_BY_PEERS
from distro_optim.errors import ModelMismatchError
from distro_optim.optim.state import WEIGHT
from distro_optim.strategy.config import RunConfig
from distro_optim.strategy.model.checkpoint import CheckpointStore
from distro_optim.strategy.model.resuming import state_to_resume
from distro_optim.strategy.session import SwarmSession
from runtime.live import served_run

from .scripts import SAMPLES, new_model, new_optimizer, samples

pytestmark = [pytest.mark.waiting, pytest.mark.slow]

CONFIG = RunConfig(
    total_steps=12, global_batch_size=12, min_peers=2, epoch_time=100, warmup_time=30, max_round_train_time=20
)
LOOPBACK: dict[str, Any] = {"relay": "none", "bind_addr": "127.0.0.1:0", "dataset_size": SAMPLES}


class Peer(threading.Thread):
    """A script in a thread; :meth:`result` waits for its end and raises its error."""

    def __init__(
        self,
        seed: int,
        *,
        lr: float = 1e-2,
        during: Callable[[Peer, int], None] = lambda peer, step: None,
        **settings: Any,
    ) -> None:
        super().__init__(daemon=True)
        self.model = new_model(seed)
        self.optimizer = new_optimizer(self.model, lr=lr)
        self.news: list[str] = []
        self.during = during
        settings = {**LOOPBACK, "on_event": self.news.append, **settings}
        self.session = SwarmSession(self.model, self.optimizer, **settings)
        self.steps: list[int] = []
        self.error: BaseException | None = None
        self.started_run, self.enough = threading.Event(), threading.Event()
        self.start()

    @override
    def run(self) -> None:
        data = samples(torch.float32)
        try:
            with self.session as session:
                self.ticket = session.ticket
                self.started_run.set()
                for round_ in session.rounds():
                    if self.enough.is_set():
                        break
                    x = data[round_.indices]
                    (self.model(x) - x.flip(1)).pow(2).mean().backward()
                    self.during(self, round_.step)
                    if round_.finish():
                        self.steps.append(round_.step)
        except BaseException as error:
            self.error = error
        finally:
            self.started_run.set()

    def result(self) -> list[torch.Tensor]:
        self.join()
        if self.error is not None:
            raise self.error
        return [p.detach() for p in self.model.parameters()]


def host(seed: int, config: RunConfig = CONFIG, **settings: Any) -> Peer:
    peer = Peer(seed, config=config, **settings)
    peer.started_run.wait()
    return peer


def test_two_sessions_train_together_and_the_host_resumes_alone(tmp_path: Path) -> None:
    first = host(1, checkpoint_dir=tmp_path)
    friend = Peer(2, run=first.ticket)
    mine, theirs = first.result(), friend.result()
    assert first.steps == friend.steps == list(range(1, 13))
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    saved = CheckpointStore(tmp_path).latest()
    assert saved is not None
    assert saved.step == 15

    again = host(3, RunConfig(total_steps=18, global_batch_size=12), checkpoint_dir=tmp_path, resume=True)
    again.result()
    assert again.session.view().run_id == saved.run_id
    assert again.steps == [15, 16, 17, 18]


def test_a_bit_that_flips_is_repaired_in_mid_epoch() -> None:
    def flip(peer: Peer, step: int) -> None:
        if step == 4:
            weight = peer.model.first.weight
            for tensor in (weight.data, peer.optimizer.state[weight][WEIGHT]):
                tensor.view(-1).view(torch.int32)[5] ^= 1 << 20

    first = host(1, replace(CONFIG, min_peers=3))
    others = [Peer(2, run=first.ticket), Peer(3, run=first.ticket, during=flip)]
    weights = [peer.result() for peer in (first, *others)]
    for peer in (first, *others):
        assert peer.steps == list(range(1, 13))
        assert peer.session.epoch == first.session.epoch
    for mine in weights[1:]:
        assert all(torch.equal(a, b) for a, b in zip(weights[0], mine, strict=True))
    assert [text for text in others[1].news if "differed from those of the others" in text]
    assert not [text for text in others[1].news if "loading them again" in text]


def test_another_script_is_refused_by_name_and_the_host_goes_on() -> None:
    endless = replace(CONFIG, total_steps=1_000_000, min_peers=1, joiner_wait_time=1)
    first = host(1, endless)
    stranger = Peer(2, run=first.ticket, lr=3e-2)
    with pytest.raises(ModelMismatchError, match=r"lr is 0\.03 here and 0\.01 in the run"):
        stranger.result()
    friend = Peer(2, run=first.ticket)
    while not friend.steps and friend.is_alive():
        friend.join(0.05)
    friend.enough.set()
    friend.result()
    first.enough.set()
    first.result()
    assert friend.steps


def test_a_server_and_its_clients_that_are_started_again_go_on_from_the_checkpoints(tmp_path: Path) -> None:
    keys = [SecretKey(bytes([number]) * 32) for number in (1, 2)]
    folders = [tmp_path / str(number) for number in (1, 2)]

    def both(seed: int, ticket: str) -> list[Peer]:
        return [
            Peer(seed + n, run=ticket, secret_key=key, checkpoint_dir=folder, resume=True)
            for n, (key, folder) in enumerate(zip(keys, folders, strict=True))
        ]

    with served_run(CONFIG, "served") as ticket:
        for peer in both(1, ticket):
            peer.result()
    saved = CheckpointStore(folders[0]).latest()
    assert saved is not None
    assert saved.state is not None
    assert {client.id.p2p_identity for client in saved.state.epoch_state.clients} == {key.public for key in keys}

    longer = state_to_resume(saved, replace(CONFIG, total_steps=saved.step + 3))
    assert longer is not None
    model = replace(longer.model, checkpoint=P2P(SHARED_BY_PEERS))
    state = replace(longer, model=model, epoch_state=saved.state.epoch_state)
    with served_run(CONFIG, "served", state) as ticket:
        peers = both(3, ticket)
        mine, theirs = (peer.result() for peer in peers)
    assert peers[0].steps == peers[1].steps == list(range(saved.step, saved.step + 4))
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
