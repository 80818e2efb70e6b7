"""A host that ends and starts again from its checkpoints is found by the ticket of before, and by those who waited."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distro_optim.strategy.config import RunConfig

from .test_live_sessions import CONFIG, Peer, host

pytestmark = [pytest.mark.waiting, pytest.mark.slow]

ENDLESS = replace(CONFIG, total_steps=1_000_000, joiner_wait_time=1)


def until_trained(peer: Peer, steps: int) -> None:
    while len(peer.steps) < steps and peer.is_alive():
        peer.join(0.02)


def test_the_ticket_stays_the_same_and_a_peer_that_was_in_trains_on(tmp_path: Path) -> None:
    first = host(1, ENDLESS, checkpoint_dir=tmp_path)
    friend = Peer(2, run=first.ticket)
    until_trained(friend, 3)
    first.enough.set()
    first.result()
    before, last, ticket = len(friend.steps), first.steps[-1], first.ticket
    del first.session  # as the process that ends would: the socket is open for as long as something has it
    gc.collect()

    longer = RunConfig(**{**vars(CONFIG), "total_steps": last + 8})
    again = host(3, longer, checkpoint_dir=tmp_path, resume=True)
    assert again.ticket == ticket
    mine, theirs = again.result(), friend.result()
    assert len(friend.steps) > before
    assert again.steps[-1] == friend.steps[-1] == longer.total_steps
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert any(text.startswith("the coordinator does not answer") for text in friend.news)
    assert any(text.startswith("the coordinator answers again") for text in friend.news)
