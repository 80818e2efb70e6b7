"""A host that ends and starts again from its checkpoints is found by the ticket of before, and by those who waited."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from typing_extensions import override

from distro_optim.coordinator.ticket import RunTicket
from distro_optim.strategy.environment import TICKET_NAME
from distro_optim.strategy.model import between_epochs
from distro_optim.strategy.model.between_epochs import FOLDER, BetweenEpochs
from distro_optim.strategy.model.checkpoint import AUDIT_LIMITS, CheckpointStore
from distro_optim.strategy.network.runtime import Runtime
from distro_optim.verify.calibrate import TIGHTEST

from .test_a_run_outlives_its_host import Killed, kill
from .test_live_sessions import CONFIG, Peer, host

pytestmark = [pytest.mark.waiting, pytest.mark.slow]

ENDLESS = replace(CONFIG, total_steps=1_000_000, joiner_wait_time=1)


def until_told(peer: Peer, beginning: str) -> None:
    """It looks at its link twice a second, and a host may be back sooner."""
    while not any(text.startswith(beginning) for text in peer.news) and peer.is_alive():
        peer.join(0.02)


def until_trained(peer: Peer, steps: int) -> None:
    while len(peer.steps) < steps and peer.is_alive():
        peer.join(0.02)


@pytest.mark.parametrize("has_saved", [True, False])
def test_the_ticket_stays_the_same_and_the_run_goes_on_where_the_other_is(tmp_path: Path, *, has_saved: bool) -> None:
    def dies(peer: Peer, step: int) -> None:
        kept = tmp_path / TICKET_NAME
        if step >= 9 and kept.exists() and RunTicket.parse(kept.read_text()).peers:
            kill(peer)
        time.sleep(0.05)

    def slowly(peer: Peer, step: int) -> None:
        time.sleep(0.05)

    config = replace(ENDLESS, keep_peers=1)
    first = host(1, config, checkpoint_dir=tmp_path, during=dies)
    friend = Peer(2, run=first.ticket, during=slowly)
    first.join()
    assert isinstance(first.error, Killed)
    ticket = first.ticket
    for saved in [] if has_saved else tmp_path.glob("step-*"):
        shutil.rmtree(saved)
    del first.session  # as the process that ends would: the socket is open for as long as something has it
    first.error.__traceback__ = None
    gc.collect()
    until_told(friend, "the coordinator does not answer")

    again = host(3, config, checkpoint_dir=tmp_path, resume=True)
    assert again.ticket == ticket
    until_trained(again, 3)
    until_told(friend, "the coordinator answers again")
    for peer in (friend, again):
        peer.enough.set()
        peer.join()
    assert again.error is None
    assert again.steps[0] > 9
    assert friend.steps[:9] == list(range(1, 10))
    assert sorted(set(friend.steps)) == friend.steps  # not one round was lost
    assert not [text for text in friend.news if "loading them again" in text]
    assert any("the run goes on where they are" in text for text in again.news)
    assert any(text.startswith("the coordinator does not answer") for text in friend.news)
    assert any(text.startswith("the coordinator answers again") for text in friend.news)


def test_a_host_that_is_killed_in_mid_epoch_goes_on_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(between_epochs, "SECONDS", 0.0)
    monkeypatch.setattr(between_epochs, "SHARE", 1e9)
    left = tmp_path / "left"

    def copy(peer: Peer, step: int) -> None:
        if step == 9:  # what a process that is killed now leaves
            shutil.copytree(tmp_path / "first" / FOLDER, left / FOLDER)

    alone = replace(CONFIG, min_peers=1, total_steps=12)
    first = host(1, alone, checkpoint_dir=tmp_path / "first", during=copy)
    first.result()
    saved = CheckpointStore(left / FOLDER).latest()
    assert saved is not None
    assert saved.step == 9

    again = host(2, alone, checkpoint_dir=left, resume=True)
    again.result()
    assert again.session.view().run_id == first.session.view().run_id
    assert again.steps == [9, 10, 11, 12]
    assert any(text.startswith(f"resuming from {left / FOLDER}") for text in again.news)


def test_limits_of_audits_are_saved_in_mid_epoch_and_hold_when_the_host_goes_on_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(between_epochs, "SECONDS", 0.0)
    monkeypatch.setattr(between_epochs, "SHARE", 1e9)
    limits = replace(TIGHTEST, manhattan=0.07, samples=30)
    folders = [tmp_path / name for name in ("first", "again", "left")]

    def copy_at(step: int, of: Path, to: Path) -> Callable[[Peer, int], None]:
        def copy(peer: Peer, now: int) -> None:
            if now == step:
                shutil.copytree(of / FOLDER, to / FOLDER)

        return copy

    alone = replace(CONFIG, min_peers=1, total_steps=12, audit_fraction=1.0)
    first, again, left = folders
    host(1, alone, checkpoint_dir=first, during=copy_at(6, first, again)).result()
    before = CheckpointStore(again / FOLDER).latest()
    assert before is not None
    assert before.audit_limits() is None, "of a young run nobody has learnt any"
    (before.path / AUDIT_LIMITS).write_bytes(limits.encode())
    host(2, alone, checkpoint_dir=again, resume=True, during=copy_at(9, again, left)).result()
    saved = CheckpointStore(left / FOLDER).latest()
    assert saved is not None
    assert saved.step == 9
    assert saved.audit_limits() == limits


def test_saving_in_mid_epoch_takes_a_small_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    told: list[str] = []

    class SlowStore(CheckpointStore):
        @override
        def save(self, *args: object, **settings: object) -> Path:
            nonlocal now
            now += 4.0
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(between_epochs, "CheckpointStore", SlowStore)
    model = torch.nn.Linear(2, 2)
    between = BetweenEpochs(tmp_path, model, lambda: now, told.append)
    assert not between.is_due
    now = between_epochs.SECONDS
    assert between.is_due
    trainer, identity = MagicMock(), MagicMock(step=7)
    between.save(trainer, {}, run_id="run", identity=identity, state=None)
    assert "step 7 could not be saved" in told[0]
    now += 4.0 / between_epochs.SHARE - 1
    assert not between.is_due
    now += 1
    assert between.is_due


def test_what_cannot_be_read_is_told_and_the_end_of_the_epoch_before_counts(tmp_path: Path) -> None:
    told: list[str] = []
    between = BetweenEpochs(tmp_path, torch.nn.Linear(2, 2), lambda: 0.0, told.append)
    assert between.newest(None) is None
    (between.directory / "step-00000007").mkdir(parents=True)
    (between.directory / "step-00000007" / "distro_optim.json").write_text("{")
    assert between.newest(None) is None
    assert told
    assert told[0].startswith("what was saved in mid-epoch cannot be used")


def test_a_host_that_had_saved_nothing_yet_has_the_same_run_if_it_resumes(tmp_path: Path) -> None:
    options: dict[str, Any] = {"config": CONFIG, "home": tmp_path, "relay": "none", "bind_addr": "127.0.0.1:0"}
    tickets = []
    for resume in (True, True, False):
        access = Runtime.connect(resume=resume, **options)
        access.start()
        tickets.append(RunTicket.parse(access.ticket or ""))
        access.close()
    assert tickets[0].run_id == tickets[1].run_id != tickets[2].run_id
    assert len({ticket.endpoint.id for ticket in tickets if ticket.endpoint is not None}) == 1


def test_a_run_that_is_over_is_not_begun_again_and_says_how_to_train_on(tmp_path: Path) -> None:
    short = replace(CONFIG, total_steps=3, min_peers=1)
    first = host(1, short, checkpoint_dir=tmp_path)
    ended = first.result()
    again = host(2, short, checkpoint_dir=tmp_path, resume=True)
    weights = again.result()
    assert (first.steps, again.steps) == ([1, 2, 3], [])
    assert all(torch.equal(a, b) for a, b in zip(ended, weights, strict=True))
    (said,) = [text for text in again.news if "nothing is left to train" in text]
    assert "last step, 3, in it, and its weights are here" in said
    assert not any("are not those" in text for text in again.news)
