"""Peers that do not know yet that their weights differ offer different models; who joins does not end in between."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import pytest
import torch

from distro_optim import DisTrO
from distro_optim.comm.model_exchange import Patience, SharedModel
from distro_optim.coordinator.model import P2P
from distro_optim.coordinator.rules.checkpoints import SHARED_BY_PEERS
from distro_optim.errors import ExchangeError, ProtocolError
from distro_optim.strategy.model.handover import ModelHandover
from distro_optim.strategy.model.identity import weights_root
from distro_optim.strategy.model.named_tensors import NamedTensors
from distro_optim.strategy.model.trainer import SwarmTrainer
from distro_optim.strategy.rounds.actions import Initialize

ALICE, BOB, CAROL = bytes([1]) * 32, bytes([2]) * 32, bytes([3]) * 32
STEP = 7


class Offers:
    """A port that knows what is offered, and takes each tensor from another of the peers that are asked."""

    def __init__(self) -> None:
        self.models: dict[bytes, SharedModel] = {}
        self.asked: list[list[bytes]] = []

    def offer_model(self, model: SharedModel) -> None:
        self.last = model

    def download_model(
        self,
        providers: Iterable[bytes],
        *,
        max_parameter_bytes: int,
        check: Callable[[bytes, str, Sequence[str]], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
        patience: Patience = Patience.LONG,
    ) -> SharedModel:
        self.asked.append(list(providers))
        models = [self.models[peer] for peer in self.asked[-1] if peer in self.models]
        if not models:
            raise ExchangeError("nobody is there")
        names = list(models[0].parameters)
        parts = {name: models[number % len(models)].parameters[name] for number, name in enumerate(names)}
        return SharedModel(models[0].config, "", parts)


def handover(port: Offers, fill: float) -> ModelHandover:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(fill)
    optimizer = DisTrO(model.parameters(), lr=1e-2)
    trainer = SwarmTrainer(NamedTensors.of(model, optimizer), optimizer)
    made = ModelHandover(
        port,  # type: ignore[arg-type]
        trainer,
        model,
        script_rates=True,
        data={},
        as_psyche=False,
        tell=lambda text: None,
    )
    tensors = trainer.tensors
    made.offer(made.identity(0, STEP, weights_root(tensors)), tensors.copies())
    return made


def asked_for(*providers: bytes) -> Initialize:
    return Initialize(epoch=0, step=STEP, checkpoint=P2P(SHARED_BY_PEERS), providers=providers)


def offers(**fills: float) -> Offers:
    """What peers of these names offer, each a model of one number."""
    port = Offers()
    for name, fill in fills.items():
        handover(port, fill)
        port.models[{"alice": ALICE, "bob": BOB, "carol": CAROL}[name]] = port.last
    return port


def numbers(values: dict[str, torch.Tensor]) -> set[float]:
    return {number for tensor in values.values() for number in tensor.flatten().tolist()}


def test_equal_peers_are_asked_together() -> None:
    port = offers(alice=1.0, bob=1.0)
    values, _ = handover(port, 0.0).download(asked_for(ALICE, BOB), attempt=0)
    assert numbers(values) == {1.0}
    assert port.asked == [[ALICE, BOB]]


def test_of_peers_that_differ_one_gives_the_whole_model() -> None:
    port = offers(alice=1.0, bob=2.0)
    values, identity = handover(port, 0.0).download(asked_for(ALICE, BOB), attempt=0)
    assert numbers(values) == {1.0}
    assert identity.step == STEP
    assert port.asked == [[ALICE, BOB], [ALICE]]


def test_the_next_attempt_begins_with_another_and_who_is_gone_is_passed_over() -> None:
    port = offers(alice=1.0, carol=3.0)
    values, _ = handover(port, 0.0).download(asked_for(ALICE, BOB, CAROL), attempt=1)
    assert numbers(values) == {3.0}
    assert port.asked == [[BOB, CAROL, ALICE], [BOB], [CAROL]]


def test_a_peer_whose_own_parts_do_not_fit_is_told_apart_from_no_peer() -> None:
    port = offers(alice=1.0)
    model = port.models[ALICE]
    port.models[ALICE] = SharedModel(model.config, "", {n: t + 1 for n, t in model.parameters.items()})
    with pytest.raises(ProtocolError, match="two models"):
        handover(port, 0.0).download(asked_for(ALICE), attempt=0)
    with pytest.raises(ExchangeError, match="nobody is there"):
        handover(port, 0.0).download(asked_for(BOB), attempt=0)
