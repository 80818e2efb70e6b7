"""Peers that lie about the model, however many, end no honest script as long as one of the others has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from distro_optim import DisTrO
from distro_optim.comm.model_exchange import SharedModel
from distro_optim.coordinator.model import P2P
from distro_optim.coordinator.rules.checkpoints import SHARED_BY_PEERS
from distro_optim.errors import ExchangeError, ModelMismatchError, ProtocolError
from distro_optim.strategy.model.handover import ModelHandover
from distro_optim.strategy.model.identity import weights_root
from distro_optim.strategy.model.named_tensors import NamedTensors
from distro_optim.strategy.model.trainer import SwarmTrainer
from distro_optim.strategy.rounds.actions import Initialize
from session.crowd import Crowd, peers

STEP = 7
HOW_MANY = [1, 2, 4, 9]


def handover(port: Crowd, fill: float, *, lr: float = 1e-2) -> ModelHandover:
    """Of a model of one number."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(fill)
    optimizer = DisTrO(model.parameters(), lr=lr)
    trainer = SwarmTrainer(NamedTensors.of(model, optimizer), optimizer)
    return ModelHandover(
        port,  # type: ignore[arg-type]
        trainer,
        model,
        script_rates=True,
        data={},
        as_psyche=False,
        tell=lambda text: None,
    )


def model_of(fill: float, *, lr: float = 1e-2) -> SharedModel:
    """What a peer with such a model shares."""
    port = Crowd()
    made = handover(port, fill, lr=lr)
    tensors = made._trainer.tensors
    made.offer(made.identity(0, STEP, weights_root(tensors)), tensors.copies())
    return port.last


TRUE = model_of(1.0)


def changed(change: Callable[[torch.Tensor], torch.Tensor]) -> SharedModel:
    """The description of the honest, and other tensors."""
    return replace(TRUE, parameters={name: change(tensor) for name, tensor in TRUE.parameters.items()})


LIES = {
    "another model": model_of(1.0, lr=0.5),
    "no description": replace(TRUE, config="{}"),
    "tensors of another shape": changed(lambda tensor: tensor.flatten()[:1]),
    "tensors of another type": changed(lambda tensor: tensor.to(torch.int64)),
    "tensors with other values": changed(lambda tensor: tensor + 1),
    "no tensors": replace(TRUE, parameters={}),
}


def wanted(providers: list[bytes]) -> Initialize:
    return Initialize(epoch=0, step=STEP, checkpoint=P2P(SHARED_BY_PEERS), providers=tuple(providers))


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("how_many", HOW_MANY)
def test_the_model_comes_from_the_one_that_is_honest(how_many: int, lie: str) -> None:
    """At worst, each attempt begins with another peer until the honest one is asked alone."""
    liars, (honest,) = peers(how_many), peers(1, first=200)
    crowd = Crowd({**dict.fromkeys(liars, LIES[lie]), honest: TRUE})
    joiner = handover(crowd, 0.0)
    for attempt in range(how_many + 1):
        try:
            values, identity = joiner.download(wanted([*liars, honest]), attempt=attempt)
        except (ExchangeError, ProtocolError):
            continue  # the run tries again with the next warm-up
        break
    assert {number for tensor in values.values() for number in tensor.flatten().tolist()} == {1.0}
    assert identity.step == STEP


@pytest.mark.parametrize("how_many", HOW_MANY)
def test_one_that_has_the_model_only_later_is_waited_for_whatever_the_others_say(how_many: int) -> None:
    liars, (honest,) = peers(how_many), peers(1, first=200)
    crowd = Crowd({**dict.fromkeys(liars, LIES["another model"]), honest: TRUE})
    crowd.late[honest] = 15
    values, _ = handover(crowd, 0.0).download(wanted([*liars, honest]), attempt=0)
    assert all(bool((tensor == 1.0).all()) for tensor in values.values())


@pytest.mark.parametrize("how_many", HOW_MANY)
def test_while_one_of_the_others_has_said_nothing_what_liars_say_ends_nothing(how_many: int) -> None:
    liars, silent = peers(how_many), peers(1, first=200)
    crowd = Crowd(dict.fromkeys(liars, LIES["another model"]))
    for attempt in range(3):
        with pytest.raises(ExchangeError, match="the run trains something else: lr is"):
            handover(crowd, 0.0).download(wanted([*liars, *silent]), attempt=attempt)


@pytest.mark.parametrize("how_many", HOW_MANY)
def test_what_all_of_them_say_is_believed(how_many: int) -> None:
    crowd = Crowd(dict.fromkeys(peers(how_many), LIES["another model"]))
    with pytest.raises(ModelMismatchError, match="the run trains something else: lr is"):
        handover(crowd, 0.0).download(wanted(peers(how_many)), attempt=0)
