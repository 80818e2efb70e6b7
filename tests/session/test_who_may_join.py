"""Who joins gets the model from peers, and is told the first thing in which it differs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distro_optim.comm.model_exchange import SharedModel
from distro_optim.coordinator.types import RunState
from distro_optim.errors import ModelMismatchError
from distro_optim.strategy.model.checkpoint_place import LOCK
from distro_optim.strategy.model.identity import ModelIdentity

from .scripts import Net, Script, equal_weights
from .world import SessionWorld

MakeWorld = Callable[..., SessionWorld]


def joined_by(make_world: MakeWorld, joiner: Script) -> tuple[SessionWorld, Script]:
    """A run of one, which the joiner finds under way; to its end."""
    world = make_world(total_steps=30, epoch_time=30, init_min_clients=1, min_clients=1)
    host = Script(seed=1)
    world.run(world.port(1), host)
    world.until_phase(RunState.ROUND_TRAIN, height=3)
    world.run(world.port(2), joiner)
    world.until_all_ended()
    return world, host


def refusal(make_world: MakeWorld, joiner: Script) -> ModelMismatchError:
    with pytest.raises(ModelMismatchError) as caught:
        joined_by(make_world, joiner)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.slow
def test_a_joiner_trains_on_with_the_runs_weights(make_world: MakeWorld) -> None:
    joiner = Script(seed=2)
    _, host = joined_by(make_world, joiner)
    assert joiner.trained
    assert equal_weights(host, joiner)


class Wider(Net):
    def __init__(self) -> None:
        super().__init__()
        self.sometimes = torch.nn.Parameter(torch.zeros(7))


class WithMore(Net):
    def __init__(self) -> None:
        super().__init__()
        self.more = torch.nn.Parameter(torch.zeros(7))


@pytest.mark.parametrize(
    ("joiner", "what"),
    [
        (Script(model_class=Wider), "shape of sometimes"),
        (Script(model_class=WithMore), "what only one side has"),
        (Script(dtype=torch.bfloat16), "dtype of tied"),
        (Script(optimizer_settings={"lr": 2e-2}), "lr"),
        (Script(optimizer_settings={"weight_decay": 0.2}), "weight_decay"),
        (Script(optimizer_settings={"compression_topk": 5}), "compression_topk"),
        (Script(optimizer_settings={"tiling": "divisor"}), "tiling"),
        (Script(optimizer_settings={"quantize_1bit": False}), "quantize_1bit"),
        (Script(session_settings={"dataset_size": 61}), "length of the dataset"),
        (Script(session_settings={"dataset_size": None, "data_seed": 3}), "length of the dataset"),
        (Script(session_settings={"data_seed": 3}), "seed of the data's order"),
        (Script(reversed_parameters=True), "tensor 0"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_who_differs_is_refused_with_the_first_difference(make_world: MakeWorld, joiner: Script, what: str) -> None:
    error = refusal(make_world, joiner)
    assert error.what == what
    assert what in str(error)


@pytest.mark.slow
def test_the_refusal_says_what_is_here_and_what_is_there(make_world: MakeWorld) -> None:
    assert str(refusal(make_world, Script(model_class=Wider))) == (
        "the run trains something else: shape of sometimes is 7 here and 5 in the run; build the same model as the "
        "others"
    )


def test_who_is_refused_saves_nothing(make_world: MakeWorld, tmp_path: Path) -> None:
    refusal(make_world, Script(model_class=Wider, session_settings={"checkpoint_dir": tmp_path}))
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


@pytest.mark.slow
def test_a_setting_that_is_everybodys_own_may_differ_and_is_told_once(make_world: MakeWorld) -> None:
    joiner = Script(optimizer_settings={"compression_decay": 0.9})
    _, host = joined_by(make_world, joiner)
    assert equal_weights(host, joiner)
    assert joiner.news == ["compression_decay of parameter group 0 is 0.9 here and 0.999 in the run; that is allowed"]


def spoiled(model: SharedModel, spoil: Callable[[ModelIdentity], Any]) -> SharedModel:
    identity = ModelIdentity.decode(model.config)
    assert identity is not None
    return replace(model, config=spoil(identity))


@pytest.mark.slow
@pytest.mark.parametrize(
    "lie",
    [
        lambda identity: replace(identity, groups=(*identity.groups, {"lr": 1.0})).encode(),
        lambda identity: replace(identity, step=identity.step - 1).encode(),
        lambda identity: replace(identity, weights=bytes(32)).encode(),
        lambda identity: "[" * 100_000,
        lambda identity: '{"distro_optim": {"format": 99, "version": "9.0"}}',
    ],
)
def test_one_peer_that_lies_about_the_model_keeps_nobody_away(make_world: MakeWorld, lie: Callable[..., str]) -> None:
    world = make_world(total_steps=40, epoch_time=30, init_min_clients=2, min_clients=2)
    scripts = [Script(seed=1), Script(seed=2), Script(seed=3)]
    liar = world.port(1)
    honest_offer = liar.offer_model
    liar.offer_model = lambda model: honest_offer(spoiled(model, lie))  # type: ignore[method-assign]
    # Those of the first epoch get the truth: there is nobody else to ask.
    liar.offer_model = honest_offer  # type: ignore[method-assign]
    world.run(liar, scripts[0])
    world.run(world.port(2), scripts[1])
    world.until_phase(RunState.ROUND_TRAIN, height=3)
    liar.offer_model = lambda model: honest_offer(spoiled(model, lie))  # type: ignore[method-assign]
    world.run(world.port(3), scripts[2])
    world.until_all_ended()
    assert scripts[2].trained
    assert equal_weights(*scripts)


def test_a_peer_of_another_format_is_answered_with_what_to_install() -> None:
    from distro_optim.errors import ProtocolError

    with pytest.raises(ProtocolError, match=r"format 99 \(distro_optim 9.0\).*install the same version"):
        ModelIdentity.decode('{"distro_optim": {"format": 99, "version": "9.0"}}')
