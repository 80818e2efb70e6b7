"""The recipe where results are lost and peers come and go, in a small simulation: the loss hardly suffers."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distro_optim import DisTrO
from distro_optim.compress import CompressedUpdate

pytestmark = pytest.mark.slow

PEERS = 4
ROUNDS = 80
LR = 0.02


class Peer:
    """A small network that learns what a fixed one computes, from samples of its own."""

    def __init__(self, weights: dict[str, Tensor] | None = None) -> None:
        torch.manual_seed(7)
        self.net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))
        if weights is not None:  # a joiner has the run's weights, and nothing in its buffers
            self.net.load_state_dict(weights)
        self.optimizer = DisTrO(self.net.parameters(), LR, compression_chunk=16, direction="orthogonal", update="rms")

    def train(self, seed: int, lr: float, previous: float) -> CompressedUpdate:
        self.optimizer.lookahead(previous)
        self.optimizer.zero_grad()
        loss_of(self.net, 16, seed).backward()
        return self.optimizer.generate(lr)


def loss_of(net: nn.Module, samples: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 16, generator=generator)
    teacher = torch.randn(16, 8, generator=torch.Generator().manual_seed(99))
    return F.mse_loss(net(x), torch.tanh(0.3 * x @ teacher))


def swarm(*, lost: float, stay: int) -> tuple[float, int, int]:
    """The loss in the end, how many results were lost, and how many peers were replaced.

    Args:
        lost: the share of results that nobody applies; who sent them does not learn of it.
        stay: every so many rounds a peer leaves and another one joins.
    """
    draw = random.Random(3)
    peers = [Peer() for _ in range(PEERS)]
    on_its_way: list[CompressedUpdate] = []
    gone = joined = 0
    previous = 0.0
    for step in range(ROUNDS):
        if step and step % stay == 0:
            place = joined % PEERS
            peers[place].optimizer.undo_lookahead()
            peers[place], joined = Peer(dict(peers[place].net.state_dict())), joined + 1
        lr = LR * min((step + 1) / 10, 1 - 0.9 * step / ROUNDS)
        said = [peer.train(1000 * step + number, lr, previous) for number, peer in enumerate(peers)]
        arrive = [update for update in said if draw.random() >= lost]
        gone += PEERS - len(arrive)
        for peer in peers:
            peer.optimizer.apply(on_its_way, lr)
        on_its_way, previous = arrive, lr
    first = list(peers[0].net.parameters())
    for peer in peers[1:]:
        assert all(torch.equal(a, b) for a, b in zip(first, peer.net.parameters(), strict=True))
    with torch.no_grad():
        return loss_of(peers[0].net, 2048, 5).item(), gone, joined


def test_a_tenth_of_the_results_lost_and_a_peer_replaced_every_twelve_rounds() -> None:
    quiet = swarm(lost=0.0, stay=ROUNDS)
    lossy = swarm(lost=0.1, stay=12)
    assert quiet[1:] == (0, 0)
    assert lossy[1] >= 20
    assert lossy[2] == 6
    with torch.no_grad():
        untrained = loss_of(Peer().net, 2048, 5).item()
    assert quiet[0] < 0.5 * untrained
    assert lossy[0] < quiet[0] + 0.1 * (untrained - quiet[0])
