"""A model in DistributedDataParallel: everything would be sent twice, or between peers that are in different rounds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distro_optim import DisTrO, SwarmSession
from distro_optim.comm.exchange import LocalExchange
from distro_optim.errors import ConfigurationError
from distro_optim.optim import run


@pytest.fixture
def wrapped() -> Iterator[DistributedDataParallel]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield DistributedDataParallel(nn.Linear(3, 2))
    finally:
        dist.destroy_process_group()


def test_an_optimizer_among_processes_warns_of_it(
    wrapped: DistributedDataParallel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "ambient_process_group", lambda *_, **__: (None, 2))
    monkeypatch.setattr(run, "ProcessGroupExchange", lambda _: LocalExchange())

    def step(model: Any) -> None:
        optimizer = DisTrO(model.parameters(), lr=1e-3)
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()

    with pytest.warns(UserWarning, match=r"wrapped in DistributedDataParallel.*leave the model unwrapped"):
        step(wrapped)
    step(nn.Linear(3, 2))  # another model than the one that is wrapped


def test_so_does_one_with_an_exchange_of_its_own(wrapped: DistributedDataParallel) -> None:
    class TwoPeers(LocalExchange):
        num_peers = 2

    optimizer = DisTrO(wrapped.parameters(), lr=1e-3, exchange=TwoPeers())
    wrapped(torch.ones(1, 3)).sum().backward()
    with pytest.warns(UserWarning, match="wrapped in DistributedDataParallel"):
        optimizer.step()
    optimizer.step()  # once


def test_a_session_refuses_the_model_in_a_wrapper(wrapped: DistributedDataParallel) -> None:
    optimizer = DisTrO(wrapped.parameters(), lr=1e-3)
    with pytest.raises(ConfigurationError, match="make no wrapper around it"):
        SwarmSession(wrapped.module, optimizer, dataset_size=10)


def test_a_session_refuses_it(wrapped: DistributedDataParallel) -> None:
    optimizer = DisTrO(wrapped.parameters(), lr=1e-3)
    with pytest.raises(ConfigurationError, match=r"pass the model in it, model\.module"):
        SwarmSession(wrapped, optimizer, dataset_size=10)
