"""A run that a script hosts goes on elsewhere from copies of its folders, and a pause outlives its host."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from distro_optim.coordinator.ticket import RunTicket
from distro_optim.coordinator.types import RunState
from distro_optim.operate.asking import ask
from distro_optim.strategy.config import RunConfig
from distro_optim.strategy.session import SwarmSession
from runtime.live import LOOPBACK

from .scripts import SAMPLES, new_model, new_optimizer, samples

pytestmark = pytest.mark.waiting

ROUNDS = 3


def host(folder: Path, seed: int, news: list[str]) -> SwarmSession:
    model = new_model(seed)
    config = RunConfig(
        run_id="kept", total_steps=9, global_batch_size=6, save_dir=folder / "run", resume=True, joiner_wait_time=None
    )
    options: dict[str, Any] = {"secret_key": folder / "host.key", "on_event": news.append, **LOOPBACK}
    return SwarmSession(
        model,
        new_optimizer(model, overlap=True),
        config=config,
        dataset_size=SAMPLES,
        checkpoint_dir=folder / "checkpoints",
        resume=True,
        **options,
    )


def train(session: SwarmSession, rounds: int) -> list[int]:
    data, steps = samples(torch.float32), list[int]()
    while len(steps) < rounds and (round_ := session.next_round()) is not None:
        x = data[round_.indices]
        (session._model(x) - x.flip(1)).pow(2).mean().backward()
        round_.finish()
        steps.append(round_.step)
    return steps


def weights(session: SwarmSession) -> list[torch.Tensor]:
    return [value.clone() for value in session._model.state_dict().values()]


@pytest.mark.slow
def test_copies_of_the_folders_go_on_where_the_run_was_under_the_same_ticket(tmp_path: Path) -> None:
    here, there, news = tmp_path / "here", tmp_path / "there", list[str]()
    here.mkdir()
    with host(here, 1, news) as session:
        first = train(session, ROUNDS)
        ticket = session.ticket
    saved, step = weights(session), session.step
    shutil.copytree(here, there)  # what a backup is: the run's folder, a checkpoint of the host, its key
    shutil.rmtree(here)
    with host(there, 2, news) as session:
        assert all(torch.equal(one, other) for one, other in zip(saved, weights(session), strict=True))
        then = train(session, 100)
        again = session.ticket
    assert first == list(range(1, ROUNDS + 1))
    assert step > 1
    assert then == list(range(step, 10))
    ends = [RunTicket.parse(text).endpoint for text in (ticket, again) if text is not None]
    assert len({end.id for end in ends if end is not None}) == 1
    assert len(ends) == 2


@pytest.mark.slow
def test_a_run_that_was_paused_is_paused_when_its_host_is_back_and_says_how_it_goes_on(tmp_path: Path) -> None:
    news: list[str] = []
    with host(tmp_path, 1, news) as session:
        train(session, ROUNDS)
        ask(tmp_path / "run", "kept", "pause", {})
    step = session.step
    news.clear()
    with host(tmp_path, 1, news) as session:
        state = session.state
        assert state is not None
        assert state.run_state is RunState.PAUSED
        ask(tmp_path / "run", "kept", "resume", {})
        assert train(session, 1) == [step]
    text = f"the run is paused, as it was when it was saved: distro-optim run resume kept --save-dir {tmp_path / 'run'}"
    assert any(line.startswith(text) for line in news)
